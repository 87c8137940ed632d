"""What came back, judged: each class of risk, by path, kind, mode and name."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Mapping
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import change_of, findings_in, judged, risks_in
from trees import File, Folder, Link, Memory, Tree, manifest_of

from vmsandbox.review.classify import review
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.risky import RiskyPaths, folded
from vmsandbox.review.rules import MassDeletion, ReviewLimits, ReviewRules, RiskyPath
from vmsandbox.review.rules_load import load_security_rules
from vmsandbox.review.select import selection_of
from vmsandbox.review.text import shown
from vmsandbox.review.values import Finding, Review, Risk
from vmsandbox.spec import Accept

TEXT = File(b"hello\n")
NO_EVAL = b"rules: [{id: no-eval, pattern: 'eval\\(', severity: error, message: no eval}]"


def risks_of(old: Tree, new: Tree, path: str) -> set[Risk]:
    return {one.risk for one in change_of(judged(old, new), path).findings}


def only(old: Tree, new: Tree, path: str, risk: Risk) -> Finding:
    found = [one for one in change_of(judged(old, new), path).findings if one.risk is risk]
    assert len(found) == 1, found
    return found[0]


def test_harmless_work_has_no_finding_and_is_safe() -> None:
    old: Tree = {"src/a.py": File(b"x = 1\ny = 2\n"), "docs/old.md": TEXT, "same": File(b"s")}
    new: Tree = {
        "src/a.py": File(b"x = 1\nz = 3\n"),
        "src/new.py": File(b"# \xc3\xbc\r\nimport os\n\x0c\n"),
        "docs/new.md": TEXT,
        "same": File(b"s"),
        "empty": File(b""),
        "more": Folder(),
    }
    found = judged(old, new)
    assert not found.findings
    assert [(one.path, one.findings) for one in found.changes if one.findings] == []
    assert [one.sort for one in found.changes] == ["renamed", "added", "added", "modified", "added"]
    assert found.digest == manifest_of(new).digest
    assert len(selection_of(found, Accept.SAFE).choices) == 5
    assert change_of(found, "src/a.py").hunks and change_of(found, "docs/new.md").hunks == ()


AUTO_EXECUTED = [
    ".github/workflows/ci.yml",
    ".github/actions/x/action.yml",
    ".gitlab-ci.yml",
    "Jenkinsfile",
    ".circleci/config.yml",
    "azure-pipelines.yml",
    ".travis.yml",
    "bitbucket-pipelines.yml",
    ".woodpecker.yml",
    ".woodpecker/a.yml",
    ".drone.yml",
    ".husky/pre-commit",
    ".githooks/pre-push",
    "hooks/pre-commit",
    ".gitattributes",
    ".gitmodules",
    ".gitconfig",
    ".pre-commit-config.yaml",
    ".vscode/tasks.json",
    ".vscode/launch.json",
    ".vscode/settings.json",
    ".vscode/extensions.json",
    "my.code-workspace",
    ".idea/runConfigurations/a.xml",
    ".vimrc",
    ".vim/x.vim",
    ".nvimrc",
    ".exrc",
    ".dir-locals.el",
    ".envrc",
    ".tool-versions",
    ".mise.toml",
    "Makefile",
    "GNUmakefile",
    "rules.mk",
    "justfile",
    "Taskfile.yml",
    "CMakeLists.txt",
    "meson.build",
    "BUILD",
    "WORKSPACE",
    "defs.bzl",
    "build.gradle",
    "build.gradle.kts",
    "gradlew",
    "pom.xml",
    "Rakefile",
    "noxfile.py",
    "tox.ini",
    "fabfile.py",
    "setup.py",
    "setup.cfg",
    "build.rs",
    ".cargo/config.toml",
    "rust-toolchain",
    "rust-toolchain.toml",
    "Gemfile",
    "x.gemspec",
    ".npmrc",
    ".yarnrc.yml",
    ".pnp.cjs",
    "pip.conf",
    "conftest.py",
    "sitecustomize.py",
    "usercustomize.py",
    "x.pth",
    "pytest.ini",
    "Dockerfile",
    "Dockerfile.dev",
    "docker-compose.prod.yml",
    ".devcontainer/devcontainer.json",
    ".claude/settings.json",
    "CLAUDE.md",
    "AGENTS.md",
    ".mcp.json",
    ".cursor/rules/x.mdc",
    ".cursorrules",
    ".github/copilot-instructions.md",
    ".aider.conf.yml",
    ".continue/config.json",
    ".gemini/settings.json",
    ".bashrc",
    ".profile",
    ".zshrc",
    "app.service",
    "x.timer",
    ".vmsandbox.yaml",
]


@pytest.mark.parametrize("path", AUTO_EXECUTED)
@pytest.mark.parametrize("folder", ["", "packages/web/"])
def test_files_that_something_runs_are_an_approval_of_their_own(path: str, folder: str) -> None:
    path = folder + path
    assert risks_of({}, {path: TEXT}, path) >= {Risk.AUTO_EXECUTED}
    assert risks_of({path: TEXT}, {path: File(b"other\n")}, path) == {Risk.AUTO_EXECUTED}
    assert risks_of({path: TEXT}, {}, path) == {Risk.AUTO_EXECUTED, Risk.DELETION}
    assert Risk.AUTO_EXECUTED in risks_of({path: TEXT}, {"elsewhere.txt": TEXT}, "elsewhere.txt")
    assert Risk.AUTO_EXECUTED in risks_of({"harmless.txt": TEXT}, {path: TEXT}, path)


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "src/main.py",
        "makefile_parser.py",
        ".editorconfig",
        ".vscode/snippets.json",
        "github/workflows/x.yml",
        "docs/Makefile.md/x",
        "src/Dockerfiles.py",
        "package/main.go",
        "tests/test_x.py",
        "x.py",
        "notes/claude.md.txt",
        "husky/x",
        "src/service.py",
        "a.pth.txt",
        "LICENSE",
        ".gitignore",
        "hooks/useThing.ts",
    ],
)
def test_other_files_are_not(path: str) -> None:
    assert RiskyPaths().reason(path) is None
    assert risks_of({}, {path: TEXT}, path) == set()


@pytest.mark.parametrize(
    "path",
    [
        "makefile",
        "MAKEFILE",
        ".GitHub/Workflows/x.yml",
        "Makefile.",
        "Makefile ",
        ".envrc::$DATA",
        "Ma\u212aefile",
        ".g\u200cithub/workflows/x",
        ".ENVRC",
        "ｃonftest.py",
        "\ufeff.envrc",
        ".vs\u202ecode/tasks.json",
    ],
)
def test_other_spellings_of_the_same_name_count(path: str) -> None:
    assert RiskyPaths().reason(path) is not None, folded(path)


def test_people_add_to_the_list_and_take_nothing_from_it() -> None:
    extra = (RiskyPath("/deploy/*.sh", "our deployment runs it"), RiskyPath("*.mk", "mine first"))
    risky = RiskyPaths(extra)
    assert risky.reason("deploy/x.sh") == "our deployment runs it"
    assert risky.reason("sub/deploy/x.sh") is None and risky.reason("deploy/sub/x.sh") is None
    assert risky.reason("a.mk") == "mine first" and risky.reason(".envrc")
    new: Tree = {"deploy/x.sh": TEXT}
    assert [one.text for one in change_of(judged({}, new, ReviewRules(risky_paths=extra)), "deploy/x.sh").findings] == [
        "our deployment runs it"
    ]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a/**/b", "a/b a/x/b x/a/x/y/b", "ab a/xb"),
        ("a/", "a/x a/b/c x/a/y", "a ba/x"),
        ("/a", "a", "x/a"),
        ("x?[0-9]", "xa1 d/xb2", "x/1 xab"),
        ("[!a]b", "cb", "ab /b"),
        ("f.{x,y}z", "f.xz f.yz", "f.z"),
        ("a.b", "a.b", "axb"),
        ("**/q", "q a/b/q", "aq"),
        ("ÄB", "äb a\u0308b", "ab"),
    ],
)
def test_patterns_of_the_list(pattern: str, yes: str, no: str) -> None:
    risky = RiskyPaths([RiskyPath(pattern, "mine")])
    assert [risky.reason(path) for path in yes.split()] == ["mine"] * len(yes.split())
    assert "mine" not in [risky.reason(path) for path in no.split()]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/etc/passwd", "out of the project"),
        ("../../x", "out of the project"),
        ("docs/../../../x", "out of the project"),
        ("../.git/hooks/pre-commit", "git's own folder"),
        ("../.git", "git's own folder"),
        ("../.GIT/x", "git's own folder"),
        ("../.g\u200cit/x", "git's own folder"),
        ("../git~1/x", "git's own folder"),
        ("../away", "out of the project"),
        ("../loop", "in circles"),
        ("../sub/x", "git's own folder"),
        ("x/" * 5000, "too long"),
    ],
)
def test_links_that_lead_out_or_into_git_are_blocked(target: str, says: str) -> None:
    old: Tree = {"away": Link("/home"), "loop": Link("loop"), "sub": Link("docs/../.git"), "docs/a": TEXT}
    found = only(old, {**old, "docs/link": Link(target)}, "docs/link", Risk.SYMLINK)
    assert found.blocks and says in found.text
    changed = only({**old, "docs/link": Link("a")}, {**old, "docs/link": Link(target)}, "docs/link", Risk.SYMLINK)
    assert changed.blocks
    assert all(
        one.path != "docs/link"
        for one in selection_of(judged(old, {**old, "docs/link": Link(target)}), Accept.ALL).choices
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("Makefile", "a build or task runner runs it"),
        ("nothing", "did not come back"),
        (".env", "a secret, by its name"),
        ("src", "a folder with src/setup.py"),
        ("rules", "which matters by itself"),
        ("docs", "symbolic link to docs"),
    ],
)
def test_links_inside_are_flagged_with_what_they_lead_to(target: str, says: str) -> None:
    old: Tree = {"Makefile": TEXT, "src/setup.py": TEXT, "docs/a": TEXT, "justfile": Link("rules"), "rules": TEXT}
    found = only(old, {**old, "link": Link(target)}, "link", Risk.SYMLINK)
    assert says in found.text and not found.blocks


def test_a_file_that_a_link_makes_executed_is_as_if_it_lay_there() -> None:
    old: Tree = {
        ".github": Link("ci"),
        "ci/workflows": Link("../flows"),
        "flows/x.yml": TEXT,
        "Makefile": Link("build/rules"),
        "build/rules": TEXT,
        "all": Link("."),
    }
    new = {**old, "flows/x.yml": File(b"other\n"), "build/rules": File(b"all: x\n"), "flows2/x.yml": File(b"new\n")}
    assert ".github/workflows/x.yml" in only(old, new, "flows/x.yml", Risk.AUTO_EXECUTED).text
    assert "Makefile" in only(old, new, "build/rules", Risk.AUTO_EXECUTED).text
    assert risks_of(old, new, "flows2/x.yml") == set()


def test_a_new_link_that_makes_old_files_executed_is_flagged_as_such() -> None:
    old: Tree = {"examples/editor/tasks.json": TEXT}
    found = only(old, {**old, ".vscode": Link("examples/editor")}, ".vscode", Risk.AUTO_EXECUTED)
    assert ".vscode/tasks.json" in found.text


def test_a_link_in_the_place_of_a_folder_taints_what_was_below() -> None:
    old: Tree = {"d/f": TEXT, "e": TEXT}
    new: Tree = {"d": Link("e"), "e": TEXT}
    assert "in the place of a folder" in only(old, new, "d", Risk.SYMLINK).text
    assert risks_of(old, new, "d/f") == {Risk.SYMLINK, Risk.DELETION}
    # A tree that no strict reader lets through: something below a link.
    items = {**manifest_of(new).items, "d/f": Item("file", 0o644, 0, hashlib.sha256().hexdigest())}
    found = review(Manifest({}), Manifest(items), Memory(), Memory({"x": File(b"")}, new), ReviewRules())
    assert change_of(found, "d/f").blocked


def test_changes_of_kind() -> None:
    assert risks_of({"a": Link("b"), "b": TEXT}, {"a": TEXT, "b": TEXT}, "a") == {Risk.SYMLINK}
    assert risks_of({"a": TEXT}, {"a/b": File(b"x")}, "a") == {Risk.DELETION}
    assert risks_of({"a": Folder()}, {"a": File(b"x", 0o755)}, "a") == {Risk.DELETION, Risk.EXECUTABLE}


def test_modes() -> None:
    run = File(b"#!/bin/sh\n", 0o755)
    assert risks_of({}, {"a": run}, "a") == {Risk.EXECUTABLE}
    assert risks_of({"a": TEXT}, {"a": File(TEXT.data, 0o744)}, "a") == {Risk.EXECUTABLE}
    assert risks_of({"a": TEXT}, {"b": File(TEXT.data, 0o755)}, "b") == {Risk.EXECUTABLE}
    assert risks_of({"a": TEXT}, {"a": File(b"other\n", 0o755)}, "a") == {Risk.EXECUTABLE}
    assert risks_of({"a": run}, {"a": File(run.data, 0o644)}, "a") == {Risk.MODE}
    assert risks_of({"a": run}, {"a": File(run.data, 0o700)}, "a") == {Risk.MODE}
    assert risks_of({"a": TEXT}, {"a": File(TEXT.data, 0o600)}, "a") == {Risk.MODE}
    assert risks_of({"a": Folder()}, {"a": Folder(0o700)}, "a") == {Risk.MODE}
    assert "0644 → 0755" in only({"a": TEXT}, {"a": File(TEXT.data, 0o755)}, "a", Risk.EXECUTABLE).text


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0", b"\xff\xfe\0", b"caf\xe9\n", b"a\0b"])
def test_binaries_are_listed(data: bytes) -> None:
    assert Risk.BINARY in risks_in(data, "x")
    assert Risk.BINARY in risks_of({"x": TEXT}, {"x": File(data)}, "x")


def test_only_rules_and_secrets_are_looked_for_in_binaries() -> None:
    rules = ReviewRules(patterns=load_security_rules("rules", NO_EVAL)[0])
    found = findings_in(b"\0\n\x1b[2J\xe2\x80\xae\neval(1)\n", "x", rules)
    assert [(one.risk, one.line) for one in found] == [(Risk.RULE, None), (Risk.BINARY, None)]


def test_deletions() -> None:
    old: Tree = {"a/b": TEXT, "c": TEXT, "l": Link("c")}
    new: Tree = {"c": File(b"")}
    found = judged(old, new)
    assert {one.path: {finding.risk for finding in one.findings} for one in found.changes} == {
        "a": {Risk.DELETION},
        "a/b": {Risk.DELETION},
        "l": {Risk.DELETION},
        "c": {Risk.DELETION},
    }
    assert not found.findings
    hunks = change_of(found, "a/b").hunks
    assert hunks is not None and hunks[0].lines == (("-", b"hello\n"),)


@pytest.mark.parametrize(
    ("files", "deleted", "emptied", "cut", "flagged"),
    [
        (100, 0, 0, 0, False),
        (100, 20, 0, 0, False),
        (100, 21, 0, 0, True),
        (100, 0, 21, 0, True),
        (100, 0, 0, 21, True),
        (100, 10, 6, 5, True),
        (20, 9, 0, 0, False),
        (20, 10, 0, 0, True),
        (1000, 50, 0, 0, False),
        (1000, 51, 0, 0, True),
    ],
)
def test_mass_deletion_is_a_finding_about_the_whole(
    files: int, deleted: int, emptied: int, cut: int, flagged: bool
) -> None:
    old: dict[str, File] = {f"f{number:04}": File(b"%d\n" % number * 1000) for number in range(files)}
    new = dict(old)
    names = iter(old)
    for _ in range(deleted):
        del new[next(names)]
    for _ in range(emptied):
        new[next(names)] = File(b"")
    for _ in range(cut):
        name = next(names)
        new[name] = File(old[name].data[:50])
    new["harmless"] = TEXT
    found = judged(old, new)
    assert bool(found.findings) == flagged
    assert (selection_of(found, Accept.SAFE).choices == ()) == flagged
    if flagged:
        assert (
            found.findings[0].risk is Risk.DELETION
            and f"{deleted + emptied + cut} of {files}" in found.findings[0].text
        )


def test_the_threshold_is_the_caller_s_and_moving_is_not_deleting() -> None:
    old: Tree = {f"old/{number}": File(b"%d" % number) for number in range(30)}
    assert not judged(old, {f"new/{number}": File(b"%d" % number) for number in range(30)}).findings
    few: Tree = {**old}
    assert judged(few, {"old/1": old["old/1"]}).findings
    lenient = ReviewRules(deletion=MassDeletion(share=1, files=1000))
    assert not judged(few, {"old/1": old["old/1"]}, lenient).findings


@pytest.mark.parametrize(
    "name",
    [
        "a\x1b[2Jb",
        "a\nb",
        "a\tb",
        "a\u0085b",
        "a\udcff",
        "a\\b",
        "-rf",
        "--",
        "con",
        "NUL.txt",
        "com1",
        "Lpt9.x",
        "trailing.",
        "trailing ",
        " leading",
        "a:b",
        "a?",
        "~root",
    ],
)
def test_odd_names(name: str) -> None:
    for path in (name, f"sub/{name}"):
        assert Risk.NAME in risks_of({}, {path: File(b"x")}, path)
        assert Risk.NAME in risks_of({"x": TEXT}, {path: TEXT}, path)
        assert Risk.NAME not in risks_of({path: TEXT}, {path: File(b"other")}, path)


@pytest.mark.parametrize(
    "name", [".GIT", ".Git", ".git.", ".git ", "git~1", "GIT~1", ".g\u200dit", ".git::$INDEX_ALLOCATION"]
)
def test_names_that_are_git_s_own_somewhere_are_blocked(name: str) -> None:
    assert any(one.blocks for one in change_of(judged({}, {f"a/{name}/config": TEXT}), f"a/{name}").findings)


@pytest.mark.parametrize("name", ["pa\u0443pal.py", "a\u202etxt.exe", "a\u200b", "a\U000e0041", "\u0441at.py"])
def test_names_are_looked_at_for_unicode(name: str) -> None:
    found = [one for one in change_of(judged({}, {name: TEXT}), name).findings if one.risk is Risk.UNICODE]
    assert found and all(one.line is None and shown(one.text) == one.text for one in found)


@pytest.mark.parametrize(
    "name", ["naïve.txt", "übung.py", "日本語.md", "Привет.txt", "עברית", "emoji-🎉.md", "x-y_z 1.txt"]
)
def test_names_in_any_language_are_fine(name: str) -> None:
    assert risks_of({}, {name: TEXT}, name) == set()


@pytest.mark.parametrize(
    ("one", "other"), [("README", "readme"), ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "STRASSE"), ("d/x", "D/x")]
)
def test_names_that_are_one_on_some_file_systems(one: str, other: str) -> None:
    assert Risk.NAME in risks_of({one: TEXT}, {one: TEXT, other: File(b"2")}, other)
    assert Risk.NAME in risks_of({one: TEXT}, {other: TEXT}, other)
    assert Risk.NAME in risks_of({one: TEXT}, {other: File(b"2")}, other)
    both: Tree = {one: TEXT, other: TEXT}
    assert risks_of(both, {**both, one: File(b"changed")}, one) == set()


class Lying(Memory):
    """Contents that hand out other bytes than were asked for."""

    def open(self, sha256: str) -> BinaryIO | None:
        return io.BytesIO(b"something else") if sha256 in self.blobs else None


def test_what_cannot_be_read_is_blocked() -> None:
    pushed, returned = manifest_of({}), manifest_of({"a": TEXT})
    for contents in (Memory(), Lying({"a": TEXT})):
        change = change_of(review(pushed, returned, Memory(), contents, ReviewRules()), "a")
        assert change.blocked and {one.risk for one in change.findings} == {Risk.UNREADABLE} and change.hunks is None
    for item in (Item("file", 0o644, 5, None), Item("other", 0o644)):
        change = change_of(review(pushed, Manifest({"a": item}), Memory(), Memory(), ReviewRules()), "a")
        assert change.blocked and {one.risk for one in change.findings} == {Risk.UNREADABLE}


def test_a_size_that_lies_is_found() -> None:
    item = manifest_of({"a": TEXT}).items["a"]._replace(size=2)
    found = review(Manifest({}), Manifest({"a": item}), Memory(), Memory({"a": TEXT}), ReviewRules())
    assert change_of(found, "a").blocked


def test_a_file_that_only_moved_or_was_copied_is_read_from_the_host() -> None:
    old: Tree = {"a": TEXT, "k": File(b"keep")}
    found = review(
        manifest_of(old),
        manifest_of({"b": TEXT, "k": old["k"], "copy": old["k"]}),
        Memory(old),
        Memory(),
        ReviewRules(),
    )
    assert [(one.path, one.sort, one.findings) for one in found.changes] == [
        ("b", "renamed", ()),
        ("copy", "added", ()),
    ]


def test_old_bytes_that_are_gone_make_all_lines_new() -> None:
    rules = ReviewRules(patterns=load_security_rules("rules", NO_EVAL)[0])
    old: Tree = {"a": File(b"eval(1)\n")}
    new: Tree = {"a": File(b"eval(1)\nx\n")}
    found = review(manifest_of(old), manifest_of(new), Memory(old), Memory(new), rules)
    assert change_of(found, "a").findings == ()
    for contents in (Memory(), Lying(old)):
        change = change_of(review(manifest_of(old), manifest_of(new), contents, Memory(new), rules), "a")
        assert change.blocked and change.hunks is None


def test_large_files_are_not_shown_but_rules_and_secrets_hold() -> None:
    rules = ReviewRules(
        patterns=load_security_rules("rules", NO_EVAL)[0], limits=ReviewLimits(file_bytes=1000, scan_bytes=50_000)
    )
    big = b"# padding\n" * 2000
    change = change_of(judged({}, {"a": File(big)}, rules), "a")
    assert [one.risk for one in change.findings] == [Risk.UNREADABLE] and not change.blocked and change.hunks is None
    change = change_of(judged({}, {"a": File(big + b"eval(1)\n" + big)}, rules), "a")
    assert change.findings[0].risk is Risk.RULE and change.findings[0].line == 2001 and change.blocked
    huge = {"a": File(big * 5)}
    assert change_of(judged({}, huge, rules), "a").blocked
    assert not change_of(judged({}, huge, ReviewRules(limits=rules.limits)), "a").blocked


def test_hunks_have_a_limit_in_all() -> None:
    new: Tree = {f"f{number}": File(b"%d\n" % number * 100) for number in range(10)}
    found = judged({}, new, ReviewRules(limits=ReviewLimits(hunk_bytes=500)))
    assert [one.hunks is not None for one in found.changes] == [True] * 3 + [False] * 7
    assert all(one.findings == () for one in found.changes)


def test_the_worst_comes_first() -> None:
    new: Tree = {
        "z-escape": File(b"\x1b[2J"),
        "a-plain": TEXT,
        "b-plain": TEXT,
        "y-run": File(b"x", 0o755),
        "x-bin": File(b"\0"),
        ".envrc": TEXT,
        "m-two": File(b"\xe2\x80\xae\n\x1b[2J\n\x1b[2J\n", 0o755),
        "l": Link("a-plain"),
    }
    found = judged({}, new)
    assert [one.path for one in found.changes] == [
        ".envrc",
        "m-two",
        "z-escape",
        "l",
        "y-run",
        "x-bin",
        "a-plain",
        "b-plain",
    ]
    assert [(one.risk, one.line) for one in change_of(found, "m-two").findings] == [
        (Risk.TERMINAL, 2),
        (Risk.TERMINAL, 3),
        (Risk.UNICODE, 1),
        (Risk.EXECUTABLE, None),
    ]


def test_only_added_lines_count() -> None:
    bad = "x = 'a\u202eb' \x1b[2J\n".encode()
    old: Tree = {"a": File(b"first\n" + bad + b"last\n")}
    assert risks_of(old, {"a": File(b"first\n" + bad + b"last\nmore\n")}, "a") == set()
    found = change_of(judged(old, {"a": File(b"zero\nfirst\n" + bad + b"last\n" + bad)}), "a")
    assert {(one.risk, one.line) for one in found.findings} == {(Risk.TERMINAL, 5), (Risk.UNICODE, 5)}


_PATHS = st.sampled_from(
    [
        "a",
        "A",
        "b/c",
        "b",
        "b/C",
        ".envrc",
        "package.json",
        "Makefile",
        "x.lock",
        "go.sum",
        "yarn.lock",
        "pyproject.toml",
        "pnpm-lock.yaml",
        "l",
        "l/m",
        "\udcff",
        "-x",
        "e\u0301",
        "\xe9",
        "\x1b",
        ".GIT/x",
        "requirements.txt",
        "poetry.lock",
    ]
)
_DATA = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from(
        [b"{}", b'{"scripts": 1}', b"[[package]]\n", b"packages:\n  a@1:\n", b'{"packages": []}', b"[project]\n"]
    ),
)
_ENTRIES = st.one_of(
    st.builds(File, _DATA, st.sampled_from([0o644, 0o755, 0o600, 0])),
    st.builds(
        Link,
        st.one_of(
            st.sampled_from(["a", "../a", "/", ".", "b", "l", ".git", "b/../l"]), st.text(min_size=1, max_size=5)
        ),
    ),
    st.builds(Folder),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_PATHS, _ENTRIES, max_size=6), st.dictionaries(_PATHS, _ENTRIES, max_size=6))
def test_any_two_trees_are_judged_the_same_each_time(old: Mapping[str, File], new: Mapping[str, File]) -> None:
    found = judged(old, new)
    pushed, returned = manifest_of(old).items, manifest_of(new).items

    def shuffled(items: Mapping[str, Item]) -> Manifest:
        pairs = list(items.items())
        random.Random(1).shuffle(pairs)
        return Manifest(dict(pairs))

    again: Review = review(shuffled(pushed), shuffled(returned), Memory(old), Memory(new), ReviewRules())
    assert again == found
    for one in (finding for change in found.changes for finding in change.findings):
        assert one.text.isprintable(), one
    for change in found.changes:
        if change.after is not None and change.after.kind == "symlink":
            assert any(one.risk is Risk.SYMLINK for one in change.findings)
        if change.after is None:
            assert any(one.risk is Risk.DELETION for one in change.findings)


def test_findings_never_carry_the_guest_s_control_characters() -> None:
    evil = "x\x1b]52;c;aGk=\x07\u202e"
    old: Tree = {"package.json": File(b"{}"), "go.mod": File(b""), "d/f": TEXT}
    new: Tree = {
        evil: TEXT,
        f"{evil}/l".replace("/", "-"): Link(evil),
        "d": Link(evil),
        f"{evil}2/.envrc": TEXT,
        "package.json": File(json.dumps({"scripts": {evil: ""}, "dependencies": {evil: evil}}).encode()),
        "go.mod": File(f"require {evil} v1{evil}\n".encode()),
        "Makefile": Link(f"{evil}3"),
        f"{evil}3": TEXT,
    }
    found = judged(old, new)
    texts = [one.text for change in found.changes for one in change.findings]
    assert len(texts) > 12
    assert [text for text in texts if not text.isprintable()] == []


def test_findings_in_helper_sees_nothing_in_plain_text() -> None:
    assert findings_in("plain\n") == ()
