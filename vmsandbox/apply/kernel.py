"""What the kernel can do and Python's os module does not offer: rename without replacing, swap two names, sync all.

With plain rename(2) alone, a file that somebody saved between our last look and our rename would be gone. Here
nothing is ever replaced: a name is taken only if it is free, or what it named comes out in exchange and can be
looked at (renameat2(2): RENAME_NOREPLACE, RENAME_EXCHANGE). Where a file system has neither (NFS), link(2) takes
a free name just as safely, and exchanging takes two steps.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
from contextlib import suppress
from functools import cache

from vmsandbox.failpoints import failpoint

_RENAME_NOREPLACE = 1  # linux/fs.h
_RENAME_EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

rename_flags = True  # a test switches it off to try the way for file systems without them


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, name: str = "") -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _renameat2(source_fd: int, source: str, target_fd: int, target: str, flags: int) -> bool:
    """Whether it was done; False: this file system cannot. Raises OSError."""
    if not rename_flags or not hasattr(_libc(), "renameat2"):
        return False
    try:
        _checked(_libc().renameat2(source_fd, os.fsencode(source), target_fd, os.fsencode(target), flags), target)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def put(source_fd: int, source: str, target_fd: int, target: str) -> None:
    """Move to a name that is free. Raises FileExistsError (or ENOTEMPTY) if it is not; nothing is replaced.

    On a file system without RENAME_NOREPLACE a folder may take the place of an empty folder.
    """
    if _renameat2(source_fd, source, target_fd, target, _RENAME_NOREPLACE):
        return
    if stat.S_ISDIR(os.stat(source, dir_fd=source_fd, follow_symlinks=False).st_mode):
        try:
            os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        except NotADirectoryError:  # something else has the name
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        return
    os.link(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)
    failpoint("apply.half-put")
    os.unlink(source, dir_fd=source_fd)


def exchange(one_fd: int, one: str, other_fd: int, other: str) -> bool:
    """Exchange what two names name, in one step. False: this file system cannot. Raises OSError."""
    return _renameat2(one_fd, one, other_fd, other, _RENAME_EXCHANGE)


def sync_file_system(fd: int) -> None:
    """Write everything of the file system that `fd` lies on to its device (syncfs(2)). Raises OSError."""
    _checked(_libc().syncfs(fd))


def is_open_for_writing(fd: int) -> bool:
    """Whether anybody has this file (ours is open for reading) open for writing, or mapped so.

    Asked by taking a read lease for a moment (fcntl(2), F_SETLEASE: refused with EAGAIN if there is a writer). Where
    leases are not to be had (another's file, NFS), the answer is no.
    """
    with suppress(OSError):
        # Who opens it meanwhile makes the kernel tell us; SIGIO, the default, would end the process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            return True
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
