"""Write "newc" cpio archives, the format of an initramfs.

Linux accepts several archives behind each other as one initramfs (Documentation/driver-api/early-userspace/
buffer-format.rst): the image's own comes first, a template's seed is appended without touching it. A writer
of our own keeps the bytes the same on every host: no inode numbers, owners or times of the build leak in.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 512
_CONSOLE = (5, 1)


@dataclass(frozen=True)
class CpioEntry:
    """One member of an archive.

    path: relative, without a leading slash ("seed/user-data"). mode: type and permission bits as in st_mode.
    content: a file's bytes or a symlink's target. device: major and minor of a device node.
    """

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def folder(cls, path: str, mode: int = 0o755) -> CpioEntry:
        """A directory. Parents are not implied: name each before what is in it."""
        return cls(path, stat.S_IFDIR | mode)

    @classmethod
    def file(cls, path: str, content: bytes, mode: int = 0o644) -> CpioEntry:
        """A regular file."""
        return cls(path, stat.S_IFREG | mode, content)

    @classmethod
    def console(cls) -> CpioEntry:
        """/dev/console: without it /init has no stdin, stdout and stderr."""
        return cls("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE)


def cpio_archive(entries: Iterable[CpioEntry]) -> bytes:
    """The archive of these entries in this order, owned by root, dated 1970, padded to 512 bytes.

    Raises:
        ValueError: a path is absolute, empty or has a `..` or NUL in it.
    """
    archive = bytearray()
    number = 0
    for number, entry in enumerate(entries, start=1):
        parts = entry.path.split("/")
        if "\0" in entry.path or any(part in {"", ".", ".."} for part in parts):
            raise ValueError(f"not a path for an archive: {entry.path!r}")
        archive += _member(number, entry)
    archive += _member(number + 1, CpioEntry(_TRAILER, 0))
    return bytes(archive) + bytes(-len(archive) % _BLOCK)


def _member(number: int, entry: CpioEntry) -> bytes:
    """Header (cpio(5), "New ASCII Format"), name and content, each padded to 4 bytes."""
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0,
    )  # fmt: skip
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + entry.content + bytes(-len(entry.content) % 4)
