"""Two manifests compared."""

from __future__ import annotations

import json
import os
import random

from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.review.changes import Changes, compare
from vmsandbox.review.manifest import Item, Manifest


def file(content: str, mode: int = 0o644) -> Item:
    return Item("file", mode, len(content), content.encode().hex().ljust(64, "0"))


DIR = Item("dir", 0o755)


def changes(before: dict[str, Item], after: dict[str, Item]) -> Changes:
    return compare(Manifest(before), Manifest(after))


def test_nothing_changed() -> None:
    tree = {"a": file("1"), "d": DIR, "l": Item("symlink", 0, target="a")}
    assert changes(tree, dict(tree)).is_empty
    assert changes({}, {}).is_empty


def test_each_sort() -> None:
    found = changes(
        {
            "same": file("s"), "edited": file("1"), "gone": file("2"), "script": file("3"),
            "moved": file("4"),
            "to-link": file("5"), "link": Item("symlink", 0, target="same"), "d": DIR, "both": file("6"),
        },
        {
            "same": file("s"), "edited": file("x"), "new": file("7"), "script": file("3", 0o755), "sub": DIR,
            "sub/moved": file("4", 0o600), "to-link": Item("symlink", 0, target="/etc"),
            "link": Item("symlink", 0, target="edited"), "d": Item("dir", 0o700), "both": file("y", 0o755),
            "pipe": Item("other", 0o600),
        },
    )  # fmt: skip
    assert [one.path for one in found.added] == ["new", "pipe", "sub"]
    assert [one.path for one in found.modified] == ["both", "edited", "link"]
    assert [one.path for one in found.deleted] == ["gone"]
    assert [one.path for one in found.mode_changed] == ["d", "script"]
    assert [(one.old, one.new, one.after.mode) for one in found.renamed] == [("moved", "sub/moved", 0o600)]
    assert [one.path for one in found.kind_changed] == ["to-link"]
    assert sum(found.counts.values()) == 11 and not found.is_empty


def test_a_file_that_the_guest_could_not_read_counts_as_modified() -> None:
    assert [one.path for one in changes({"a": file("1")}, {"a": Item("file", 0, 1, None)}).modified] == ["a"]


def test_renames_pair_the_same_name_first_then_in_order_whatever_the_order_given() -> None:
    before = {"old/x.py": file("1"), "old/y.py": file("1"), "old/z.py": file("1")}
    after = {"new/a.py": file("1"), "new/y.py": file("1"), "new/b.py": file("1"), "new/c.py": file("1")}
    expected = [("old/x.py", "new/a.py"), ("old/z.py", "new/b.py"), ("old/y.py", "new/y.py")]
    for seed in range(10):
        shuffle = random.Random(seed)
        one, other = list(before.items()), list(after.items())
        shuffle.shuffle(one)
        shuffle.shuffle(other)
        found = changes(dict(one), dict(other))
        assert [(pair.old, pair.new) for pair in found.renamed] == expected
        assert [added.path for added in found.added] == ["new/c.py"]


def test_empty_files_and_copies_are_no_renames() -> None:
    found = changes({"a": file(""), "k": file("1")}, {"b": file(""), "k": file("1"), "copy": file("1")})
    assert not found.renamed
    assert [one.path for one in found.added] == ["b", "copy"] and [one.path for one in found.deleted] == ["a"]


def test_json_is_ascii_and_exact() -> None:
    name = os.fsdecode(b"\x1b[31m\xff") + "\u202e"
    text = json.dumps(
        changes({"l": Item("symlink", 0, target="a"), "m": file("1")}, {name: file("1", 0o755)}).as_json()
    )
    assert text.isascii() and text.isprintable()
    data = json.loads(text)
    assert data["renamed"][0]["path"] == name and data["renamed"][0]["after"]["mode"] == "0755"
    assert data["deleted"] == [{"path": "l", "kind": "symlink", "target": "a"}]
    assert data["counts"] == {
        "added": 0, "modified": 0, "deleted": 1, "mode_changed": 0, "renamed": 1, "kind_changed": 0,
    }  # fmt: skip


ITEMS = st.one_of(
    st.builds(file, st.sampled_from(["", "1", "2"]), st.sampled_from([0o644, 0o755])),
    st.just(DIR),
    st.builds(lambda target: Item("symlink", 0, target=target), st.sampled_from(["x", "y"])),
)
TREES = st.dictionaries(st.sampled_from("abcdefgh"), ITEMS)


@given(TREES, TREES)
def test_the_changes_lead_from_one_to_the_other(before: dict[str, Item], after: dict[str, Item]) -> None:
    found = changes(before, after)
    tree = dict(before)
    for one in found.deleted:
        assert tree.pop(one.path) == one.item
    for pair in found.renamed:
        assert tree.pop(pair.old) == pair.before
    for pair in found.renamed:
        assert pair.new not in tree
        tree[pair.new] = pair.after
    for new in found.added:
        assert new.path not in tree
        tree[new.path] = new.item
    for changed in (*found.modified, *found.mode_changed, *found.kind_changed):
        assert tree[changed.path] == changed.before
        tree[changed.path] = changed.after
    assert tree == after
