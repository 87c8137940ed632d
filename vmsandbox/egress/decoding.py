"""What bytes say once the usual encodings are taken off them: percent and backslash escapes, base64, hex, compression.

Without it `base64 | curl -d @-` would carry a secret past whoever looks for its letters. Everything is bounded: a body
of a few bytes can stand for gigabytes. Where a bound is reached, `TooMuchError` says so, and the caller refuses.
"""

from __future__ import annotations

import re
from binascii import a2b_base64, unhexlify
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from vmsandbox.egress.unpacking import Stock, TooMuchError, packed_streams

DEPTH = 3  # of encodings within encodings; each may have its own escapes
_LAYERS = 3  # of escapes: JSON in JSON in a form
_WINDOW = 8 << 20  # bytes that are looked at together
_OVERLAP = 64 << 10
_EVERY_ALIGNMENT = 64 << 10  # longest run of base64 letters that is decoded from each of its first four letters
_DECODED = 64 << 20  # bytes, and eight times what was given

_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_CODE = re.compile(rb"\\(?:u00|x)([0-9A-Fa-f]{2})")
_ESCAPES = ((b"\\n", b"\n"), (b"\\r", b"\r"), (b"\\t", b"\t"), (b"\\/", b"/"), (b'\\"', b'"'), (b"\\'", b"'"))
_BACKSLASH = b"\xff\xfe\\\xfe\xff"  # stands for an escaped one meanwhile; no text has it
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n"
_NULS = 8
_BETWEEN = b"\r\n\r\n\r\n"  # ends as what precedes a part of multipart: `packed_streams` looks for zlib there
_BETWEEN_BASE64 = b"DQoNCg0K"


@dataclass
class Budget:
    """What may still be decoded for one request. Raises TooMuchError when it is used up."""

    decoded: int
    stock: Stock

    @classmethod
    def of(cls, size: int) -> Budget:
        return cls(decoded=_DECODED + 8 * size, stock=Stock())

    def take(self, size: int) -> None:
        self.decoded -= size
        if self.decoded < 0:
            raise TooMuchError("it decodes to more than can be looked through")


def views(data: bytes, budget: Budget) -> Iterator[bytes]:
    """The data itself and everything that it holds in one of the usual encodings, each as bytes to look through.

    Raises:
        TooMuchError: the budget is used up; what was yielded until then is not all.
    """
    yield from _views(data, 0, budget)


def _views(data: bytes, depth: int, budget: Budget) -> Iterator[bytes]:
    # One inside after the other, and each to its end, so that few are in memory at once.
    for part in _windows(data):
        last = part
        for last in unescaped(part):
            budget.take(len(last))
            yield last
        if depth < DEPTH:
            for inner in _decoded_runs(last, budget, 4 if depth == 0 else 1):
                yield from _views(inner, depth + 1, budget)
            for inner in packed_streams(last, budget.stock) if last is not part else ():
                yield from _views(inner, depth + 1, budget)
    # Last, and of the whole: it is the likeliest to use up the budget, and has to be unpacked from its start.
    for inner in packed_streams(data, budget.stock) if depth < DEPTH else ():
        yield from _views(inner, depth + 1, budget)


def unescaped(data: bytes) -> Iterator[bytes]:
    """The data, and after each layer of percent escapes and of backslash escapes that it turns out to have.

    UTF-16 counts as one: what is left without its NULs is ASCII.
    """
    yield data
    if b"\0" in data and data.count(b"\0") >= _NULS:
        data = data.translate(None, b"\0")
        yield data
    for _ in range(_LAYERS):
        before = data
        for one in (_without_percent, _without_backslashes):
            if (plain := one(data)) != data:
                data = plain
                yield data
        if data is before:
            break


def _windows(data: bytes) -> Iterator[bytes]:
    if len(data) <= _WINDOW:
        yield data
        return
    for at in range(0, len(data), _WINDOW - _OVERLAP):
        yield data[at : at + _WINDOW]


def _without_percent(data: bytes) -> bytes:
    return _PERCENT.sub(_byte, data) if b"%" in data else data


def _without_backslashes(data: bytes) -> bytes:
    if b"\\" not in data:
        return data
    data = data.replace(b"\\\\", _BACKSLASH)
    for escape, plain in _ESCAPES:
        data = data.replace(escape, plain)
    if b"\\u00" in data or b"\\x" in data:
        data = _CODE.sub(_byte, data)
    return data.replace(_BACKSLASH, b"\\")


def _byte(match: re.Match[bytes]) -> bytes:
    return unhexlify(match[1])


def _decoded_runs(data: bytes, budget: Budget, alignments: int) -> Iterator[bytes]:
    """What the data's runs of base64 and hex letters decode to, all of a kind together: few texts to search.

    alignments: from how many of a run's first letters on; letters before it may look as if they belonged to it.
    """
    runs = [match.group() for match in _runs().finditer(data)]
    blocks = [match.group().translate(None, _BLANKS) for match in _blocks().finditer(data)]
    if not runs and not blocks:
        return
    for at in range(alignments):
        found = [run[at:] for run in (*runs, *blocks) if at == 0 or len(run) <= _EVERY_ALIGNMENT]
        decoded = _unbase64(found)
        budget.take(len(decoded))
        yield decoded
    digits = [match.group() for match in _hex_runs().finditer(data)]
    if digits:
        joined = _BETWEEN.join(unhexlify(run[at : len(run) - (len(run) - at) % 2]) for run in digits for at in (0, 1))
        budget.take(len(joined))
        yield joined


def _unbase64(runs: list[bytes]) -> bytes:
    """All of them at once, with `_BETWEEN` in between; NULs may follow the last byte of each."""
    whole = _BETWEEN_BASE64.join([run + b"AAA"[: -len(run) % 4] for run in runs])
    return a2b_base64(whole.translate(_STANDARD))


@cache
def _runs() -> Any:
    return _compiled("[A-Za-z0-9+/_-]{16,}")


@cache
def _blocks() -> Any:
    """base64 in lines, as in mail and PEM."""
    return _compiled(r"(?:[A-Za-z0-9+/]{40,}(?:\r?\n)[ \t]{0,20})+[A-Za-z0-9+/]+")


@cache
def _hex_runs() -> Any:
    return _compiled("[0-9A-Fa-f]{32,}")


def _compiled(pattern: str) -> Any:
    """RE2, linear in what the guest sends, which here may match across lines."""
    import re2  # type: ignore[import-untyped]

    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)
