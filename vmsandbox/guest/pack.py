"""Streams what a walk chose as a tar archive, and notes exactly what was sent.

The manifest is what the guest's tree is later compared with: were it made from the disk instead of from
the bytes sent, a file written meanwhile would look like the guest's work. Each name is opened anew
relative to its folder and never through a link, so that a link swapped in since the walk is an error and
not a leak.

The archive is GNU tar: it carries names of any bytes and length. Unpack it with `tar --extract
--preserve-permissions` (modes are compared later, so the guest's umask must not change them) as the user
who shall own the files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from vmsandbox.errors import UserInputError
from vmsandbox.guest.walk import OPEN_FOLDER, Entry, Walk
from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.text import shown
from vmsandbox.review.values import Contents

_BATCH = 256 << 10  # bytes collected before one write
_CHUNK = 1 << 20  # bytes read at once
_BLOCK = 512  # tar pads everything to this
RECORD = 64 << 10  # bytes; an archive padded to a whole number of these can be followed by another
# O_NONBLOCK: a FIFO swapped in must not block.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TYPES = {"file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE}


@dataclass(frozen=True)
class PushedManifest:
    """What was sent. files: regular files. content_bytes: their content. archive_bytes: all that was
    written.
    """

    manifest: Manifest
    files: int
    content_bytes: int
    archive_bytes: int


Files = Iterator[tuple[str, int, Iterable[bytes]]]  # path, size, content


class Companion(Protocol):
    """Sees each file and link as it is sent."""

    def add(self, path: str, item: Item, content: bytes, mtime: int) -> None:
        """One file or link (content: where it leads). mtime: seconds."""


def pack(
    walk: Walk,
    write: Callable[[bytes], object],
    on_progress: Callable[[int, int], None] | None = None,
    companion: Companion | None = None,
    on_content: Callable[[str, bytes], object] | None = None,
    record: int = _BLOCK,
) -> PushedManifest:
    """Send all entries of a walk.

    Args:
        walk: what to send.
        write: takes the archive in pieces of some 256 KiB, in order; must take each whole.
        on_progress: told (content bytes read so far, content bytes in all) after each piece.
        on_content: given (path, bytes) of each file that is not empty, in pieces of at most 1 MiB, in order.
        record: bytes; the archive is padded to a whole number of these.

    Raises:
        UserInputError: something is no longer what the walk saw, or cannot be read. The archive is
            unfinished then, and what was unpacked so far has to be thrown away.
    """
    with _Packer(walk, write, on_progress, companion, on_content) as packer:
        for entry in walk.entries:
            packer.add(entry)
        return packer.finish(record)


def pack_files(files: Files, write: Callable[[bytes], object]) -> None:
    """Send files that no folder on the host holds, as an archive of whole `RECORD`s."""
    sent = 0
    for piece in _archived(files):
        write(piece)
        sent += len(piece)
    write(_end(sent, RECORD))


def pack_returned(manifest: Manifest, contents: Contents, write: Callable[[bytes], object]) -> None:
    """Send a tree that no folder on the host holds: its manifest, and where the bytes of its files are.

    Entries without bytes (a guest did not give them) and of other kinds are left out.
    """
    for path in sorted(manifest.items, key=os.fsencode):
        item = manifest.items[path]
        stream = contents.open(item.sha256) if item.kind == "file" and item.sha256 is not None else None
        if item.kind == "other" or (item.kind == "file" and stream is None):
            continue
        header = tarfile.TarInfo(path)
        header.type, header.mode, header.size = _TYPES[item.kind], item.mode, item.size
        header.linkname = item.target or ""
        write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        if stream is not None:
            with stream:
                left = item.size
                while left and (piece := stream.read(min(left, _CHUNK))):
                    left -= len(piece)
                    write(piece)
            write(bytes(left + -item.size % _BLOCK))
    write(bytes(2 * _BLOCK))


class _Packer:
    """One archive being written. Keeps the folders on the way to the current entry open."""

    def __init__(
        self,
        walk: Walk,
        write: Callable[[bytes], object],
        on_progress: Callable[[int, int], None] | None,
        companion: Companion | None,
        on_content: Callable[[str, bytes], object] | None,
    ) -> None:
        self._walk = walk
        self._companion = companion
        self._write = write
        self._on_progress = on_progress
        self._on_content = on_content
        self._waiting = bytearray()
        self._items: dict[str, Item] = {}
        self._files = self._content = self._archive = 0
        self._folders: list[tuple[str, int]] = []  # (path, descriptor), each inside the one before

    def __enter__(self) -> _Packer:
        try:
            self._folders.append(("", os.open(self._walk.root, OPEN_FOLDER)))
        except OSError as error:
            raise _changed(os.fspath(self._walk.root), error.strerror) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._folders:
            os.close(self._folders.pop()[1])

    def add(self, entry: Entry) -> None:
        """Send one entry and note it."""
        if entry.kind == "file":
            self._add_file(entry)
            return
        self._header(entry, entry.mode, 0, entry.mtime)
        if entry.kind == "dir":
            self._items[entry.path] = Item("dir", entry.mode)
        else:
            item = self._items[entry.path] = Item("symlink", 0, target=entry.target)
            if self._companion is not None:
                self._companion.add(entry.path, item, os.fsencode(entry.target or ""), 0)

    def finish(self, record: int) -> PushedManifest:
        """Write the archive's end and what is still waiting."""
        self._waiting += _end(self._archive + len(self._waiting), record)
        self._flush()
        return PushedManifest(Manifest(self._items), self._files, self._content, self._archive)

    def _add_file(self, entry: Entry) -> None:
        parent, name = self._parent(entry.path)
        try:
            fd = os.open(name, _OPEN_FILE, dir_fd=parent)
        except OSError as error:
            raise _changed(entry.path, error.strerror) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _changed(entry.path, "it is no longer a regular file")
            self._check_limits(entry.path, status.st_size)
            mode = status.st_mode & 0o777
            self._header(entry, mode, status.st_size, int(status.st_mtime))
            digest, content = self._content_of(fd, entry.path, status.st_size)
        finally:
            os.close(fd)
        self._files += 1
        item = self._items[entry.path] = Item("file", mode, status.st_size, digest)
        if self._companion is not None:
            self._companion.add(entry.path, item, content, int(status.st_mtime))

    def _content_of(self, fd: int, path: str, size: int) -> tuple[str, bytes]:
        """Send exactly `size` bytes: what is appended meanwhile is left out, what is missing is an error.

        Returns their digest and, for a companion, themselves.
        """
        sha = hashlib.sha256()
        pieces = []
        left = size
        while left:
            try:
                piece = os.read(fd, min(left, _CHUNK))
            except OSError as error:
                raise _changed(path, error.strerror) from error
            if not piece:
                raise _changed(path, f"it became shorter: {left} of {size} bytes are missing")
            sha.update(piece)
            if self._companion is not None:
                pieces.append(piece)
            left -= len(piece)
            self._content += len(piece)
            if self._on_content is not None:
                self._on_content(path, piece)
            self._put(piece)
        self._put(bytes(-size % _BLOCK))
        return sha.hexdigest(), pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _check_limits(self, path: str, size: int) -> None:
        limits = self._walk.limits
        if size > limits.file_bytes or self._content + size > limits.total_bytes:
            raise _changed(path, f"it grew to {size} bytes, which passes the limit of what is sent")

    def _header(self, entry: Entry, mode: int, size: int, mtime: int) -> None:
        header = tarfile.TarInfo(entry.path)
        header.type = _TYPES[entry.kind]
        header.mode, header.size, header.mtime = mode, size, mtime
        header.linkname = entry.target or ""
        # Owners stay 0 and without names: whoever unpacks owns the files.
        self._put(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _parent(self, path: str) -> tuple[int, str]:
        """The open folder of this path, and the path's last component."""
        folder, _, name = path.rpartition("/")
        while self._folders[-1][0] != folder:
            current, fd = self._folders[-1]
            if current and not folder.startswith(current + "/"):
                os.close(fd)
                self._folders.pop()
                continue
            start = len(current) + 1 if current else 0
            further = folder[start:].partition("/")[0]
            try:
                opened = os.open(further, OPEN_FOLDER, dir_fd=fd)
            except OSError as error:
                raise _changed(folder[:start] + further, error.strerror) from error
            self._folders.append((folder[:start] + further, opened))
        return self._folders[-1][1], name

    def _put(self, data: bytes) -> None:
        self._waiting += data
        if len(self._waiting) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        self._write(bytes(self._waiting))
        self._archive += len(self._waiting)
        self._waiting.clear()
        if self._on_progress is not None:
            self._on_progress(self._content, self._walk.total_bytes)


def _end(sent: int, record: int) -> bytes:
    """An archive's end: two empty blocks, and what the last record lacks. sent, record: bytes."""
    return bytes(2 * _BLOCK + -(sent + 2 * _BLOCK) % record)


def _archived(files: Files) -> Iterator[bytes]:
    for path, size, content in files:
        header = tarfile.TarInfo(path)
        header.size, header.mode, header.mtime = size, 0o644, int(time.time())
        yield header.tobuf(tarfile.GNU_FORMAT)
        yield from content
        yield bytes(-size % _BLOCK)


def _changed(path: str, why: str | None) -> UserInputError:
    return UserInputError(
        f"changed while it was being sent: {shown(path)}",
        details=why or "",
        resolution="stop what writes to the project, and try again",
    )
