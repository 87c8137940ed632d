"""Compressed bytes, unpacked within a limit.

Without the limit a kilobyte of gzip, brotli or zstd would fill the broker's memory: 10 MiB of zeros are 10 KiB of gzip
and a few bytes of brotli. Formats: RFC 1950 to 1952 (zlib, deflate, gzip), RFC 7932 (brotli), RFC 8878 (zstd).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_UNPACKED = 64 << 20  # bytes of one request altogether
_STREAMS = 1024  # that may begin in one request's bytes, and members of one gzip file
_ZSTD_COSTS = 16  # streams: one can be read to its end without giving anything
_ENCODINGS = 4  # of one body
_STEP = 64 << 10
_BROTLI_STEP = 32  # brotli (1.1) cannot be told how much to give at once: so little that it cannot be very much
_ZSTD_WINDOW = 32 << 20  # RFC 8878 3.1.1.1.2 asks for 8 MiB at least
_ZSTD = b"\x28\xb5\x2f\xfd"
_MAGICS = (b"\x1f\x8b\x08", _ZSTD, b"\r\n\r\nx\x01", b"\r\n\r\nx\x5e", b"\r\n\r\nx\x9c", b"\r\n\r\nx\xda")
_ZLIB_STARTS = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")
_NOT_PACKED = ("identity", "aws-chunked")  # the latter puts signatures between pieces of plain text


class TooMuchError(Exception):
    """Not an error: it cannot be looked through within the limits, or not at all. `str()` says why, for people."""


@dataclass
class Stock:
    """What may still be unpacked: `room` bytes, out of `streams` pieces that may be, read through in `steps`."""

    room: int = _UNPACKED
    streams: int = _STREAMS
    steps: int = 16_384

    def take(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise TooMuchError(f"it unpacks to more than {_UNPACKED >> 20} MiB")


def content_of(body: bytes, encodings: str, stock: Stock) -> bytes:
    """A body without its Content-Encoding (RFC 9110 8.4: a list, in the order in which they were applied).

    Raises:
        TooMuchError: an encoding that is not known here, bytes that are not of it, or more than the stock has.
    """
    names = encodings.split(",")
    if len(names) > _ENCODINGS:
        raise TooMuchError("it has too many Content-Encodings")
    for untrusted_name in reversed(names):
        name = untrusted_name.strip().lower()
        if not name or name in _NOT_PACKED or not body:
            continue
        unpack = _UNPACKERS.get(name)
        if unpack is None:
            raise TooMuchError("its Content-Encoding cannot be looked into")
        try:
            body = b"".join(_counted(unpack(memoryview(body)), stock))
        except TooMuchError:
            raise
        except Exception:  # each of the three libraries has errors of its own
            raise TooMuchError("it is not what its Content-Encoding says") from None
    return body


def packed_streams(data: bytes, stock: Stock) -> Iterator[bytes]:
    """What begins like gzip, zlib or zstd anywhere in the data, unpacked as far as it goes."""
    if data.startswith(_ZLIB_STARTS):
        yield from _stream(_zlib, data, 0, stock)
    for magic in _MAGICS:
        at = data.find(magic)
        while at >= 0:
            unpack = _zstd if magic is _ZSTD else _zlib
            yield from _stream(unpack, data, at + (4 if magic.startswith(b"\r") else 0), stock)
            at = data.find(magic, at + 1)


def _stream(unpack: Callable[[memoryview], Iterator[bytes]], data: bytes, at: int, stock: Stock) -> Iterator[bytes]:
    stock.streams -= _ZSTD_COSTS if unpack is _zstd else 1
    if stock.streams < 0:
        raise TooMuchError("it holds too many compressed streams")
    found: list[bytes] = []
    try:
        for piece in _counted(unpack(memoryview(data)[at:]), stock):
            found.append(piece)
            stock.steps -= 1
            if stock.steps < 0:
                raise TooMuchError("its compressed streams are too long")
    except TooMuchError:
        raise
    except Exception:  # noqa: S110 - nearly always: these bytes only looked like it
        pass
    if any(found):
        yield b"".join(found)


def _counted(pieces: Iterator[bytes], stock: Stock) -> Iterator[bytes]:
    for piece in pieces:
        stock.take(len(piece))
        yield piece


def _zlib(data: memoryview, window_bits: int = 47) -> Iterator[bytes]:
    """zlib or gzip by its header (47), or deflate without one (-15). Bytes after the end are left alone."""
    unpacker = zlib.decompressobj(window_bits)
    for at in range(0, len(data), _STEP):
        piece: bytes | memoryview = data[at : at + _STEP]
        while piece:
            yield unpacker.decompress(piece, _STEP * 16)
            piece = unpacker.unconsumed_tail
        if unpacker.eof:
            return
    yield unpacker.flush()


def _gzip(data: memoryview) -> Iterator[bytes]:
    """All members of it, one after the other (RFC 1952 2.2)."""
    unpacker = zlib.decompressobj(31)
    members = 1
    for at in range(0, len(data), _STEP):
        piece: bytes | memoryview = data[at : at + _STEP]
        while piece:
            yield unpacker.decompress(piece, _STEP * 16)
            piece = unpacker.unconsumed_tail
            if unpacker.eof and (piece := unpacker.unused_data):
                unpacker = zlib.decompressobj(31)
                members += 1
                if members > _STREAMS:
                    raise TooMuchError("it holds too many compressed streams")
    yield unpacker.flush()


def _deflate(data: memoryview) -> Iterator[bytes]:
    """With zlib's header, as RFC 9110 8.4.1.2 has it, or without, as some send it."""
    has_header = len(data) > 1 and data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0
    return _zlib(data, 15 if has_header else -15)


def _brotli(data: memoryview) -> Iterator[bytes]:
    unpacker: Any = import_module("brotli").Decompressor()
    for at in range(0, len(data), _BROTLI_STEP):
        yield unpacker.process(bytes(data[at : at + _BROTLI_STEP]))


def _zstd(data: memoryview, every_frame: bool = False) -> Iterator[bytes]:
    module: Any = import_module("zstandard")
    unpacker = module.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    with unpacker.stream_reader(data, read_across_frames=every_frame) as reader:
        while piece := reader.read(_STEP * 16):
            yield piece


def _every_zstd(data: memoryview) -> Iterator[bytes]:
    return _zstd(data, every_frame=True)


_UNPACKERS: dict[str, Callable[[memoryview], Iterator[bytes]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _every_zstd,
}
