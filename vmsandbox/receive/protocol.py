"""The words of the return protocol (docs/return-protocol.md), on both of its stretches.

guest's sender ⇄ (SSH) ⇄ parent ⇄ (pipes) ⇄ receiver. Nobody here believes a length, a name or an order: a frame that is
not exactly what may come next ends the whole return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

HELLO = b"vmsandbox-return 1\n"
MAX_FRAME = 1 << 20  # bytes; the sender makes them of 256 KiB

# from the guest
LISTING, LISTED, DATA, LAST, UNREADABLE = b"L", b"E", b"D", b"F", b"U"
# from the receiver to its parent
REQUEST, ENOUGH, PROGRESS, CHANGED, GONE, DONE, FAILED = b"R", b"Z", b"P", b"M", b"G", b"O", b"X"


@dataclass(frozen=True)
class ReturnLimits:
    """What one return may carry before it is refused.

    total_bytes: of all files together, each rounded up to 4096 (what it takes on a disk). file_bytes: of one file; a
    larger one is not asked for. entries, depth, listing_bytes: of the listing. seconds: for all of it. In each stretch
    of `stall_seconds` at least `stall_bytes` must arrive.
    """

    total_bytes: int = 2 << 30
    file_bytes: int = 512 << 20
    entries: int = 400_000
    depth: int = 128
    listing_bytes: int = 256 << 20
    seconds: float = 1800
    stall_seconds: float = 60
    stall_bytes: int = 1 << 20


class ProtocolError(Exception):
    """The other side broke the protocol or passed a limit. brief and details: not yet safe to show."""

    def __init__(self, brief: str, details: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details


def frame(kind: bytes, data: bytes = b"") -> bytes:
    """One frame: what it is, its length in four bytes (the most significant first), its bytes."""
    return kind + len(data).to_bytes(4, "big") + data


def read_frame(stream: BinaryIO, kinds: bytes, limit: int = MAX_FRAME) -> tuple[bytes, bytes]:
    """The next frame: (kind, bytes).

    Raises:
        ProtocolError: the stream ended, the kind is none of `kinds`, or it is longer than `limit`.
    """
    head = stream.read(5)
    if len(head) < 5:
        raise ProtocolError("the return was cut off")
    kind, size = head[:1], int.from_bytes(head[1:], "big")
    if kind not in kinds:
        raise ProtocolError("a frame of a kind that may not come here", repr(head))
    if size > limit:
        raise ProtocolError(f"a frame of {size} bytes; {limit} are allowed")
    data = stream.read(size)
    if len(data) < size:
        raise ProtocolError("the return was cut off")
    return kind, data
