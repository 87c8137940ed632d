"""Large sparse files: copying them without their holes, digests, and proof that they are unchanged."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_CHUNK = 16 * 1024 * 1024
_BLOCK = 64 * 1024
FileStamp = tuple[int, int, int, int, int]


def new_sparse(path: Path, size: int) -> None:
    """A new file of `size` bytes that is one hole, readable by its owner only."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def fill_sparse(source: Path, target: Path, *, follow: bool = False) -> None:
    """Copy what `source` holds into `target`, an empty file of the same size; its holes stay holes.

    Blocks are shared where the file system can. `follow`: the target is a link in /proc.
    Raises OSError when there is no room.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    fd_in = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fd_out = os.open(target, flags)
        try:
            copy_extents(fd_in, fd_out)
        finally:
            os.close(fd_out)
    finally:
        os.close(fd_in)


def copy_extents(source: int, target: int) -> None:
    """The same for descriptors."""
    extents = data_extents(source, os.fstat(source).st_size)

    def share(position: int, length: int) -> int:
        return os.copy_file_range(source, target, length, position, position)

    def send(position: int, length: int) -> int:
        os.lseek(target, position, os.SEEK_SET)
        return os.sendfile(target, source, position, length)

    try:
        _copy_each(extents, share)
    except OSError as error:
        if error.errno != errno.EXDEV:  # two kinds of file system: the first call says so
            raise
        _copy_each(extents, send)


def _copy_each(extents: list[tuple[int, int]], copy: Callable[[int, int], int]) -> None:
    for start, end in extents:
        position = start
        while position < end:
            copied = copy(position, end - position)
            if copied == 0:
                raise OSError(errno.EIO, "the source became shorter while it was copied")
            position += copied


def data_extents(fd: int, size: int) -> list[tuple[int, int]]:
    """The (start, end) byte ranges of a file that are not holes."""
    extents = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        extents.append((start, position))
    return extents


def dig_holes(path: Path) -> None:
    """Turn pages of zeros into holes (a guest's memory has many)."""
    page = 4096
    zeros = bytes(page)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, end in data_extents(fd, os.fstat(fd).st_size):
            _dig_range(fd, start, end, zeros)
    finally:
        os.close(fd)


def _dig_range(fd: int, start: int, end: int, zeros: bytes) -> None:
    page = len(zeros)
    for offset in range(start, end, _CHUNK):
        block = os.pread(fd, min(_CHUNK, end - offset), offset)
        hole = None
        for at in range(0, len(block) + page, page):
            empty = at + page <= len(block) and block[at : at + page] == zeros
            if empty and hole is None:
                hole = at
            elif not empty and hole is not None:
                _punch(fd, offset + hole, at - hole)
                hole = None


def _punch(fd: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_punch_hole = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, fallocate(2)
    if libc.fallocate(fd, keep_size_punch_hole, ctypes.c_long(offset), ctypes.c_long(length)):
        code = ctypes.get_errno()
        if code != errno.EOPNOTSUPP:
            raise OSError(code, os.strerror(code))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sparse_sha256_of(path: Path) -> str:
    """SHA-256 over (offset, bytes) of each block of 64 KiB that is not all zeros, in lower-case hexadecimal.

    The same whatever of it is a hole, and a third of the time where most of a file is one.
    """
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(fd).st_size
        digest.update(size.to_bytes(8))
        done = 0  # extents may meet in one block
        for start, end in data_extents(fd, size):
            for at in range(max(done, start - start % _BLOCK), end, _BLOCK):
                block = os.pread(fd, _BLOCK, at)
                if block.count(0) != len(block):
                    digest.update(at.to_bytes(8) + block)
                done = at + _BLOCK
    finally:
        os.close(fd)
    return digest.hexdigest()


def stamp_of(path: Path) -> FileStamp:
    """(device, inode, size, mtime, ctime): unchanged as long as nobody wrote the file (ctime cannot be set)."""
    info = path.stat(follow_symlinks=False)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
