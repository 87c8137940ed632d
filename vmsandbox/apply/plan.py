"""What shall be done to a project, checked against what is there, and in which order.

Without it an operation could name `.git/hooks/x`, two could contradict each other, and a file that a person has
changed since it was pushed would be overwritten. Nothing here writes.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vmsandbox.apply.folders import Folders, NotAFolderError, full_mode, names_in, observe
from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.review.manifest import Item, checked_path
from vmsandbox.review.text import shown
from vmsandbox.review.values import Operation

STAGING_PREFIX = ".vmsandbox-apply-"  # vmsandbox/guest/walk.py keeps what begins so out of a push
_DEPTH = 128
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Code points that HFS+ ignores in a name (git: utf8.c, next_hfs_char): `.g<ZWNJ>it` is `.git` there.
_IGNORED = dict.fromkeys(
    [*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF]
)  # str.translate removes them
_KINDS = {"file": "a file", "dir": "a folder", "symlink": "a link", "other": "something else"}

Sort = Literal["modified", "deleted", "appeared", "kind changed", "mode changed", "no folder", "not empty", "in use"]


class Conflict(NamedTuple):
    """What on the host is not (any more) as it has to be. text: for people, without the path, safe to show."""

    path: str
    sort: Sort
    text: str


class ConflictError(UserInputError):
    """The project is not as it was pushed; nothing of it was changed."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__(
            f"the project has changed meanwhile: {len(conflicts)} "
            + ("path is in conflict" if len(conflicts) == 1 else "paths are in conflict"),
            details="\n".join(f"{shown(one.path)}: {one.text}" for one in conflicts),
            resolution="nothing was changed; leave these paths out, or put back what was pushed, and accept again",
        )


class Step(NamedTuple):
    """One change of one name, the unit of undoing.

    number: of the operation: how what it needs or saves is called in the staging folder.
    act: out: what is there is moved to `old/`. in: moved there from `new/`. swap: exchanged with what is in
    `new/`. mode: chmod. was: all twelve bits that the mode had, of act "mode".
    """

    number: int
    act: Literal["out", "in", "swap", "mode"]
    path: str
    before: Item | None
    after: Item | None
    was: int = 0


@dataclass
class Look:
    """What a look at the project found.

    already: paths that are as they shall be. kept: folders to be deleted that hold something that was not
    pushed, and so stay. modes: all twelve mode bits of what is there.
    """

    conflicts: list[Conflict] = field(default_factory=list)
    already: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    modes: dict[str, int] = field(default_factory=dict)


def checked(operations: Sequence[Operation]) -> list[Operation]:
    """The operations that change something, folders before what is in them.

    Raises:
        RefusedError: one names what may never be written, whoever asks for it, or they contradict each other.
    """
    by_path: dict[str, Operation] = {}
    for one in operations:
        problem = _problem(one) or ("it is there twice" if one.path in by_path else None)
        if problem:
            raise _refused(one.path, problem)
        by_path[one.path] = one
    for one in operations:
        folder = one.path.rpartition("/")[0]
        while folder:
            above = by_path.get(folder)
            if above and one.after and not (above.after and above.after.kind == "dir"):
                raise _refused(one.path, "it would lie in a folder that another operation removes")
            folder = folder.rpartition("/")[0]
    return sorted((one for one in operations if one.before != one.after), key=lambda one: one.path.split("/"))


def is_forbidden_name(name: str) -> bool:
    """Whether a component is git's own folder or a staging folder of ours, also as other file systems spell it."""
    folded = name.translate(_IGNORED).partition(":")[0].rstrip(" .").casefold()  # NTFS: `.git::$INDEX_ALLOCATION`
    return folded in (".git", "git~1") or folded.startswith(STAGING_PREFIX)


def _problem(operation: Operation) -> str | None:
    try:
        path = checked_path(operation.path, _DEPTH)
    except ValueError as error:
        return str(error)
    if any(is_forbidden_name(name) for name in path.split("/")):
        return "git's own folder and vmsandbox's are never written to"
    for item in (operation.before, operation.after):
        if item is None:
            continue
        if item.kind == "other":
            return "only files, folders and links are written or replaced"
        if item.mode & ~0o777:
            return f"mode {item.mode:o}: only permission bits may be set"
        if item.kind == "file" and not (item.sha256 and _SHA256.fullmatch(item.sha256) and item.size >= 0):
            return "a file without a digest"
        if item.kind == "symlink" and (not item.target or "\0" in item.target or len(os.fsencode(item.target)) > 4095):
            return "a link without a proper target"
    return None


def _refused(path: str, why: str) -> RefusedError:
    return RefusedError(
        f"will not be written: {shown(path, 200)}", details=why, resolution="nothing was changed; leave it out"
    )


def look(folders: Folders, operations: Sequence[Operation]) -> Look:
    """Compare what is there with what each operation expects. `operations` as from `checked`.

    Raises:
        OSError: something cannot be read.
    """
    result = Look()
    made: set[str] = set()  # folders that are not there yet
    for one in operations:
        is_new_folder = (
            one.after is not None and one.after.kind == "dir" and (not one.before or one.before.kind != "dir")
        )
        if one.path.rpartition("/")[0] in made:
            found = None
        else:
            try:
                fd, name = folders.parent(one.path)
            except NotAFolderError as problem:
                if one.after is None and (problem.missing or problem.path in result.already):
                    result.already.add(one.path)  # nothing there, as it shall be
                else:
                    result.conflicts.append(Conflict(one.path, "no folder", f"{shown(problem.path)}: {problem.why}"))
                continue
            found = observe(fd, name, (one.before, one.after))
            if found is not None:
                result.modes[one.path] = full_mode(fd, name)
        if found == one.after:
            result.already.add(one.path)
            continue
        if is_new_folder:
            made.add(one.path)
        if found != one.before:
            result.conflicts.append(_conflict(one, found))
    _look_into_folders(folders, operations, result)
    return result


def _look_into_folders(folders: Folders, operations: Sequence[Operation], result: Look) -> None:
    """Find folders that shall go and hold something that nobody decided about (ignored by git, a secret)."""
    leaving: dict[str, set[str]] = defaultdict(set)
    conflicting = {one.path for one in result.conflicts}
    for one in reversed(operations):  # what is in a folder before the folder
        if one.before is None or one.path in result.already or one.path in conflicting:
            continue
        if one.before.kind == "dir" and (one.after is None or one.after.kind != "dir"):
            try:
                stays = sorted(set(names_in(folders.fd(one.path))) - leaving[one.path])
            except NotAFolderError as problem:
                result.conflicts.append(Conflict(one.path, "no folder", problem.why))
                continue
            if stays and one.after is None:
                result.kept.add(one.path)
                continue
            if stays:
                text = f"the folder holds what was not pushed: {', '.join(shown(name, 80) for name in stays[:5])}"
                result.conflicts.append(Conflict(one.path, "not empty", text))
        if one.after is None:
            folder, _, name = one.path.rpartition("/")
            leaving[folder].add(name)


def _conflict(operation: Operation, found: Item | None) -> Conflict:
    before = operation.before
    if before is None:
        assert found is not None
        return Conflict(operation.path, "appeared", f"{_KINDS[found.kind]} appeared there since the push")
    if found is None:
        return Conflict(operation.path, "deleted", f"{_KINDS[before.kind]} was deleted there since the push")
    if found.kind != before.kind:
        text = f"{_KINDS[before.kind]} became {_KINDS[found.kind]} since the push"
        return Conflict(operation.path, "kind changed", text)
    if found._replace(mode=0) == before._replace(mode=0):
        text = f"its mode became {found.mode:04o} since the push (was {before.mode:04o})"
        return Conflict(operation.path, "mode changed", text)
    return Conflict(operation.path, "modified", "it was modified since the push")


def steps_for(operations: Sequence[Operation], seen: Look) -> list[Step]:
    """The steps in their order: deletions from the inside out, then the rest from the outside in, then the
    modes of folders from the inside out (a folder may become read-only).
    """
    outs: list[Step] = []
    ins: list[Step] = []
    modes: list[Step] = []
    for number, one in enumerate(operations):
        if one.path in seen.already or one.path in seen.kept:
            continue
        before, after = one.before, one.after
        if after is None:
            outs.append(Step(number, "out", one.path, before, None))
        elif before is not None and before._replace(mode=0) == after._replace(mode=0):
            step = Step(number, "mode", one.path, before, after, seen.modes[one.path])
            (modes if after.kind == "dir" else ins).append(step)
        else:
            ins.append(Step(number, "in" if before is None else "swap", one.path, before, _fresh(after)))
            if after.kind == "dir" and after != _fresh(after):
                modes.append(Step(number, "mode", one.path, _fresh(after), after, _fresh(after).mode))
    return [*reversed(outs), *ins, *reversed(modes)]


def _fresh(after: Item) -> Item:
    """As it is put in place: a folder stays open to us until all is in it."""
    return Item("dir", 0o700) if after.kind == "dir" else after


def parents(steps: Iterable[Step]) -> set[str]:
    """The folders in which names change."""
    return {step.path.rpartition("/")[0] for step in steps}
