"""git's objects, packs and index as bytes: read and written here, with no git involved.

A guest's repository is made on the host as a handful of files and copied in: running `git add` for ten thousand files
inside an emulated guest would take half a minute. And a tree that a guest made is looked at in its raw form, because
git's own listing would already have interpreted it.

Source: gitformat-pack(5), gitformat-index(5); a tree is `mode SP name NUL object-id` repeated.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import BinaryIO, NamedTuple

TREE, GITLINK, LINK, EXECUTABLE, FILE = 0o040000, 0o160000, 0o120000, 0o100755, 0o100644
_TYPES = {"commit": 1, "tree": 2, "blob": 3}
_SAMPLE = 1 << 10  # bytes
_MOST_VALUES = 240  # of 256 in a sample: random bytes have 251 on average
_STORED = 0xFFFF  # bytes of a block that is not compressed
_FAR = 1 << 31  # gitformat-pack(5): an offset from here on takes eight bytes; in the four, this bit says so
_NEAR_OFFSETS = _FAR
DIGEST_SIZES = {"sha1": 20, "sha256": 32}


class TreeEntry(NamedTuple):
    """One entry of a tree. oid: the object's id, raw bytes."""

    mode: int
    name: bytes
    oid: bytes


def object_id(kind: str, content: bytes, algorithm: str) -> bytes:
    """The id of an object (raw bytes)."""
    return hashlib.new(algorithm, b"%s %d\0" % (kind.encode(), len(content)) + content, usedforsecurity=False).digest()


def parse_tree(content: bytes, algorithm: str) -> Iterator[TreeEntry]:
    """The entries of a tree object.

    Raises:
        ValueError: it is not one.
    """
    size = DIGEST_SIZES[algorithm]
    at = 0
    while at < len(content):
        space, end = content.find(b" ", at, at + 8), content.find(b"\0", at)
        if space < 0 or end < space or end + 1 + size > len(content):
            raise ValueError("a tree that is cut off or malformed")
        digits = content[at:space]
        if not digits or digits.strip(b"01234567"):
            raise ValueError("a mode that is no octal number")
        yield TreeEntry(int(digits, 8), content[space + 1 : end], content[end + 1 : end + 1 + size])
        at = end + 1 + size


def encode_tree(entries: Iterable[TreeEntry]) -> bytes:
    """A tree object with these entries, in git's order (a folder sorts as if its name ended in a slash)."""
    ordered = sorted(entries, key=lambda one: one.name + b"/" if one.mode == TREE else one.name)
    return b"".join(b"%o %s\0%s" % one for one in ordered)


class PackWriter:
    """Writes a pack (version 2, whole objects, no deltas) into a file opened with "w+b", and its index."""

    def __init__(self, file: BinaryIO, algorithm: str) -> None:
        self._file = file
        self._algorithm = algorithm
        self._places: dict[bytes, tuple[int, int]] = {}  # id → CRC of its entry, offset of its entry
        self._checksum = b""
        self._at = file.write(b"PACK" + (2).to_bytes(4) + bytes(4))

    def add(self, kind: str, content: bytes) -> bytes:
        """One object, unless it is there already; returns its id."""
        oid = object_id(kind, content, self._algorithm)
        if oid in self._places:
            return oid
        size, head = len(content), bytearray()
        byte = _TYPES[kind] << 4 | size & 15
        size >>= 4
        while size:
            head.append(byte | 0x80)
            byte, size = size & 0x7F, size >> 7
        head.append(byte)
        entry = bytes(head) + _deflated(content)
        self._places[oid] = zlib.crc32(entry), self._at
        self._at += self._file.write(entry)
        return oid

    def finish(self) -> None:
        """Write how many there are, and the checksum over all."""
        self._file.seek(8)
        self._file.write(len(self._places).to_bytes(4))
        self._file.flush()
        self._file.seek(0)
        whole = hashlib.new(self._algorithm, usedforsecurity=False)
        while piece := self._file.read(1 << 20):
            whole.update(piece)
        self._checksum = whole.digest()
        self._file.write(self._checksum)
        self._file.flush()

    def index(self) -> bytes:
        """The index (version 2) of the finished pack: what `git index-pack` would read the whole pack again for."""
        places = sorted(self._places.items())
        counts = [0] * 256
        for oid, _ in places:
            counts[oid[0]] += 1
        far = [
            at for _, (_, at) in places if at >= _NEAR_OFFSETS
        ]  # these are named by their number in a table of their own
        numbers = {at: _FAR | number for number, at in enumerate(far)}
        parts = [b"\xfftOc", (2).to_bytes(4), *(total.to_bytes(4) for total in accumulate(counts))]
        parts += [oid for oid, _ in places]
        parts += [crc.to_bytes(4) for _, (crc, _) in places]
        parts += [numbers.get(at, at).to_bytes(4) for _, (_, at) in places]
        parts += [at.to_bytes(8) for at in far]
        whole = b"".join(parts) + self._checksum
        return whole + hashlib.new(self._algorithm, whole, usedforsecurity=False).digest()


def _deflated(content: bytes) -> bytes:
    """Compressed, but not what does not shrink (images, archives): that would be most of the time, for nothing."""
    sample = content[:_SAMPLE]
    if len(set(sample)) > _MOST_VALUES or len(zlib.compress(sample, 1)) >= 0.95 * len(sample):
        return _stored(content)
    return zlib.compress(content, 1)


def _stored(content: bytes) -> bytes:
    """As it is, in zlib's frame (RFC 1950, 1951 3.2.4): `zlib.compress(…, 0)` takes three times as long."""
    parts = [b"\x78\x01"]
    for at in range(0, len(content), _STORED) or (0,):
        piece = content[at : at + _STORED]
        is_last = at + _STORED >= len(content)
        parts += [
            bytes((is_last,)),
            len(piece).to_bytes(2, "little"),
            (len(piece) ^ 0xFFFF).to_bytes(2, "little"),
            piece,
        ]
    return b"".join((*parts, zlib.adler32(content).to_bytes(4)))


class IndexEntry(NamedTuple):
    """One entry of an index. mtime: seconds; with size, what git compares first (0 and 0: it looks into the file).

    assume_unchanged: git does not miss it in the work tree.
    """

    path: bytes
    mode: int
    oid: bytes
    mtime: int = 0
    size: int = 0
    assume_unchanged: bool = False


def encode_index(entries: Iterable[IndexEntry], algorithm: str) -> bytes:
    """An index file (version 2). Only seconds and size are filled in: `core.checkStat=minimal` wants no more."""
    out = bytearray()
    count = 0
    for one in sorted(entries):
        count += 1
        fixed = (0, 0, one.mtime & 0xFFFFFFFF, 0, 0, 0, one.mode, 0, 0, one.size & 0xFFFFFFFF)
        entry = b"".join(number.to_bytes(4) for number in fixed) + one.oid
        entry += (0x8000 * one.assume_unchanged | min(len(one.path), 0xFFF)).to_bytes(2) + one.path
        out += entry + bytes(8 - len(entry) % 8)
    whole = b"DIRC" + (2).to_bytes(4) + count.to_bytes(4) + bytes(out)
    return whole + hashlib.new(algorithm, whole, usedforsecurity=False).digest()
