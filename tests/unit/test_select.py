"""From choices to exact bytes: just what was accepted, in an order that works, or a refusal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import File, Folder, Link, Memory, Tree, manifest_of, review_of

from vmsandbox.errors import RefusedError, UserInputError, VmsandboxError
from vmsandbox.review.manifest import Item
from vmsandbox.review.select import holding_together, operations, selection_of
from vmsandbox.review.values import Choice, FileChange, Finding, Operation, Review, Risk, Selection
from vmsandbox.spec import Accept

FLAG = (Finding(Risk.AUTO_EXECUTED, "runs by itself"),)
BLOCK = (Finding(Risk.RULE, "no eval()", 3, blocks=True),)
LINES = b"".join(b"line %d\n" % number for number in range(60))
EDITED = LINES.replace(b"line 3\n", b"three\n").replace(b"line 30\n", b"").replace(b"line 55\n", b"line 55\nmore\n")


def taken(old: Tree, new: Tree, *choices: str | Choice, review: Review | None = None) -> dict[str, Item]:
    """The tree that comes out of the choices, by an applier that does one operation after the other."""
    review = review or review_of(old, new)
    chosen = tuple(Choice(one) if isinstance(one, str) else one for one in choices)
    store = Memory(old)
    made = operations(review, Selection(review.digest, chosen), manifest_of(old), store, store)
    return applied(manifest_of(old).items, made)


def applied(tree: Iterable[tuple[str, Item]] | object, made: Iterable[Operation]) -> dict[str, Item]:
    now: dict[str, Item] = dict(tree)  # type: ignore[call-overload]
    for path, before, after in made:
        assert now.get(path) == before, f"a conflict at {path}"
        inside = [one for one in now if one.startswith(f"{path}/")]
        if before and before.kind == "dir" and (after is None or after.kind != "dir"):
            assert not inside, f"{path} is not empty"
        now.pop(path, None)
        if after is not None:
            parent = path.rpartition("/")[0]
            assert not parent or now[parent].kind == "dir", f"no folder for {path}"
            now[path] = after
    return now


def test_one_file_brings_its_folders_and_nothing_else() -> None:
    old: Tree = {"a": File(b"a\n")}
    new: Tree = {"a": File(b"changed\n"), "d/e/f": File(b"f\n", 0o755), "d/e/g": File(b"g\n"), "h": File(b"")}
    assert taken(old, new, "d/e/f") == manifest_of({**old, "d/e/f": new["d/e/f"]}).items
    assert taken(old, new) == manifest_of(old).items
    assert taken(old, new, "a", "d", "d/e", "d/e/f", "d/e/g", "h") == manifest_of(new).items


def test_hunks_are_composed_and_kept() -> None:
    old: Tree = {"a": File(LINES, 0o755)}
    new: Tree = {"a": File(EDITED, 0o644)}
    review = review_of(old, new)
    store = Memory(old)
    chosen = Selection(review.digest, (Choice("a", (0, 2)),))
    (operation,) = operations(review, chosen, manifest_of(old), store, store)
    expected = LINES.replace(b"line 3\n", b"three\n").replace(b"line 55\n", b"line 55\nmore\n")
    sha256 = hashlib.sha256(expected).hexdigest()
    # The mode stays as it was: nobody was asked about it.
    assert operation == Operation("a", review.changes[0].before, Item("file", 0o755, len(expected), sha256))
    assert store.blobs[sha256] == expected
    assert taken(old, new, Choice("a", (2, 1, 0)))["a"] == manifest_of({"a": File(EDITED, 0o755)}).items["a"]
    assert taken(old, new, "a") == manifest_of(new).items


def test_hunks_need_the_file_that_was_pushed() -> None:
    old: Tree = {"a": File(LINES)}
    review = review_of(old, {"a": File(EDITED)})
    chosen = Selection(review.digest, (Choice("a", (0,)),))
    for contents in (Memory(), Memory(old)):
        contents.blobs = dict.fromkeys(contents.blobs, LINES + b"edited on the host\n")
        with pytest.raises(RefusedError, match="not what the guest was given"):
            operations(review, chosen, manifest_of(old), contents, Memory())


@pytest.mark.parametrize("hunks", [(), (3,), (-1,), (0, 0), (0, 7)])
def test_hunks_that_are_not_there(hunks: tuple[int, ...]) -> None:
    with pytest.raises(UserInputError, match="no such hunks"):
        taken({"a": File(LINES)}, {"a": File(EDITED)}, Choice("a", hunks))


def test_hunks_of_what_has_none() -> None:
    with pytest.raises(UserInputError, match="no such hunks"):
        taken({"a": File(b"\0")}, {"a": File(b"\0\0")}, Choice("a", (0,)))


def test_a_rename_goes_and_comes() -> None:
    old: Tree = {"d/a": File(b"same\n"), "d/b": File(b"b\n")}
    new: Tree = {"e/a": File(b"same\n", 0o755), "d/b": File(b"b\n")}
    assert taken(old, new, "e/a") == manifest_of(new).items


def test_another_review_is_refused() -> None:
    old: Tree = {"a": File(b"a\n")}
    review = review_of(old, {"a": File(b"b\n")})
    with pytest.raises(RefusedError, match="not what is there now"):
        operations(review, Selection("0" * 64, (Choice("a"),)), manifest_of(old), Memory(), Memory())


@pytest.mark.parametrize("choice", [Choice("a"), Choice("a", (0,))])
def test_blocked_is_blocked(choice: Choice) -> None:
    old: Tree = {"a": File(LINES), "b": File(b"")}
    new: Tree = {"a": File(EDITED), "b": File(b"b\n")}
    review = review_of(old, new, {"a": BLOCK})
    with pytest.raises(RefusedError, match="a cannot be accepted") as raised:
        taken(old, new, choice, review=review)
    assert raised.value.details == "no eval()"
    with pytest.raises(RefusedError, match="nothing of these"):
        taken(old, new, "b", review=review_of(old, new, whole=BLOCK))


def test_what_the_guest_did_not_send_is_refused() -> None:
    for item in (Item("file", 0o644, 5, None), Item("other", 0o644)):
        review = Review("0" * 64, (FileChange("a\x1b", "added", None, item),))
        with pytest.raises(RefusedError, match=r"a\\x1b cannot be accepted"):
            taken({}, {}, "a\x1b", review=review)


@pytest.mark.parametrize("paths", [("b",), ("a/../a",), ("",), ("a", "a")])
def test_unknown_and_doubled_paths(paths: tuple[str, ...]) -> None:
    with pytest.raises(UserInputError, match=r"there is no change of|chosen twice"):
        taken({"a": File(b"a\n"), "b": File(b"")}, {"a": File(b"b\n"), "b": File(b"")}, *paths)


GONE: Tree = {"d/a": File(b"a\n"), "d/b/c": File(b"c\n"), "d/m": File(b"moved\n"), "k": File(b"k\n")}


@pytest.mark.parametrize("place", [{}, {"d": File(b"file\n")}, {"d": Link("k")}])
def test_a_folder_goes_only_with_all_in_it(place: Tree) -> None:
    new: Tree = {**place, "k": File(b"k\n"), "m": File(b"moved\n")}
    everything = ["d", "d/a", "d/b", "d/b/c", "m"]
    assert taken(GONE, new, *everything) == manifest_of(new).items
    for left_out in everything[1:]:
        with pytest.raises(UserInputError, match="only go if all that is in it goes"):
            taken(GONE, new, *(path for path in everything if path != left_out))
    assert "d" in taken(GONE, new, "d/a", "d/b/c", "d/b", "m")


@pytest.mark.parametrize("there", [File(b"file\n"), Link("/etc")])
def test_nothing_is_put_below_a_file_or_link_that_stays(there: File | Link) -> None:
    old: Tree = {"d": there}
    new: Tree = {"d/passwd": File(b"x\n")}
    with pytest.raises(UserInputError, match="need a folder where something else is"):
        taken(old, new, "d/passwd")
    assert taken(old, new, "d/passwd", "d") == manifest_of(new).items


def test_a_blocked_folder_is_not_brought_along() -> None:
    review = review_of({}, {"d/a": File(b"a\n")}, {"d": BLOCK})
    with pytest.raises(UserInputError, match="cannot be taken without its folder d") as raised:
        taken({}, {}, "d/a", review=review)
    assert raised.value.details == "no eval()"


def test_accept_safe_takes_only_what_has_no_risk() -> None:
    old: Tree = {"edit": File(b"a\n"), "gone": File(b"g\n"), "kind": File(b"k\n"), "dir/x": File(b"")}
    new: Tree = {
        "edit": File(b"b\n"), "kind/child": File(b"c\n"), "new/ok": File(b"ok\n"), "flagged": File(b"f\n"),
        "odd/child": File(b"c\n"), "dir": Folder(0o700), "dir/x": File(b"x\n"),
    }  # fmt: skip
    flags = {"flagged": FLAG, "odd": FLAG, "dir": FLAG}
    review = review_of(old, new, flags)
    safe = selection_of(review, Accept.SAFE)
    assert {one.path for one in safe.choices} == {"edit", "new", "new/ok", "dir/x"}
    everything = selection_of(review, Accept.ALL)
    assert taken(old, new, *everything.choices, review=review) == manifest_of(new).items
    assert selection_of(review, Accept.NONE) == Selection(review.digest)
    assert selection_of(review_of(old, new, flags, whole=FLAG), Accept.SAFE).choices == ()
    assert selection_of(review_of(old, new, flags, whole=BLOCK), Accept.ALL).choices == ()


def test_accept_all_leaves_out_what_is_blocked_and_what_hangs_on_it() -> None:
    old: Tree = {"f": File(b"f\n"), "d/a": File(b"a\n"), "d/b": File(b"b\n")}
    new: Tree = {"f/x": File(b"x\n"), "e/b": File(b"b\n"), "z": File(b"z\n")}
    review = review_of(old, new, {"f": BLOCK, "e/b": BLOCK})
    selection = selection_of(review, Accept.ALL)
    # Not f/x: f stays a file. Not the end of d: d/b stays.
    assert {one.path for one in selection.choices} == {"d/a", "e", "z"}
    assert "d/b" in taken(old, new, *selection.choices, review=review)


NAMES = st.sampled_from(["a", "b", "a/b", "a/c", "a/b/c", "b/a", "b/b/b", "é", "\udcff"])
ENTRIES = st.one_of(
    st.builds(File, st.sampled_from([b"", b"x\n", b"y\n", b"\0"]), st.sampled_from([0o644, 0o755])),
    st.builds(Link, st.sampled_from(["a", ".."])),
    st.builds(Folder, st.sampled_from([0o755, 0o700])),
)


def possible(tree: Tree) -> dict[str, File | Link | Folder]:
    """Without what lies below a file or a link."""

    def parents(path: str) -> list[str]:
        parts = path.split("/")
        return ["/".join(parts[:depth]) for depth in range(1, len(parts))]

    return {
        path: entry
        for path, entry in tree.items()
        if all(isinstance(tree.get(parent, Folder()), Folder) for parent in parents(path))
    }


TREES = st.dictionaries(NAMES, ENTRIES, max_size=8).map(possible)


@settings(max_examples=400)
@given(TREES, TREES, st.data())
def test_any_choice_gives_a_whole_tree_or_a_refusal(old: Tree, new: Tree, data: st.DataObject) -> None:
    review = review_of(old, new)
    paths = [one.path for one in review.changes]
    wanted = [path for path in paths if data.draw(st.booleans())]
    pushed, returned = manifest_of(old).items, manifest_of(new).items

    kept = holding_together(review, wanted)
    assert kept <= set(wanted)
    whole = taken(old, new, *kept)  # never a refusal
    moved_away = {one.old_path for one in review.changes if one.path in kept and one.old_path}
    for path in kept:
        assert whole.get(path) == returned.get(path)
    for path in pushed.keys() - kept - moved_away:
        assert whole[path] == pushed[path], f"{path} was not accepted"
    try:
        assert taken(old, new, *wanted) == whole, "nothing was left out without saying so"
    except VmsandboxError:
        assert kept != set(wanted), "a refusal of what fits together"
    assert holding_together(review, paths) == set(paths)
    assert taken(old, new, *paths) == returned
