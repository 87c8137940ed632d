"""The patch of a review: `git apply` makes the returned tree of the pushed one, byte by byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import File, Folder, Link, Memory, Tree, read_tree, review_of, with_folders, write_tree

from vmsandbox.errors import RefusedError
from vmsandbox.review.manifest import Item
from vmsandbox.review.patch import as_patch, quoted_name
from vmsandbox.review.values import FileChange, Review

LINES = b"".join(b"line %d\n" % number for number in range(60))
NOISE = bytes(range(256)) * 40  # binary, several lines of base85
ODD = ["with space", 'quo"te', "back\\slash", "tab\there", "new\nline", "é", "raw\udcff", " lead", "a => b", "-dash"]

CASES: dict[str, tuple[Tree, Tree]] = {
    "edited": ({"a": File(LINES)}, {"a": File(LINES.replace(b"line 3\n", b"x\n").replace(b"line 40\n", b""))}),
    "crlf": ({"a": File(b"a\r\nb\r\n")}, {"a": File(b"a\r\nc\n")}),
    "no last newline": ({"a": File(b"a"), "b": File(b"b\n")}, {"a": File(b"a\n"), "b": File(b"b")}),
    "added": ({}, {"new": File(b"x\n"), "d/e/run": File(b"#!\n", 0o755), "empty": File(b"")}),
    "deleted": ({"a": File(b"x\n"), "run": File(b"x", 0o755), "empty": File(b"")}, {}),
    "mode": ({"a": File(b"x\n"), "b": File(b"", 0o755)}, {"a": File(b"x\n", 0o755), "b": File(b"")}),
    "mode and text": ({"a": File(b"x\n")}, {"a": File(b"y\n", 0o755)}),
    "renamed": ({"a": File(LINES), "d/b": File(b"b\n")}, {"e/a": File(LINES, 0o755), "d/c": File(b"b\n")}),
    "links": (
        {"l": Link("a"), "gone": Link("x/y"), "f": File(b"x\n")},
        {"l": Link("b c"), "new": Link("../out\n"), "f": Link("t")},
    ),
    "link to file": ({"l": Link("a")}, {"l": File(b"text\n", 0o755)}),
    "binary": (
        {"mod": File(NOISE), "gone": File(NOISE[1:]), "small": File(b"\0", 0o755)},
        {"mod": File(NOISE[::-1]), "new": File(b"\0" * 1000), "small": File(b"\0\1", 0o755)},
    ),
    "binary to text": ({"a": File(NOISE), "b": File(b"text\n")}, {"a": File(b"text\n"), "b": File(b"\0", 0o755)}),
    "file to folder": ({"a": File(b"x\n")}, {"a/b": File(b"y\n")}),
    "folder to file": ({"a/b": File(b"x\n"), "a/c": File(b"z\n")}, {"a": File(b"y\n"), "c": File(b"z\n")}),
    "folder to link": ({"a/b": File(b"x\n")}, {"a": Link("b")}),
    "odd names": (
        {f"{name}/{name}": File(b"old\n") for name in ODD},
        {f"{name}/{name}": File(b"new\n") for name in ODD} | {f"{name}.e": File(b"") for name in ODD},
    ),
    "odd names, renamed": ({name: File(name.encode("utf-8", "replace")) for name in ODD},
                           {f"d/{name}\x01": File(name.encode("utf-8", "replace")) for name in ODD}),
    "hostile text": (
        {"a": File(b"")},
        {"a": File(b"--- a/x\n+++ b/../x\n@@ -1 +1 @@\ndiff --git a/x b/x\n\\ No newline at end of file\nGIT binary")},
    ),
}  # fmt: skip


def applied(old: Tree, patch: bytes) -> dict[str, File | Link]:
    folder = Path(tempfile.mkdtemp(prefix="vmsb-"))
    try:
        write_tree(folder, old)
        environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent"}
        environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", "--allow-empty", "-"],
            input=patch, cwd=folder, env=environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stderr, patch)
        return read_tree(folder)
    finally:
        shutil.rmtree(folder)


def without_folders(tree: Tree) -> Tree:
    return {path: entry for path, entry in tree.items() if not isinstance(entry, Folder)}


@pytest.mark.parametrize("with_hunks", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_git_makes_the_returned_tree_of_it(name: str, with_hunks: bool) -> None:
    old, new = CASES[name]
    patch = b"".join(as_patch(review_of(old, new, with_hunks=with_hunks), Memory(old), Memory(new)))
    assert applied(old, patch) == new


# No link may lead to itself: git fails with ELOOP where a folder takes its place.
LINKED = ["t/u", "..", "\udc80"]
NAMES = st.sampled_from(["a", "b", "c/a", "c/b", "a/x", "c d", "é\n", "c/é\n/q", "\udcfe"])
DATA = st.one_of(
    st.binary(max_size=200), st.lists(st.sampled_from([b"a\n", b"b\n", b"\r\n"]), max_size=30).map(b"".join)
)
ENTRIES = st.one_of(
    st.builds(File, DATA, st.sampled_from([0o644, 0o755])),
    st.builds(Link, st.sampled_from(LINKED)),
)


def possible(tree: Tree) -> dict[str, File | Link]:
    """Without entries that lie below a file or a link."""
    return {
        path: entry
        for path, entry in tree.items()
        if not isinstance(entry, Folder)
        and not any("/".join(path.split("/")[:depth]) in tree for depth in range(1, path.count("/") + 1))
    }


TREES = st.dictionaries(NAMES, ENTRIES, max_size=7).map(possible)


@settings(max_examples=120, deadline=None)
@given(TREES, TREES, st.booleans())
def test_git_makes_any_returned_tree(old: Tree, new: Tree, with_hunks: bool) -> None:
    patch = b"".join(as_patch(review_of(old, new, with_hunks=with_hunks), Memory(old), Memory(new)))
    assert applied(old, patch) == new


def test_names_are_written_as_git_does() -> None:
    """Read back by git in the tests above; here: nothing in them could reach a terminal as it is."""
    assert quoted_name(b"a/src/x_1.py") == b"a/src/x_1.py"
    assert quoted_name(b'\x1b]0;"\\\n\xc3\xa9\xff\x7f ') == b'"\\033]0;\\"\\\\\\n\\303\\251\\377\\177 "'


def test_what_cannot_be_in_it_is_named_and_the_rest_applies() -> None:
    old: Tree = {"a": File(b"a\n"), "gone\x1b": File(b"\0old"), "k": File(b"k\n")}
    new: Tree = {"a": File(b"b\n"), "gone\x1b": File(b"\0new"), "k": Link("a")}
    review = review_of(old, new)
    pipe = FileChange("pipe", "added", None, Item("other", 0o644))
    unsent = FileChange("unsent", "added", None, Item("file", 0o644, 5, None))
    review = Review(review.digest, (*review.changes, pipe, unsent))
    patch = b"".join(as_patch(review, Memory({"a": old["a"]}), Memory(new)))
    assert b"# vmsandbox: not in this patch: gone\\x1b: its bytes are not there\n" in patch
    assert b"not in this patch: k: its bytes" in patch
    assert b"not in this patch: pipe: not a file, folder or link\n" in patch
    assert b"not in this patch: unsent: its bytes" in patch
    assert applied(old, patch) == {**old, "a": new["a"]}


def test_a_copy_that_did_not_travel_is_in_it() -> None:
    old: Tree = {"a": File(b"\0bytes")}
    new: Tree = {**old, "b": File(b"\0bytes")}
    assert applied(old, b"".join(as_patch(review_of(old, new), Memory(old), Memory()))) == new


def test_other_bytes_than_the_reviewed_are_refused() -> None:
    old: Tree = {}
    new: Tree = {"a": File(b"\0reviewed")}
    contents = Memory(new)
    contents.blobs = dict.fromkeys(contents.blobs, b"\0swapped!")
    with pytest.raises(RefusedError, match="not those that were reviewed"):
        b"".join(as_patch(review_of(old, new), Memory(), contents))


def test_the_large_go_through_in_pieces() -> None:
    data = os.urandom(3 << 20) + b"\0" * (3 << 20)
    new: Tree = {"large": File(data)}
    pieces = list(as_patch(review_of({}, new), Memory(), Memory(new)))
    assert max(map(len, pieces)) < 2 << 20
    assert applied({}, b"".join(pieces)) == new
    assert with_folders(new) == new
