"""Turns what was accepted of a review into exact bytes: one operation a path, and a tree that holds together.

An approval means nothing if it is for another review, if a piece of it can be blocked and taken all the same, or
if taking half of a change puts a file where a link or another file is. All of that is refused here, before anything
is written; nothing here writes into the project.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.review.linediff import MAX_BYTES, apply_hunks
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.text import shown
from vmsandbox.review.values import Choice, Contents, FileChange, Operation, Review, Selection
from vmsandbox.spec import Accept

_LISTED = 10  # paths in an error


class Store(Protocol):
    """Where bytes go that the host composed (a file with some of its hunks)."""

    def put(self, data: bytes) -> str:
        """Keep the bytes; returns their SHA-256 in lower-case hexadecimal."""


def operations(
    review: Review, selection: Selection, pushed: Manifest, contents_old: Contents, store: Store
) -> tuple[Operation, ...]:
    """What has to be written for what was accepted, in an order in which it can be done one by one.

    First all that goes, what is in a folder before the folder; then all that comes or changes, a folder before
    what is in it. A rename is both. A new folder is made for an accepted file in it, chosen or not. Hunks change
    the text alone: a new mode comes only with the whole change.

    Raises:
        RefusedError: the selection is for another review, or has a change that is blocked or cannot be taken.
        UserInputError: a path or hunk that the review does not have, or choices that do not fit together.
    """
    _refuse_what_is_blocked(review, selection)
    by_path = {change.path: change for change in review.changes}
    found: dict[str, Operation] = {}
    for choice in selection.choices:
        for operation in _chosen(by_path[choice.path], choice, contents_old, store):
            found[operation.path] = operation
    _bring_folders(found, by_path, pushed)
    _refuse_what_does_not_fit(found, pushed)
    goes = sorted((one for one in found.values() if one.after is None), key=_order, reverse=True)
    comes = sorted((one for one in found.values() if one.after is not None), key=_order)
    return (*goes, *comes)


def selection_of(review: Review, accept: Accept) -> Selection:
    """What `--accept` takes without a person looking: nothing, what has no risk, or all that is not blocked.

    `safe` takes nothing if the review as a whole has a finding, and never a deletion or a change of kind,
    whatever was found about it. What would not fit together without the rest stays out too.
    """
    wanted: Iterable[FileChange] = ()
    if accept is Accept.SAFE and not review.findings:
        plain = ("added", "modified", "renamed", "mode_changed")
        wanted = (one for one in review.changes if one.sort in plain and not one.findings)
    elif accept is Accept.ALL and not any(one.blocks for one in review.findings):
        wanted = review.changes
    taken = holding_together(review, (one.path for one in wanted if can_be_taken(one)))
    return Selection(review.digest, tuple(Choice(one.path) for one in review.changes if one.path in taken))


def holding_together(review: Review, wanted: Iterable[str]) -> frozenset[str]:
    """The wanted changes without those that cannot be had without an unwanted one.

    What lies where a folder would have to come stays out, unless that is a new folder without a finding (it comes
    along); and a folder does not go if something in it stays.
    """
    taken = set(wanted)
    left = [change for change in review.changes if change.path not in taken]
    no_folders: set[str] = set()  # paths where a folder would come, but does not
    while left:
        no_folders.update(change.path for change in left if not (_was_folder(change) or _is_plain_new_folder(change)))
        kept_in: set[str] = set()  # folders that have to stay
        for change in left:
            kept_in.update(parents_of(change.old_path or change.path))
        left = [
            change
            for change in review.changes
            if change.path in taken
            and (
                not no_folders.isdisjoint(parents_of(change.path)) or (change.path in kept_in and _ends_folder(change))
            )
        ]
        taken.difference_update(change.path for change in left)
    return frozenset(taken)


def can_be_taken(change: FileChange) -> bool:
    """Whether it can be accepted at all: not blocked, and something that the host could write."""
    return not change.blocked and _missing(change) == ""


def why_not(change: FileChange) -> str:
    """Why it cannot be accepted, safe to show; empty if it can."""
    blocking = [one.text for one in change.findings if one.blocks]
    return "; ".join(blocking) if blocking else _missing(change)


def parents_of(path: str) -> Iterator[str]:
    """The folders that a path lies in, the nearest first."""
    while path := path.rpartition("/")[0]:
        yield path


def _missing(change: FileChange) -> str:
    after = change.after
    if after is None:
        return ""
    if after.kind == "other":
        return "it is no file, folder or link"
    if after.kind == "file" and after.sha256 is None:
        return "the guest did not send its content"
    return ""


def _refuse_what_is_blocked(review: Review, selection: Selection) -> None:
    if selection.digest != review.digest:
        raise RefusedError(
            "what was accepted is not what is there now",
            details=f"accepted: {shown(selection.digest, 64)}\nthere now: {review.digest}",
            resolution="review the changes again",
        )
    blocking = [one.text for one in review.findings if one.blocks]
    if blocking and selection.choices:
        raise RefusedError("nothing of these changes can be accepted", details="\n".join(blocking))
    by_path = {change.path: change for change in review.changes}
    seen: set[str] = set()
    for path, _ in selection.choices:
        if path not in by_path:
            raise UserInputError(
                f"there is no change of {shown(path, 200)}", resolution="name paths as the list of changes does"
            )
        if path in seen:
            raise UserInputError(f"chosen twice: {shown(path, 200)}")
        seen.add(path)
        if not can_be_taken(by_path[path]):
            raise RefusedError(
                f"{shown(path, 200)} cannot be accepted",
                details=why_not(by_path[path]),
                resolution="change it in the guest, or leave it out",
            )


def _chosen(change: FileChange, choice: Choice, contents_old: Contents, store: Store) -> Iterator[Operation]:
    if choice.hunks is None:
        if change.old_path is not None:
            yield Operation(change.old_path, change.before, None)
            yield Operation(change.path, None, change.after)
        else:
            yield Operation(change.path, change.before, change.after)
        return
    count = len(change.hunks or ())
    numbers = set(choice.hunks)
    if not numbers or len(numbers) != len(choice.hunks) or not numbers.issubset(range(count)):
        raise UserInputError(
            f"{shown(change.path, 200)} has no such hunks", details=f"chosen: {choice.hunks}; there are {count}"
        )
    if change.sort == "modified" and change.before is not None and change.hunks is not None:
        data = apply_hunks(_old_bytes(change, contents_old), change.hunks, numbers)
        item = Item("file", change.before.mode, len(data), store.put(data))
        yield Operation(change.path, change.before, item)
    elif len(numbers) == count:
        yield Operation(change.path, change.before, change.after)
    else:
        raise UserInputError(f"{shown(change.path, 200)} can only be taken whole")


def _old_bytes(change: FileChange, contents_old: Contents) -> bytes:
    """The file as it was pushed: what the hunks are hunks of."""
    sha256 = change.before.sha256 if change.before else None
    stream = contents_old.open(sha256) if sha256 else None
    if stream is not None:
        with stream:
            data = stream.read(MAX_BYTES + 1)
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise RefusedError(
        f"{shown(change.path, 200)} on the host is not what the guest was given: single hunks cannot be taken",
        resolution="take the whole change, or review again once the file is as it was",
    )


def _bring_folders(found: dict[str, Operation], by_path: Mapping[str, FileChange], pushed: Manifest) -> None:
    """Add the new folders that accepted entries need."""
    for path in [one.path for one in found.values() if one.after is not None]:
        for parent in parents_of(path):
            if parent in found or parent in pushed.items:
                break
            change = by_path.get(parent)
            if change is None or change.after is None or change.after.kind != "dir" or not can_be_taken(change):
                raise UserInputError(
                    f"{shown(path, 200)} cannot be taken without its folder {shown(parent, 200)}",
                    details=why_not(change) if change else "",
                )
            found[parent] = Operation(parent, None, change.after)


def _refuse_what_does_not_fit(found: Mapping[str, Operation], pushed: Manifest) -> None:
    """Every entry of the tree that would come out lies in a folder of that tree."""

    def is_folder(path: str) -> bool:
        item = found[path].after if path in found else pushed.items.get(path)
        return item is not None and item.kind == "dir"

    unfit = [
        path
        for path, operation in found.items()
        if operation.after is not None and (parent := path.rpartition("/")[0]) and not is_folder(parent)
    ]
    if unfit:
        raise UserInputError(
            "some of the choices need a folder where something else is",
            details=_list(unfit),
            resolution="take the change of what is in its place as well",
        )
    no_folders = {path for path, operation in found.items() if _ends_folder(operation)}
    if not no_folders:
        return
    left = [
        path
        for path in pushed.items
        if path.rpartition("/")[0] in no_folders and not (path in found and found[path].after is None)
    ]
    if left:
        raise UserInputError(
            "a folder can only go if all that is in it goes",
            details=f"not accepted as deleted:\n{_list(left)}",
            resolution="accept these deletions too, or leave the folder",
        )


def _ends_folder(change: FileChange | Operation) -> bool:
    """Whether a folder is no folder any more after it."""
    return _was_folder(change) and (change.after is None or change.after.kind != "dir")


def _is_plain_new_folder(change: FileChange) -> bool:
    return change.sort == "added" and change.after is not None and change.after.kind == "dir" and not change.findings


def _was_folder(change: FileChange | Operation) -> bool:
    return change.before is not None and change.before.kind == "dir"


def _list(paths: list[str]) -> str:
    listed = [shown(path, 200) for path in sorted(paths, key=os.fsencode)[:_LISTED]]
    return "\n".join(listed + ([f"and {len(paths) - _LISTED} more"] if len(paths) > _LISTED else []))


def _order(operation: Operation) -> bytes:
    return os.fsencode(operation.path)
