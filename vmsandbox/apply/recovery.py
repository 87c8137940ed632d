"""Brings a project back to a whole tree after an apply that was killed, and keeps two applies apart.

A staging folder that is there while nobody holds the lock belongs to a process that is no more. Its journal says
whether anything was begun (`vmsandbox.apply.record`); what was begun and not done is undone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmsandbox.apply.folders import Folders, names_in
from vmsandbox.apply.plan import Step
from vmsandbox.apply.staging import Staging, UnknownFolderError, make_durable, staging_names
from vmsandbox.apply.undo import undo
from vmsandbox.errors import HostError, UserInputError
from vmsandbox.failpoints import failpoint
from vmsandbox.review.text import shown

_POLL = 0.05
_REASONS = {
    errno.ENOSPC: ("the project's disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room"),
    errno.EROFS: ("the project lies on a read-only file system", "make it writable"),
    errno.EACCES: ("the project may not be written to", "give yourself permission to write there"),
    errno.EPERM: ("the project may not be written to", "look for immutable files (`lsattr`)"),
    errno.EXDEV: (
        "another file system is mounted inside the project",
        "accept what lies on it apart, from its own folder",
    ),
    errno.EIO: ("the project's disk reports an error", "look at the kernel's log (`dmesg`)"),
}


class UnfinishedError(HostError):
    """A project is between the old and the new tree and cannot be brought back now. The old files are safe."""


@dataclass(frozen=True)
class Recovered:
    """What one unfinished apply had left.

    label: who did it ("" if it had not come so far). outcome: finished: all its changes are in the project.
    undone: some were, and are not any more. nothing: it had not begun to change the project.
    paths: what it was to change. newer: somebody's newer work at these paths, left there or beside.
    """

    label: str
    outcome: Literal["finished", "undone", "nothing"]
    paths: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()


def pending(root: Path) -> list[str]:
    """Names of staging folders in this project: of an apply at work, or of one that was killed."""
    with os_errors(), opened(root) as root_fd:
        return staging_names(root_fd)


def recover(root: Path, *, wait: float = 10.0) -> tuple[Recovered, ...]:
    """Make the project whole again; empty if it is (the usual case, which costs one listing and takes no lock).

    Raises:
        UnfinishedError: it cannot be made whole now.
        HostError: a staging folder is damaged, or not ours; nothing of it was touched.
        UserInputError: an apply is at work.
    """
    if not pending(root):
        return ()
    with locked(root, wait) as root_fd:
        return recover_all(root, root_fd)


def recover_all(root: Path, root_fd: int) -> tuple[Recovered, ...]:
    """`recover` for who holds the lock."""
    found = (_recover_one(root, root_fd, name) for name in staging_names(root_fd))
    return tuple(one for one in found if one is not None)


def _recover_one(root: Path, root_fd: int, name: str) -> Recovered | None:
    place = shown(os.fspath(root / name))
    try:
        with os_errors(), Staging.existing(root_fd, name) as staging:
            state = staging.state
            if state in (None, "journal.part"):
                was_used = bool(names_in(staging.fd))
                staging.remove()
                return Recovered("", "nothing") if was_used else None
            label, steps = staging.read(state)
            paths = tuple(sorted({step.path for step in steps}))
            if state == "journal":
                with Folders(root_fd) as folders:
                    newer = roll_back(folders, staging, steps)
                return Recovered(label, "undone", paths, newer)
            os.fsync(staging.fd)  # the process may have died before it was durable
            staging.remove()
            return Recovered(label, "finished" if state == "done" else "undone", paths)
    except (UnknownFolderError, ValueError) as problem:
        raise HostError(
            f"an unfinished apply cannot be read: {place}",
            details=f"{problem}; nothing of it was touched",
            resolution="it may hold the only copy of old files: look into it, then remove it yourself",
        ) from None


def roll_back(folders: Folders, staging: Staging, steps: Sequence[Step]) -> tuple[str, ...]:
    """Undo what was begun, if anything was, and remove the staging folder. Returns paths of newer work.

    Raises:
        UnfinishedError: not all of it could be undone; the staging folder stays.
    """
    newer: tuple[str, ...] = ()
    try:
        if staging.state == "done":
            staging.mark("done", "journal")
        if staging.state == "journal":
            result = undo(folders, staging, steps)
            newer = tuple(result.newer)
            failpoint("undo.all")
            if result.stuck:
                raise _unfinished(staging, "\n".join(result.stuck))
            make_durable(folders, staging, steps)
            failpoint("undo.durable")
            staging.mark("journal", "undone")
    except OSError as error:
        raise _unfinished(staging, str(error)) from error
    with suppress(OSError):  # rubbish: the next recovery removes it
        staging.remove()
    return newer


def _unfinished(staging: Staging, details: str) -> UnfinishedError:
    return UnfinishedError(
        "the changes could not be applied, and could not be undone completely",
        details=f"{details}\nthe old files are safe in {staging.name}/ in the project's folder",
        resolution="mend what the details name (put a moved folder back, make room), then start any session in the "
        "project: it is recovered first",
    )


@contextmanager
def opened(root: Path) -> Iterator[int]:
    """The project's folder, open. Raises OSError."""
    # The one place where a link may be followed: the person's own way to the project.
    fd = os.open(root.resolve(strict=True), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(root: Path, wait: float) -> Iterator[int]:
    """The project's folder, open, and no other apply at work in it. The lock goes with the process.

    Raises:
        UserInputError: another apply was at work for `wait` seconds.
        HostError: it cannot be opened or locked.
    """
    with os_errors(), opened(root) as fd:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserInputError(
                        "another vmsandbox is applying changes to this project",
                        details=os.fspath(root),
                        resolution="wait until it is done, and try again",
                    ) from None
                time.sleep(_POLL)
        yield fd


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn what the system refuses into an error that a person can act on."""
    try:
        yield
    except OSError as error:
        brief, resolution = _REASONS.get(error.errno or 0, ("the project cannot be read or written", "see the details"))
        raise HostError(
            brief, details=shown(str(error)), resolution=f"{resolution}, and try again; nothing was changed"
        ) from error
