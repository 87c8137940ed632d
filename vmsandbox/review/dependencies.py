"""Which packages came, went or changed, and whether a package manifest now has other code in it.

Without it a new dependency is one line of a lockfile of ten thousand, and `"postinstall": "curl …"` one of a harmless
JSON file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmsandbox.review.lockfiles import is_manifest, reader_for
from vmsandbox.review.packages import MAX_BYTES, NotUnderstood, Packages, Version, read_json, read_toml
from vmsandbox.review.risky import folded
from vmsandbox.review.text import shown
from vmsandbox.review.values import Finding, Risk

_NAMES = 8  # packages that are named in one finding, of each sort
_SHOWN = 60
_TOML_COST = 16  # tomllib takes that many times as long as the other readers, when the guest means it to

# What may change in a manifest without any code being run that was not before. All else counts as code: a list of what
# runs code would be out of date with the next release of each tool.
_Harmless = dict[str, "_Harmless | None"]
_HARMLESS: dict[str, tuple[Callable[[bytes], dict[str, Any]], _Harmless]] = {
    "package.json": (
        read_json,
        dict.fromkeys(
            ("name", "version", "description", "keywords", "homepage", "bugs", "license", "author", "contributors",
             "funding", "repository", "private", "dependencies", "devDependencies", "peerDependencies",
             "optionalDependencies", "peerDependenciesMeta", "sideEffects", "overrides", "resolutions")
        ),
    ),
    "pyproject.toml": (
        read_toml,
        {
            "project": dict.fromkeys(
                ("name", "version", "description", "readme", "license", "license-files", "authors", "maintainers",
                 "keywords", "classifiers", "urls", "requires-python", "dependencies", "optional-dependencies")
            ),
            "dependency-groups": None,
            "tool": {
                "ruff": None, "black": None, "isort": None, "pyright": None, "codespell": None, "typos": None,
                "poetry": dict.fromkeys(
                    ("name", "version", "description", "license", "authors", "maintainers", "readme", "homepage",
                     "repository", "documentation", "keywords", "classifiers", "urls", "dependencies",
                     "dev-dependencies", "extras", "group", "source")
                ),
                "uv": dict.fromkeys(("sources", "index")),
            },
        },
    ),
    "cargo.toml": (
        read_toml,
        {
            "package": dict.fromkeys(
                ("name", "version", "description", "license", "license-file", "authors", "readme", "homepage",
                 "repository", "documentation", "keywords", "categories", "edition", "rust-version", "publish")
            ),
            **dict.fromkeys(("dependencies", "dev-dependencies", "build-dependencies", "features", "target", "badges")),
        },
    ),
    "composer.json": (
        read_json,
        dict.fromkeys(
            ("name", "version", "description", "keywords", "homepage", "license", "authors", "support", "funding",
             "require", "require-dev", "conflict", "suggest", "minimum-stability", "prefer-stable")
        ),
    ),
    "pipfile": (read_toml, dict.fromkeys(("source", "packages", "dev-packages", "requires"))),
}  # fmt: skip


def cost_of(path: str, size: int) -> int:
    """What reading this file's packages takes, in bytes of the cheapest format; 0 if it is none that names packages."""
    name = _name(path)
    if name in _HARMLESS and _HARMLESS[name][0] is read_toml:
        return size * _TOML_COST
    return size if name in _HARMLESS or reader_for(name) is not None else 0


def package_findings(path: str, old: bytes | None, new: bytes | None) -> list[Finding]:
    """Both of the below."""
    return [*manifest_code_findings(path, old, new), *dependency_findings(path, old, new)]


def too_many(path: str) -> list[Finding]:
    """What is said about a file of packages that is not read any more, because there were too many."""
    text = "names packages; not looked at, because there are so many such files"
    risks = [Risk.DEPENDENCIES, *([Risk.AUTO_EXECUTED] if _name(path) in _HARMLESS else [])]
    return [Finding(risk, text) for risk in risks]


def manifest_code_findings(path: str, old: bytes | None, new: bytes | None) -> list[Finding]:
    """AUTO_EXECUTED for a package manifest of which more than names, versions and dependencies changed.

    old, new: None where there is none, or it cannot be had.
    """
    name = _name(path)
    if name not in _HARMLESS or (old is None and new is None):
        return []
    reader, harmless = _HARMLESS[name]
    try:
        before = _without(reader(old), harmless) if old is not None else {}
        after = _without(reader(new), harmless) if new is not None else {}
        changed = sorted(_differences(before, after))
    except (NotUnderstood, RecursionError):
        return [Finding(Risk.AUTO_EXECUTED, "package managers run what it says; it could not be understood")]
    if not changed:
        return []
    keys = ", ".join(shown(key, _SHOWN) for key in changed[:_NAMES]) + _more(len(changed))
    return [Finding(Risk.AUTO_EXECUTED, f"package managers or tools run or obey what changed in it: {keys}")]


def _without(table: dict[str, Any], harmless: _Harmless) -> dict[str, Any]:
    left: dict[str, Any] = {}
    for key, value in table.items():
        if key not in harmless:
            left[key] = value
            continue
        inner = harmless[key]
        if inner is not None:
            if isinstance(value, dict):
                left |= {f"{key}.{one}": rest for one, rest in _without(value, inner).items()}
            else:
                left[key] = value
    return left


def _differences(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Keys that differ; one level further where both have a table, so that `scripts.postinstall` is named."""
    found: set[str] = set()
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if key in before and key in after and old == new and repr(old) == repr(new):
            continue  # repr: True is 1 for ==
        if isinstance(old if old is not None else {}, dict) and isinstance(new if new is not None else {}, dict):
            one, other = old or {}, new or {}
            inner = {name for name in one.keys() | other.keys() if repr(one.get(name)) != repr(other.get(name))}
            found |= {f"{key}.{name}" for name in inner} or {key}
        else:
            found.add(key)
    return found


def dependency_findings(path: str, old: bytes | None, new: bytes | None) -> list[Finding]:
    """What became of the packages that this file names; nothing for files that name none."""
    name = _name(path)
    reader = reader_for(name)
    if reader is None:
        return []
    try:
        before = _packages(reader, old)
        after = _packages(reader, new)
    except NotUnderstood:
        return [Finding(Risk.DEPENDENCIES, "names packages; the change is not understood")]
    parts = _parts(before, after)
    if parts:
        return [Finding(Risk.DEPENDENCIES, "packages: " + "; ".join(parts))]
    if is_manifest(name):
        return []
    return [Finding(Risk.DEPENDENCIES, "names packages; no name, version or source of one seems to have changed")]


def _packages(reader: Callable[[bytes], Packages], data: bytes | None) -> Packages:
    if data is None:
        return {}
    if len(data) > MAX_BYTES:
        raise NotUnderstood
    return reader(data)


def _parts(before: Packages, after: Packages) -> list[str]:
    added = sorted(after.keys() - before.keys())
    removed = sorted(before.keys() - after.keys())
    changed: list[str] = []
    moved: list[str] = []
    for name in sorted(before.keys() & after.keys()):
        if before[name] == after[name]:
            continue
        (moved if _versions(before[name]) == _versions(after[name]) else changed).append(name)
    return [
        *_part("added", added, lambda name: f"{shown(name, _SHOWN)} {_versions(after[name])}"),
        *_part("removed", removed, lambda name: f"{shown(name, _SHOWN)} {_versions(before[name])}"),
        *_part(
            "changed",
            changed,
            lambda name: f"{shown(name, _SHOWN)} {_versions(before[name])} → {_versions(after[name])}",
        ),
        *_part(
            "the same version from elsewhere or with other checksums",
            moved,
            lambda name: f"{shown(name, _SHOWN)} {_versions(after[name])}",
        ),
    ]


def _part(what: str, names: list[str], one: Callable[[str], str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what}: {', '.join(one(name) for name in names[:_NAMES])}{_more(len(names))}"]


def _versions(versions: frozenset[Version]) -> str:
    texts = sorted({one.version for one in versions})
    return " | ".join(shown(text, _SHOWN) for text in texts[:3]) + (" | …" if len(texts) > 3 else "")


def _more(count: int) -> str:
    return f" and {count - _NAMES} more" if count > _NAMES else ""


def _name(path: str) -> str:
    return folded(path.rpartition("/")[2])
