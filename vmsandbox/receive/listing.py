"""Reads what the guest lists, and knows which files are certainly as they were pushed.

One record an entry: `MODE SIZE INODE CTIME PATH` (st_mode in octal, bytes, number, nanoseconds), ended by a NUL; a
symlink's target follows as a record of its own. `0 0 0 0 PATH` says that what is in a folder could not be told.

The baseline is the listing that was made right after the push. A file whose record is the same, byte for byte, was not
touched since: the kernel sets ctime at every write, chmod and rename, and only root can turn its clock back. A guest
that lies about it makes the host believe that a file is still the one that the *host* sent: it loses its own work and
gains nothing. (mtime is left out: any program may set it, and ctime moves with it.)
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

from vmsandbox.receive.protocol import HELLO, LISTED, LISTING, ProtocolError, ReturnLimits, read_frame
from vmsandbox.review.manifest import Item, checked_path

MAX_RECORD = 8 << 10  # PATH_MAX and four numbers
# A file that is written in the tick of the kernel's clock (10 ms at most) in which the baseline saw it keeps its ctime.
_RACY = 20_000_000


class Listed(NamedTuple):
    """One entry of a guest's listing, checked. form: S_IFMT of its mode; 0: a folder that could not be looked into."""

    path: str
    form: int
    mode: int
    size: int
    ctime: int


class Records:
    """Cuts a listing that comes in pieces into records."""

    def __init__(self, limits: ReturnLimits) -> None:
        self._limits = limits
        self._rest = b""
        self._bytes = 0

    def feed(self, untrusted: bytes) -> list[bytes]:
        """The records that are whole now. Raises ProtocolError over a limit."""
        self._bytes += len(untrusted)
        if self._bytes > self._limits.listing_bytes:
            raise ProtocolError(f"the listing is longer than {self._limits.listing_bytes} bytes")
        *whole, self._rest = (self._rest + untrusted).split(b"\0")
        if len(self._rest) > MAX_RECORD:
            raise ProtocolError("an entry of the listing is too long")
        return whole

    def end(self) -> None:
        """The listing is over. Raises ProtocolError if a record is not."""
        if self._rest:
            raise ProtocolError("the listing ends within an entry")


def parse_record(untrusted_record: bytes, depth: int) -> Listed:
    """One record, checked. Raises ProtocolError if it is not exactly one, or its path may not be."""
    fields = untrusted_record.split(b" ", 4)
    if len(fields) != 5 or not all(field.isdigit() and len(field) <= 20 for field in fields[:4]):
        raise ProtocolError("an entry of the listing is malformed", _text(untrusted_record))
    try:
        mode = int(fields[0], 8)
        path = checked_path(_text(fields[4]), depth)
    except ValueError as error:
        raise ProtocolError(f"an entry of the listing is refused: {error}", _text(untrusted_record)) from None
    if mode > 0o177777:
        raise ProtocolError("an entry of the listing has no such mode", _text(untrusted_record))
    return Listed(path, stat.S_IFMT(mode), mode & 0o777, int(fields[1]), int(fields[3]))


def target_of(untrusted_record: bytes) -> str:
    """A symlink's target. Raises ProtocolError if it is empty or longer than 4096 bytes."""
    if not 0 < len(untrusted_record) <= 4096:
        raise ProtocolError("a symlink's target is empty or too long", _text(untrusted_record))
    return _text(untrusted_record)


def read_baseline(stream: BinaryIO, pushed: Mapping[str, Item], limits: ReturnLimits) -> dict[bytes, str]:
    """Record → path, of the files that were in the guest as they were pushed when the push had just ended.

    Raises:
        ProtocolError: it is not what the sender writes.
    """
    known: dict[bytes, tuple[str, int]] = {}
    newest = 0
    links = False
    for record in _baseline_records(stream, limits):
        if links:
            links = False  # a target
            continue
        entry = parse_record(record, limits.depth)
        links = entry.form == stat.S_IFLNK
        newest = max(newest, entry.ctime)
        item = pushed.get(entry.path)
        as_pushed = item is not None and (item.kind, item.size, item.mode) == ("file", entry.size, entry.mode)
        if as_pushed and entry.form == stat.S_IFREG:
            known[record] = (entry.path, entry.ctime)
    return {record: path for record, (path, ctime) in known.items() if ctime < newest - _RACY}


def _baseline_records(stream: BinaryIO, limits: ReturnLimits) -> Iterator[bytes]:
    read_hello(stream)
    records = Records(limits)
    while True:
        kind, data = read_frame(stream, LISTING + LISTED)
        if kind == LISTED:
            records.end()
            return
        yield from records.feed(data)


def read_hello(stream: BinaryIO) -> None:
    """The first line. Raises ProtocolError if it is not of this version of the protocol."""
    untrusted = stream.read(len(HELLO))
    if untrusted != HELLO:
        if not untrusted:
            raise ProtocolError("the guest sent nothing")
        raise ProtocolError("the guest does not speak this version of the return protocol", _text(untrusted))


def _text(untrusted: bytes) -> str:
    return untrusted[:MAX_RECORD].decode("utf-8", "surrogateescape")
