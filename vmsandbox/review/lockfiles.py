"""What packages a lockfile names, and which reader fits which file, for a dozen formats.

All of it is the guest's text: nothing here runs it, resolves an alias or recurses, each reader takes time in proportion
to the text, and what is not understood is said to be so. Lockfiles written by tools are read line by line, as those
tools write them: a whole YAML or TOML parser would take many seconds for a file of a few megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from vmsandbox.review import package_files as files
from vmsandbox.review.packages import Collected, NotUnderstood, Packages, lines_of, list_of, read_json, table_of

_MAX_DEPTH = 100


def reader_for(name: str) -> Callable[[bytes], Packages] | None:
    """The reader for a file of this name (its last component, in lower case), or None."""
    for pattern, reader in _READERS:
        if fnmatchcase(name, pattern):
            return reader
    return None


def is_manifest(name: str) -> bool:
    """Whether a person writes it, with more in it than dependencies."""
    return name in ("pyproject.toml", "package.json", "cargo.toml", "composer.json", "pipfile")


def _toml_packages(data: bytes) -> Packages:
    """`[[package]]` tables as Cargo, poetry, uv and pdm write them: one key a line, the rest compared as text."""
    found = Collected()
    name = version = None
    origin: list[str] = []
    inside = False

    def close() -> None:
        if inside:
            found.add(name, version or "", "\n".join(origin))

    for line in lines_of(data):
        text = line.strip()
        if text.startswith("[["):
            close()
            inside = text.replace(" ", "") == "[[package]]"
            name = version = None
            origin = []
        elif text.startswith("[") and text.endswith("]") and "=" not in text and not line.startswith(" "):
            # A table below a package's belongs to it: `[package.source]` says where it comes from.
            if not text.startswith("[package."):
                close()
                inside = False
        elif inside and text:
            key, _, value = text.partition("=")
            if key.strip() == "name" and name is None:
                name = value.strip().strip("\"'")
            elif key.strip() == "version" and version is None:
                version = value.strip().strip("\"'")
            elif not key.strip().startswith(("description", "python-versions", "optional", "groups", "markers")):
                origin.append(text)
    close()
    return found.done()


def _pipfile_lock(data: bytes) -> Packages:
    found = Collected()
    for group, packages in read_json(data).items():
        if group == "_meta":
            found.add("(sources)", table_of(packages).get("sources"))
            continue
        for name, facts in table_of(packages).items():
            rest = {key: value for key, value in table_of(facts).items() if key != "version"}
            found.add(files.python_name(name), table_of(facts).get("version", ""), rest)
    return found.done()


def _package_lock(data: bytes) -> Packages:
    found = Collected()
    document = read_json(data)
    for path, facts in table_of(document.get("packages")).items():
        if path:
            name = table_of(facts).get("name") or path.rpartition("node_modules/")[2]
            origin = [facts.get("resolved"), facts.get("integrity"), facts.get("hasInstallScript"), facts.get("link")]
            found.add(name, facts.get("version", ""), origin)
    waiting = [] if "packages" in document else [(table_of(document.get("dependencies")), 0)]
    while waiting:
        packages, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise NotUnderstood
        for name, facts in packages.items():
            found.add(name, table_of(facts).get("version", ""), [facts.get("resolved"), facts.get("integrity")])
            if "dependencies" in facts:
                waiting.append((table_of(facts["dependencies"]), depth + 1))
    return found.done()


def _yarn_lock(data: bytes) -> Packages:
    """yarn.lock, of both generations: a heading for each package, its facts below it."""
    found = Collected()
    name = version = None
    origin: list[str] = []
    for line in [*lines_of(data), "end:"]:
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            if name is not None and name != "__metadata":
                found.add(name, version or "", "\n".join(origin))
            first = line.split(",")[0].strip().rstrip(":").strip('"')
            name = first[:1] + first[1:].partition("@")[0]
            version, origin = None, []
        elif match := re.fullmatch(r'  (version|resolved|integrity|resolution|checksum|linkType):? "?([^"]*)"?', line):
            if match[1] == "version":
                version = match[2]
            else:
                origin.append(match[2])
    return found.done()


def _pnpm_lock(data: bytes) -> Packages:
    """pnpm-lock.yaml as pnpm writes it: keys below `packages:` are /name@version, /name/version or name@version."""
    found = Collected()
    inside = False
    current: tuple[str, str] | None = None
    origin: list[str] = []

    def close() -> None:
        if current is not None:
            found.add(*current, "\n".join(origin))

    for line in lines_of(data):
        if line and not line.startswith((" ", "#")):
            close()
            current, inside = None, line.rstrip() == "packages:"
        elif inside and (match := re.fullmatch(r"  '?/?(@?[^@'\s/]+(?:/[^@'\s/]+)?)[@/]([^'\s]+?)'?:\s*", line)):
            close()
            current, origin = (match[1], match[2]), []
        elif (
            inside
            and line.startswith("    ")
            and line.strip().startswith(("resolution:", "integrity:", "tarball:", "requiresBuild:"))
        ):
            origin.append(line.strip())
        elif inside and line.startswith("  ") and not line.startswith("   "):
            raise NotUnderstood
    close()
    return found.done()


def _go_sum(data: bytes) -> Packages:
    found = Collected()
    for line in lines_of(data):
        words = line.split()
        if len(words) == 3:
            found.add(words[0], words[1].removesuffix("/go.mod"), words[1] + " " + words[2])
        elif words:
            raise NotUnderstood
    return found.done()


def _gemfile_lock(data: bytes) -> Packages:
    found = Collected()
    origin: list[str] = []
    for line in lines_of(data):
        if line and not line.startswith(" "):
            origin = [line]
        elif match := re.fullmatch(r"  (remote|revision|ref|branch|tag): (.*)", line):
            origin.append(match[2])
        elif match := re.fullmatch(r"    ([^\s()]+) \(([^()]+)\)", line):
            found.add(match[1], match[2], "\n".join(origin))
    return found.done()


def _composer_lock(data: bytes) -> Packages:
    found = Collected()
    document = read_json(data)
    for key in ("packages", "packages-dev"):
        for facts in list_of(document.get(key)):
            table = table_of(facts)
            found.add(
                table.get("name"), table.get("version", ""), [table.get("source"), table.get("dist"), table.get("type")]
            )
    return found.done()


_READERS: tuple[tuple[str, Callable[[bytes], Packages]], ...] = (
    ("*requirements*.txt", files.requirements),
    ("*requirements*.in", files.requirements),
    ("*constraints*.txt", files.requirements),
    ("pyproject.toml", files.pyproject),
    ("poetry.lock", _toml_packages),
    ("uv.lock", _toml_packages),
    ("pdm.lock", _toml_packages),
    ("pylock*.toml", lambda data: _toml_packages(data.replace(b"[[packages]]", b"[[package]]"))),
    ("cargo.lock", _toml_packages),
    ("cargo.toml", files.cargo_toml),
    ("pipfile", files.pipfile),
    ("pipfile.lock", _pipfile_lock),
    ("package.json", files.package_json),
    ("package-lock.json", _package_lock),
    ("npm-shrinkwrap.json", _package_lock),
    ("yarn.lock", _yarn_lock),
    ("pnpm-lock.yaml", _pnpm_lock),
    ("go.mod", files.go_mod),
    ("go.sum", _go_sum),
    ("gemfile.lock", _gemfile_lock),
    ("gems.locked", _gemfile_lock),
    ("composer.json", files.composer_json),
    ("composer.lock", _composer_lock),
)
