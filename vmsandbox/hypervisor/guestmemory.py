"""Reads the memory of a guest whose QEMU maps a file privately: what the file has, and what the guest wrote since.

Only the pages that the guest wrote since it was forked are its process's own, some ten MiB of 512: they are all that
has to be copied while it stands still. The kernel says which (/proc/PID/pagemap, admin-guide/mm/pagemap.rst); they are
read with process_vm_readv(2), which asks for the right to trace the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from contextlib import suppress
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.files import copy_extents

PAGE = 4096
_ENTRY = 8  # bytes of a page's entry in pagemap, little-endian
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20  # in its highest byte
_IS_OWN = bytes(bool(byte & (_PRESENT | _SWAPPED)) and not byte & _OF_FILE for byte in range(256))
_AT_ONCE = 512  # ranges in one call; the kernel takes 1024


class _Range(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class GuestMemory:
    """The memory of one guest. Close it.

    Raises:
        PermissionError: this process may not read QEMU's memory.
        HostError: QEMU's memory is not a file that it maps privately.
    """

    def __init__(self, pid: int, size: int) -> None:
        self._pid, self._size = pid, size
        self._start, device, inode = _mapping(pid, size)
        self._read = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self._read.restype = ctypes.c_ssize_t
        self._read.argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
        )  # fmt: skip
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._copy([(0, PAGE)], ctypes.create_string_buffer(PAGE))
            self._file = _open_file(pid, device, inode)
        except BaseException:
            os.close(self._pagemap)
            raise

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._pagemap)
        os.close(self._file)

    def copy_file(self, target: int) -> None:
        """Copy what the guest's memory was at its start into an empty file of its size. Raises OSError."""
        copy_extents(self._file, target)

    def copy_written(self, target: int) -> int:
        """Copy what the guest has written since; the bytes that it was. It has to stand still for a true copy.

        Raises:
            HostError: the guest is gone. OSError: the file's disk is full (SIGBUS is no way to learn it).
        """
        ranges = self._written()
        for at, length in ranges:
            os.posix_fallocate(target, at, length)
        with mmap.mmap(target, self._size) as memory:
            whole = (ctypes.c_char * self._size).from_buffer(memory)
            try:
                self._copy(ranges, whole)
            finally:
                del whole  # or the mapping cannot be closed
        return sum(length for _, length in ranges)

    def _written(self) -> list[tuple[int, int]]:
        """(offset, length) of what is the process's own."""
        entries = os.pread(self._pagemap, self._size // PAGE * _ENTRY, self._start // PAGE * _ENTRY)
        own = entries[_ENTRY - 1 :: _ENTRY].translate(_IS_OWN)  # the highest byte of each has the three bits
        return [(run.start() * PAGE, (run.end() - run.start()) * PAGE) for run in re.finditer(b"\1+", own)]

    def _copy(self, ranges: list[tuple[int, int]], into: ctypes.Array[ctypes.c_char]) -> None:
        to = ctypes.addressof(into)
        for first in range(0, len(ranges), _AT_ONCE):
            some = ranges[first : first + _AT_ONCE]
            here = (_Range * len(some))(*(_Range(to + at, length) for at, length in some))
            there = (_Range * len(some))(*(_Range(self._start + at, length) for at, length in some))
            got = self._read(self._pid, here, len(some), there, len(some), 0)
            if got < 0:
                code = ctypes.get_errno()
                if code == 1:
                    raise PermissionError(code, os.strerror(code))
                raise HostError("the guest's memory could not be read", details=os.strerror(code))
            if got != sum(length for _, length in some):
                raise HostError("the guest's memory could not be read", details="it ended while it was read")


def _mapping(pid: int, size: int) -> tuple[int, str, int]:
    """Where QEMU has the guest's memory, and of which file (device as in maps, inode)."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights, offset, device, inode = line.split()[:5]
        start, end = (int(text, 16) for text in place.split("-"))
        if end - start == size and rights[3] == "p" and int(inode) and int(offset, 16) == 0:
            return start, device, int(inode)
    raise HostError("the guest's memory is not where it is expected", details=f"/proc/{pid}/maps: no mapping of {size}")


def _open_file(pid: int, device: str, inode: int) -> int:
    """The file of a mapping, also where its name is gone."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            info = entry.stat()
            if info.st_ino == inode and f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}" == device:
                return os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    raise HostError("the file of the guest's memory is not open any more", details=f"inode {inode} of {device}")
