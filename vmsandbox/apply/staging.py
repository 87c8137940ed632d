"""The staging folder beside the files it is for, and how far the one in it came.

It lies in the project's root because only there a rename is sure to be on the same file system. Its layout and the
meaning of its files are described in `vmsandbox.apply.record`.

Durability: a few files are fsynced one by one. Many are not: ten thousand fsyncs wait for the disk ten thousand times,
while syncfs(2) waits once and since Linux 5.8 reports errors of writing back as fsync does. It also writes what
other programs have not yet written, which is why it is not used for a few.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal

from vmsandbox.apply import kernel, record
from vmsandbox.apply.folders import OPEN_FOLDER, Folders, NotAFolderError, names_in
from vmsandbox.apply.plan import STAGING_PREFIX, Step, parents
from vmsandbox.failpoints import failpoint

State = Literal["journal.part", "journal", "done", "undone"]
STATES: tuple[State, ...] = ("journal", "done", "undone", "journal.part")
_NAME = re.compile(re.escape(STAGING_PREFIX) + r"[0-9a-f]{16}")
_MANY = 64
_MAX_JOURNAL = 1 << 30


class UnknownFolderError(Exception):
    """A folder with our prefix that is not as we leave them: never touched. The text says why."""


class Staging:
    """One staging folder, open. Use as a context: it closes what it opened and removes nothing by itself."""

    def __init__(self, root_fd: int, name: str) -> None:
        self.root_fd = root_fd
        self.name = name
        self.fd = os.open(name, OPEN_FOLDER, dir_fd=root_fd)
        self.new = self.old = -1

    @classmethod
    def create(cls, root_fd: int) -> Staging:
        """A new one. Raises OSError; nothing is left then."""
        name = STAGING_PREFIX + secrets.token_hex(8)
        os.mkdir(name, 0o700, dir_fd=root_fd)
        staging: Staging | None = None
        try:
            staging = cls(root_fd, name)
            os.fchmod(staging.fd, 0o700)  # whatever the umask is
            for part in ("new", "old"):
                os.mkdir(part, 0o700, dir_fd=staging.fd)
            staging.open_parts()
        except BaseException:
            with suppress(OSError):
                if staging:
                    staging.remove()
                    staging.close()
                else:
                    os.rmdir(name, dir_fd=root_fd)
            raise
        return staging

    @classmethod
    def existing(cls, root_fd: int, name: str) -> Staging:
        """One that a process left behind.

        Raises:
            UnknownFolderError: it is not one that we made, or another user did.
            OSError: it cannot be opened.
        """
        try:
            staging = cls(root_fd, name)
        except NotADirectoryError:
            raise UnknownFolderError("it is not a folder") from None
        try:
            status = os.fstat(staging.fd)
            if not _NAME.fullmatch(name):
                raise UnknownFolderError("its name is not one of ours, or of a newer version")
            if status.st_uid != os.geteuid():
                raise UnknownFolderError(f"it belongs to another user ({status.st_uid}), who has to recover it")
            if stat.S_IMODE(status.st_mode) & 0o077:  # one that came with a repository is never 0700
                raise UnknownFolderError("others may enter it: it was not made by vmsandbox")
            unknown = set(names_in(staging.fd)) - {*STATES, "new", "old"}
            if unknown:
                raise UnknownFolderError(f"it holds what vmsandbox does not put there: {sorted(unknown)[0]!r}")
            staging.open_parts()
        except BaseException:
            staging.close()
            raise
        return staging

    def open_parts(self) -> None:
        """Open `new` and `old`, if they are there."""
        with suppress(FileNotFoundError):
            self.new = os.open("new", OPEN_FOLDER, dir_fd=self.fd)
        with suppress(FileNotFoundError):
            self.old = os.open("old", OPEN_FOLDER, dir_fd=self.fd)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.new, self.old, self.fd):
            if fd >= 0:
                os.close(fd)
        self.new = self.old = self.fd = -1

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def state(self) -> State | None:
        """How far it came; None: no journal was begun, or all but the folder is removed."""
        there = set(names_in(self.fd))
        return next((state for state in STATES if state in there), None)

    def read(self, state: State) -> tuple[str, list[Step]]:
        """The journal's label and steps. Raises ValueError (damaged, unknown) or OSError."""
        fd = os.open(state, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        with os.fdopen(fd, "rb") as file:
            return record.parsed(file.read(_MAX_JOURNAL))

    def begin(self, label: str, steps: Sequence[Step]) -> None:
        """Write the journal; when this returns, the steps may be done. Raises OSError."""
        fd = os.open("journal.part", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        with os.fdopen(fd, "wb") as file:
            file.write(record.written(label, steps))
            failpoint("apply.journal-written")
            file.flush()
            os.fsync(fd)
        failpoint("apply.journal-synced")
        self.mark("journal.part", "journal")
        os.fsync(self.root_fd)  # the folder's own name

    def mark(self, before: State, after: State) -> None:
        """Note durably how far it came. Raises OSError."""
        os.rename(before, after, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        failpoint(f"apply.marked-{after}")
        os.fsync(self.fd)

    def remove(self) -> None:
        """Remove it, the journal last. Raises OSError, also if somebody has put something into it."""
        for part, fd in (("new", self.new), ("old", self.old)):
            if fd < 0:
                continue
            for name in names_in(fd):
                failpoint("apply.removing")
                _remove(fd, name)
            with suppress(FileNotFoundError):
                os.rmdir(part, dir_fd=self.fd)
        failpoint("apply.removing-journal")
        for name in names_in(self.fd):
            _remove(self.fd, name)
        failpoint("apply.removing-folder")
        os.rmdir(self.name, dir_fd=self.root_fd)


def staging_names(root_fd: int) -> list[str]:
    """What lies in the project's root under our prefix."""
    return sorted(name for name in names_in(root_fd) if name.startswith(STAGING_PREFIX))


def is_many(count: int) -> bool:
    """Whether so many files are synced all at once."""
    return count > _MANY


def make_durable(folders: Folders, staging: Staging, steps: Sequence[Step]) -> None:
    """Wait until all steps, done or undone, are on the disk. Raises OSError."""
    if is_many(len(steps)):
        kernel.sync_file_system(staging.root_fd)
        return
    for path in sorted(parents(steps)):
        with suppress(NotAFolderError):  # undone: it is not there any more
            os.fsync(folders.fd(path))
    for fd in (staging.new, staging.old):
        os.fsync(fd)
    for step in steps:
        if step.act == "mode":
            with suppress(NotAFolderError):
                _sync_file(*folders.parent(step.path))


def _sync_file(folder_fd: int, name: str) -> None:
    """Sync what has this name, unless it cannot be opened: unreadable, or (undone) a link or nothing again."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
    except OSError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(folder_fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder_fd)
    except IsADirectoryError:
        os.rmdir(name, dir_fd=folder_fd)
