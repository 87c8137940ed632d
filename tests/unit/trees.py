"""Trees in memory for the tests of the way back: manifests, contents and a review without findings."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vmsandbox.review.changes import compare
from vmsandbox.review.linediff import hunks_of
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.values import FileChange, Finding, Hunk, Review


class File(NamedTuple):
    data: bytes
    mode: int = 0o644


class Link(NamedTuple):
    target: str


class Folder(NamedTuple):
    mode: int = 0o755


Tree = Mapping[str, File | Link | Folder]


class Memory:
    """Contents, and a store of what the host composed, in memory."""

    def __init__(self, *trees: Tree) -> None:
        self.blobs: dict[str, bytes] = {}
        for tree in trees:
            for entry in tree.values():
                if isinstance(entry, File):
                    self.put(entry.data)

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return sha256

    def open(self, sha256: str) -> BinaryIO | None:
        data = self.blobs.get(sha256)
        return None if data is None else io.BytesIO(data)


def item_of(entry: File | Link | Folder) -> Item:
    if isinstance(entry, File):
        return Item("file", entry.mode, len(entry.data), hashlib.sha256(entry.data).hexdigest())
    if isinstance(entry, Link):
        return Item("symlink", 0, target=entry.target)
    return Item("dir", entry.mode)


def with_folders(tree: Tree) -> dict[str, File | Link | Folder]:
    """The tree and the folders that its paths need."""
    full = dict(tree)
    for path in tree:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            full.setdefault("/".join(parts[:depth]), Folder())
    return full


def manifest_of(tree: Tree) -> Manifest:
    return Manifest({path: item_of(entry) for path, entry in with_folders(tree).items()})


def review_of(
    old: Tree,
    new: Tree,
    findings: Mapping[str, tuple[Finding, ...]] | None = None,
    whole: tuple[Finding, ...] = (),
    with_hunks: bool = True,
) -> Review:
    """A review of two trees; findings by path; those with findings first, in the order in which they are given."""
    findings = findings or {}
    pushed, returned = manifest_of(old), manifest_of(new)
    found = compare(pushed, returned)

    def hunks(path: str) -> tuple[Hunk, ...] | None:
        sides = [tree.get(path, File(b"")) for tree in (old, new)]
        if not with_hunks or not all(isinstance(side, File) for side in sides):
            return None
        before, after = (side.data for side in sides if isinstance(side, File))
        return hunks_of(before, after)

    def change(
        path: str, sort: str, before: Item | None, after: Item | None, old_path: str | None = None
    ) -> FileChange:
        is_file = (after or before or Item("other", 0)).kind == "file" and sort in ("added", "modified", "deleted")
        return FileChange(path, sort, before, after, old_path, findings.get(path, ()), hunks(path) if is_file else None)  # type: ignore[arg-type]

    changes = [
        *(change(path, "added", None, item) for path, item in found.added),
        *(change(path, "modified", before, after) for path, before, after in found.modified),
        *(change(path, "deleted", item, None) for path, item in found.deleted),
        *(change(path, "mode_changed", before, after) for path, before, after in found.mode_changed),
        *(change(one.new, "renamed", one.before, one.after, one.old) for one in found.renamed),
        *(change(path, "kind_changed", before, after) for path, before, after in found.kind_changed),
    ]
    order = list(findings)
    changes.sort(key=lambda one: (order.index(one.path) if one.path in order else len(order), os.fsencode(one.path)))
    return Review(returned.digest, tuple(changes), whole)


def write_tree(folder: Path, tree: Tree) -> None:
    for path, entry in sorted(with_folders(tree).items(), key=lambda one: os.fsencode(one[0])):
        at = folder / path
        if isinstance(entry, Folder):
            at.mkdir(exist_ok=True)
        elif isinstance(entry, Link):
            at.symlink_to(entry.target)
        else:
            at.write_bytes(entry.data)
            at.chmod(entry.mode)


def read_tree(folder: Path) -> dict[str, File | Link]:
    """Files (0644 or 0755, as git knows them) and links."""
    tree: dict[str, File | Link] = {}
    for at in folder.rglob("*"):
        path = str(at.relative_to(folder))
        if at.is_symlink():
            tree[path] = Link(os.readlink(at))
        elif at.is_file():
            tree[path] = File(at.read_bytes(), 0o755 if at.stat().st_mode & 0o100 else 0o644)
    return tree
