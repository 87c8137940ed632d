"""Packages that came, went or changed, and code in package manifests."""

from __future__ import annotations

import contextlib
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import change_of, judged
from trees import File, Tree

from vmsandbox.review.dependencies import cost_of, dependency_findings, manifest_code_findings
from vmsandbox.review.lockfiles import reader_for
from vmsandbox.review.packages import MAX_TOML, NotUnderstood
from vmsandbox.review.values import Finding, Risk


def dependencies(name: str, old: str | None, new: str | None) -> list[Finding]:
    return dependency_findings(name, None if old is None else old.encode(), None if new is None else new.encode())


def code(name: str, old: object, new: object) -> str | None:
    """What is said about code in a manifest: JSON made from values, or text."""
    sides = [
        one.encode() if isinstance(one, str) else None if one is None else json.dumps(one).encode()
        for one in (old, new)
    ]
    found = manifest_code_findings(name, sides[0], sides[1])
    assert len(found) < 2 and all(one.risk is Risk.AUTO_EXECUTED for one in found)
    return found[0].text if found else None


CARGO = '[[package]]\nname = "{}"\nversion = "{}"\nsource = "registry+https://{}"\n\n'
LOCK = {
    "requirements.txt": ("a==1\n# c\nb>=2 ; python_version > '3'\ng==1\n", "a==2 \\\n --hash=x\nnew\ng==1\n"),
    "requirements/dev-requirements.txt": ("a==1\nb\ng==1\n", "A==2\n-r other.txt\nnew # why\ng==1\n"),
    "pyproject.toml": (
        '[project]\ndependencies=["a==1","b"]\n[project.optional-dependencies]\nx=["g==1"]\n',
        '[project]\ndependencies=["a==2"]\n[project.optional-dependencies]\nx=["g==1"]\n[dependency-groups]\ndev=["new"]\n',
    ),
    "sub/Pyproject.toml": (
        '[tool.poetry.dependencies]\na="1"\nb="1"\ng="1"\n',
        '[tool.poetry.dependencies]\na="2"\ng="1"\n[tool.poetry.group.d.dependencies]\nnew={git="x"}\n',
    ),
    "Pipfile": ('[packages]\na="1"\nb="*"\ng="1"\n', '[packages]\na="2"\nnew="*"\ng="1"\n'),
    "Pipfile.lock": (
        '{"_meta":{},"default":{"a":{"version":"==1"},"b":{},"g":{"version":"1"}}}',
        '{"_meta":{},"default":{"a":{"version":"==2"},"new":{},"g":{"version":"1"}}}',
    ),
    "poetry.lock": (
        CARGO.format("a", 1, "x") + CARGO.format("b", 1, "x") + CARGO.format("g", 1, "x"),
        CARGO.format("a", 2, "x") + CARGO.format("new", 1, "x") + CARGO.format("g", 1, "x") + '[metadata]\nhash="1"\n',
    ),
    "uv.lock": (
        "version = 1\n" + CARGO.format("a", 1, "x") + CARGO.format("b", 1, "x") + CARGO.format("g", 1, "x"),
        "version = 1\n" + CARGO.format("a", 2, "x") + CARGO.format("new", 1, "x") + CARGO.format("g", 1, "x"),
    ),
    "Cargo.lock": (
        CARGO.format("a", 1, "x") + CARGO.format("b", 1, "x") + CARGO.format("g", 1, "x"),
        CARGO.format("a", 2, "x") + CARGO.format("new", 1, "x") + CARGO.format("g", 1, "x"),
    ),
    "Cargo.toml": (
        '[dependencies]\na="1"\nb="1"\n[dev-dependencies]\ng="1"\n',
        '[dependencies]\na={version="2"}\n[dev-dependencies]\ng="1"\n[target.x.dependencies]\nnew="1"\n',
    ),
    "package.json": (
        '{"dependencies":{"a":"1","b":"1"},"devDependencies":{"g":"1"}}',
        '{"dependencies":{"a":"2"},"devDependencies":{"g":"1","new":"1"}}',
    ),
    "package-lock.json": (
        '{"packages":{"":{},"node_modules/a":{"version":"1"},"node_modules/b":{"version":"1"},"node_modules/g":{}}}',
        '{"packages":{"":{},"node_modules/a":{"version":"2"},"node_modules/g":{},"node_modules/x/node_modules/new":{}}}',
    ),
    "npm-shrinkwrap.json": (
        '{"dependencies":{"a":{"version":"1","dependencies":{"b":{"version":"1"}}},"g":{"version":"1"}}}',
        '{"dependencies":{"a":{"version":"2","dependencies":{"new":{"version":"1"}}},"g":{"version":"1"}}}',
    ),
    "yarn.lock": (
        '# yarn v1\n\na@^1:\n  version "1"\n  resolved "u"\n\nb@1, b@2:\n  version "1"\n\n"@s/g@1":\n  version "1"\n',
        'a@^1:\n  version "2"\n  resolved "u"\n\n"@s/g@1":\n  version "1"\n\n"new@npm:1":\n  version: 1\n  x: "r"\n',
    ),
    "pnpm-lock.yaml": (
        "packages:\n\n  a@1.0.0:\n    resolution: {integrity: x}\n\n  /b/1.0:\n    dev: true\n  '@s/g@1':\n    x: y\n",
        "packages:\n\n  a@2.0.0:\n    resolution: x\n\n  '@s/g@1':\n    x: y\n  new@1:\nsnapshots:\n  q@1: {}\n",
    ),
    "go.mod": (
        "module m\n\ngo 1.21\nrequire a v1\nrequire (\n\tb v1 // indirect\n\tg v1\n)\n",
        "module m\n\ngo 1.21\nrequire a v2\nrequire (\n\tg v1\n\tnew v1\n)\n",
    ),
    "go.sum": ("a v1 h1:x=\nb v1/go.mod h1:y=\ng v1 h1:z=\n", "a v2 h1:x=\ng v1 h1:z=\nnew v1 h1:q=\n"),
    "Gemfile.lock": (
        "GEM\n  remote: https://r\n  specs:\n    a (1)\n      b (~> 1)\n    b (1)\n    g (1)\n",
        "GEM\n  remote: https://r\n  specs:\n    a (2)\n    g (1)\n    new (1)\n",
    ),
    "composer.json": (
        '{"require":{"a":"1","b":"1","g":"1"}}',
        '{"require":{"a":"2","g":"1"},"require-dev":{"new":"1"}}',
    ),
    "composer.lock": (
        '{"packages":[{"name":"a","version":"1"},{"name":"b","version":"1"},{"name":"g","version":"1"}]}',
        '{"packages":[{"name":"a","version":"2"},{"name":"g","version":"1"}],"packages-dev":[{"name":"new"}]}',
    ),
}


@pytest.mark.parametrize("name", LOCK)
def test_packages_added_removed_and_changed_are_named(name: str) -> None:
    old, new = LOCK[name]
    (found,) = dependencies(name, old, new)
    assert found.risk is Risk.DEPENDENCIES and not found.blocks and found.line is None
    parts = dict(
        reversed(part.split(": ", 1)) for part in re.split(r"; (?=\d+ )", found.text.removeprefix("packages: "))
    )
    by_kind = {kind: names for names, kind in parts.items()}
    added = next(names for kind, names in by_kind.items() if kind.endswith("added"))
    assert any(one.split()[0] == "new" for one in added.split(", "))
    assert by_kind["1 removed"].split()[0] == "b"
    changed = by_kind["1 changed"]
    assert changed.startswith("a ") and "1" in changed.split("→")[0] and "2" in changed.split("→")[1]
    assert " g " not in f" {found.text} ", "what did not change is not named"


@pytest.mark.parametrize("name", LOCK)
def test_a_new_and_a_deleted_file_of_packages(name: str) -> None:
    (found,) = dependencies(name, None, LOCK[name][0])
    assert "added" in found.text and "removed" not in found.text
    (found,) = dependencies(name, LOCK[name][0], None)
    assert "removed" in found.text and "added" not in found.text


def test_a_package_of_the_same_version_from_elsewhere_is_seen() -> None:
    for name, old, new in [
        ("Cargo.lock", CARGO.format("a", 1, "x"), CARGO.format("a", 1, "evil")),
        ("uv.lock", CARGO.format("a", 1, "x"), CARGO.format("a", 1, "x") + '[package.source]\nurl="evil"\n'),
        ("yarn.lock", 'a@1:\n  version "1"\n  resolved "x"\n', 'a@1:\n  version "1"\n  resolved "evil"\n'),
        ("package-lock.json", '{"packages":{"a":{"resolved":"x"}}}', '{"packages":{"a":{"resolved":"evil"}}}'),
        ("package-lock.json", '{"packages":{"a":{}}}', '{"packages":{"a":{"hasInstallScript":true}}}'),
        ("go.sum", "a v1 h1:x=\n", "a v1 h1:evil=\n"),
        ("requirements.txt", "a==1 --hash=x\n", "a==1 --hash=evil\n"),
        ("pnpm-lock.yaml", "packages:\n  a@1:\n    resolution: x\n", "packages:\n  a@1:\n    resolution: evil\n"),
        ("composer.lock", '{"packages":[{"name":"a","dist":1}]}', '{"packages":[{"name":"a","dist":2}]}'),
    ]:
        (found,) = dependencies(name, old, new)
        assert "1 the same version from elsewhere or with other checksums: a" in found.text, name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("requirements.txt", "--index-url https://evil"),
        ("requirements.txt", "-e ."),
        ("requirements.txt", "git+https://evil#egg=x"),
        ("requirements.txt", "./evil.whl"),
        ("go.mod", "replace a => ../evil"),
        ("go.mod", "toolchain go1.99"),
    ],
)
def test_lines_that_steer_the_package_manager_count_as_packages(name: str, line: str) -> None:
    (found,) = dependencies(name, "", f"{line}\n")
    assert "1 added" in found.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("package.json", "{"),
        ("package.json", "[]"),
        ("package.json", '{"dependencies": []}'),
        ("package.json", "{" * 100_000),
        ("package.json", '{"a":' * 100_000),
        ("package-lock.json", '{"packages": {"a": 1}}'),
        ("package-lock.json", '{"a": %s}' % ("9" * 5000)),
        ("pyproject.toml", "="),
        ("pyproject.toml", "a = " + "[" * 10_000),
        ("pyproject.toml", "[project]\ndependencies = 1"),
        ("pyproject.toml", "x = 1\n" * MAX_TOML),
        ("go.sum", "one two"),
        ("Cargo.toml", "dependencies = 1"),
        ("composer.lock", '{"packages": [1]}'),
        ("composer.lock", '{"packages": [{}]}'),
        ("pnpm-lock.yaml", "packages:\n  ? x\n"),
        ("poetry.lock", "[[package]]\n"),
        ("Cargo.lock", "[[package]]\nname\n"),
        ("Pipfile.lock", '{"a": 1}'),
    ],
)
def test_what_is_not_understood_is_said_to_be_so(name: str, text: str) -> None:
    (found,) = dependencies(name, None, text)
    assert "not understood" in found.text
    (found,) = dependencies(name, text, "{}")
    assert found.risk is Risk.DEPENDENCIES


def test_a_lockfile_is_flagged_also_if_no_package_changed_a_manifest_is_not() -> None:
    assert len(dependencies("Cargo.lock", "", "# x\n")) == 1
    assert dependencies("package.json", '{"dependencies":{}}', '{"dependencies":{}, "version": "2"}') == []
    assert dependencies("README.md", "a", "b") == []


def test_long_lists_are_cut() -> None:
    (found,) = dependencies("requirements.txt", "", "".join(f"p{number}==1\n" for number in range(500)))
    assert "500 added" in found.text and "and 492 more" in found.text and len(found.text) < 1000
    (found,) = dependencies("requirements.txt", "", "p==" + "1" * 10_000)
    assert len(found.text) < 200


PACKAGE = {"name": "x", "version": "1", "scripts": {"test": "jest"}, "dependencies": {"a": "1"}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "2", "description": "x", "author": "y"}, None),
        ({"dependencies": {"b": "1"}}, None),
        ({"scripts": {"test": "jest", "postinstall": "curl x"}}, "scripts.postinstall"),
        ({"scripts": {"test": "curl x"}}, "scripts.test"),
        ({"scripts": {}}, "scripts.test"),
        ({"bin": "x.js"}, "bin"),
        ({"husky": {"hooks": {"pre-commit": "x"}}}, "husky.hooks"),
        ({"jest": {"globalSetup": "x"}}, "jest.globalSetup"),
        ({"gypfile": True}, "gypfile"),
        ({"packageManager": "yarn@x"}, "packageManager"),
        ({"workspaces": ["x"]}, "workspaces"),
        ({"main": "x"}, "main"),
        ({"something": "new"}, "something"),
    ],
)
def test_code_in_package_json(change: dict[str, object], says: str | None) -> None:
    found = code("package.json", PACKAGE, {**PACKAGE, **change})
    assert found is None if says is None else found is not None and says in found
    assert code("sub/Package.JSON", PACKAGE, {**PACKAGE, **change}) == found


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("pyproject.toml", '[project]\nversion="2"\ndependencies=["x"]\n[tool.ruff]\nx=1\n', None),
        (
            "pyproject.toml",
            '[project]\nversion="1"\n[build-system]\nbuild-backend="evil"\n',
            "build-system.build-backend",
        ),
        ("pyproject.toml", '[build-system]\nrequires=["evil"]\n', "build-system.requires"),
        ("pyproject.toml", '[project.scripts]\nx="a:b"\n', "project.scripts"),
        ("pyproject.toml", '[project.entry-points.pytest11]\nx="a"\n', "project.entry-points"),
        ("pyproject.toml", '[tool.pytest.ini_options]\naddopts="-p evil"\n', "tool.pytest"),
        ("pyproject.toml", '[tool.poetry]\nversion="2"\n', None),
        ("pyproject.toml", '[tool.poetry.build]\nscript="evil.py"\n', "tool.poetry.build"),
        ("pyproject.toml", '[tool.poe.tasks]\nx="evil"\n', "tool.poe"),
        ("pyproject.toml", "not toml", "not be understood"),
        ("Cargo.toml", '[package]\nversion="2"\n[dependencies]\na="1"\n', None),
        ("Cargo.toml", '[package]\nbuild="evil.rs"\n', "package.build"),
        ("Cargo.toml", "[lib]\nproc-macro=true\n", "lib.proc-macro"),
        ("composer.json", '{"require": {"a": "1"}}', None),
        ("composer.json", '{"scripts": {"post-install-cmd": "evil"}}', "scripts.post-install-cmd"),
        ("composer.json", '{"config": {"allow-plugins": true}}', "config.allow-plugins"),
        ("Pipfile", '[scripts]\nx="evil"\n', "scripts.x"),
        ("Pipfile", '[packages]\na="*"\n', None),
    ],
)
def test_code_in_other_manifests(name: str, text: str, says: str | None) -> None:
    empty = "{}" if name.endswith("json") else ""
    for found in (code(name, empty, text), code(name, None, text)):
        assert found is None if says is None else found is not None and says in found, found
    if says != "not be understood":
        assert (code(name, text, empty) is None) == (says is None)


def test_a_change_of_type_alone_is_seen() -> None:
    assert (
        code("package.json", {"x": 1}, {"x": True})
        and code("package.json", {"x": None}, {})
        and code("package.json", {}, {"x": {}})
    )


def test_in_a_review() -> None:
    manifest = File(json.dumps(PACKAGE).encode())
    evil = File(json.dumps({**PACKAGE, "scripts": {"prepare": "x"}, "dependencies": {"a": "2"}}).encode())
    harmless = File(json.dumps({**PACKAGE, "version": "2"}).encode())
    old: Tree = {"package.json": manifest, "examples/package.json": evil, "k": File(b"k")}
    found = change_of(judged(old, {**old, "package.json": evil}), "package.json")
    assert [one.risk for one in found.findings] == [Risk.AUTO_EXECUTED, Risk.DEPENDENCIES]
    assert change_of(judged(old, {**old, "package.json": harmless}), "package.json").findings == ()
    moved = change_of(judged({"examples/package.json": evil}, {"package.json": evil}), "package.json")
    assert moved.sort == "renamed" and Risk.AUTO_EXECUTED in {one.risk for one in moved.findings}
    gone = change_of(judged({"package.json": evil}, {}), "package.json")
    assert [one.risk for one in gone.findings] == [Risk.AUTO_EXECUTED, Risk.DEPENDENCIES, Risk.DELETION]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(LOCK)), st.data())
def test_readers_survive_damaged_files(name: str, data: st.DataObject) -> None:
    text = LOCK[name][data.draw(st.integers(0, 1))].encode()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 9))
    damaged = text[:at] + data.draw(st.binary(max_size=9)) + text[at + cut :]
    for old, new in ((text, damaged), (damaged, text), (None, damaged)):
        for one in (*dependency_findings(name, old, new), *manifest_code_findings(name, old, new)):
            assert one.text.isprintable()


@pytest.mark.parametrize("name", sorted(LOCK))
def test_readers_take_time_in_proportion(name: str) -> None:
    reader = reader_for(name.rpartition("/")[2].lower())
    assert reader is not None and cost_of(name, 1) and not cost_of("x.py", 1)
    size = 256 << 10
    for piece in (
        b"a",
        b"(",
        b" ",
        b"    a (b",
        b"[[package]]\nname=1\n",
        b"packages:\n",
        b"  a@1:\n",
        b'  version "x',
        b"@",
        b"-_.",
        b" #",
        b"\\\n",
        b"{",
        b"[",
        b'{"a":',
        b"a.",
        b"[a.b]\n",
        b'"',
        b"'",
        b"require v",
        b"a={",
        b'"""',
        b"::",
    ):
        for data in (piece * (size // len(piece)), b"packages:\n" + piece * (size // len(piece))):
            began = time.monotonic()
            with contextlib.suppress(NotUnderstood):
                reader(data)
            assert time.monotonic() - began < 2, piece
