"""Reaches what is in a project from one open descriptor of its root, and never through a link.

A path that is handed to the kernel whole is resolved anew each time: a folder that somebody swaps for a link to
`~/.ssh` meanwhile would have us write there. Here each component is opened relative to the one above with
O_NOFOLLOW, stays open, and must stay the same folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from types import TracebackType

from vmsandbox.review.manifest import Item

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO swapped in must not block.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_OPEN = 256  # far below the usual RLIMIT_NOFILE of 1024


class NotAFolderError(Exception):
    """A path on the way is no folder that may be entered. Caught where it becomes a conflict.

    path: the component's, relative to the root. missing: there is nothing at all.
    """

    def __init__(self, path: str, why: str, *, missing: bool = False) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why
        self.missing = missing


class Folders:
    """The folders of a project, opened by path from the root's descriptor (which stays the caller's)."""

    def __init__(self, root_fd: int) -> None:
        self.root_fd = root_fd
        self._device = os.fstat(root_fd).st_dev
        self._open: dict[str, int] = {}
        self.identities: dict[str, tuple[int, int]] = {}
        self.take_what_is_there = False  # undoing: a folder that was made anew will do

    def __enter__(self) -> Folders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def fd(self, path: str) -> int:
        """A descriptor of this folder ("" for the root), valid until the next call.

        Raises:
            NotAFolderError: it, or a folder above it, is missing, no folder, not the same as before, or on
                another file system.
        """
        if not path:
            return self.root_fd
        if path in self._open:
            if os.fstat(self._open[path]).st_nlink:
                return self._open[path]
            os.close(self._open.pop(path))  # removed: nothing can be put there any more
        above, _, name = path.rpartition("/")
        above_fd = self.fd(above)
        try:
            fd = os.open(name, OPEN_FOLDER, dir_fd=above_fd)
        except FileNotFoundError:
            raise NotAFolderError(path, "there is no such folder", missing=True) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise NotAFolderError(path, "it is not a folder (any more)") from None
            raise
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        if status.st_dev != self._device:
            os.close(fd)
            raise NotAFolderError(path, "another file system is mounted there")
        if self.identities.setdefault(path, identity) != identity and not self.take_what_is_there:
            os.close(fd)
            raise NotAFolderError(path, "it was replaced by another folder meanwhile")
        if len(self._open) >= _MAX_OPEN:
            os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = fd
        return fd

    def make(self, path: str) -> None:
        """Make this folder, and those above it, where there is nothing. Raises as `fd` does."""
        with suppress(FileExistsError):
            folder, _, name = path.rpartition("/")
            try:
                os.mkdir(name, 0o755, dir_fd=self.fd(folder))
            except NotAFolderError as problem:
                if not problem.missing:
                    raise
                self.make(folder)
                os.mkdir(name, 0o755, dir_fd=self.fd(folder))

    def parent(self, path: str) -> tuple[int, str]:
        """A descriptor of the folder that this path lies in (valid until the next call), and the path's name."""
        folder, _, name = path.rpartition("/")
        return self.fd(folder), name


def observe(folder_fd: int, name: str, like: Collection[Item | None]) -> Item | None:
    """What is there now, or None for nothing. A file is only read if its size is that of one in `like`.

    Raises:
        OSError: it cannot be read.
    """
    try:
        status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        mode = status.st_mode & 0o777
        if stat.S_ISDIR(status.st_mode):
            return Item("dir", mode)
        if stat.S_ISLNK(status.st_mode):
            return Item("symlink", 0, target=os.readlink(name, dir_fd=folder_fd))
        if not stat.S_ISREG(status.st_mode):
            return Item("other", mode)
        if not any(one is not None and one.kind == "file" and one.size == status.st_size for one in like):
            return Item("file", mode, status.st_size)
        fd = os.open(name, _OPEN_FILE, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return Item("other", status.st_mode & 0o777)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Item("file", status.st_mode & 0o777, status.st_size, digest)


def names_in(folder_fd: int) -> list[str]:
    """All names in an open folder. Raises OSError."""
    return os.listdir(folder_fd)


def full_mode(folder_fd: int, name: str) -> int:
    """All twelve mode bits of what is there. Raises OSError."""
    return stat.S_IMODE(os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode)


def set_mode(folder_fd: int, name: str, mode: int) -> None:
    """chmod that follows no link, and needs no permission to read. Raises OSError."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        # An O_PATH descriptor cannot be given to fchmod(2); its name under /proc stands for exactly this file (and not
        # for what it leads to, if it is a link: that has no mode to change, and the kernel says so).
        os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101
    finally:
        os.close(fd)
