"""Looking through a request ends, in time and in memory, whatever the guest sends."""

from __future__ import annotations

import base64
import gzip
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest
from leaking import HEADS, VALUE, content_for, post

from vmsandbox.egress.canaries import new_canaries
from vmsandbox.egress.decoding import Budget, views
from vmsandbox.egress.unpacking import Stock, TooMuchError
from vmsandbox.egress.values import Dlp

WINDOW = 8 << 20


def bomb(encoding: str) -> bytes:
    zeros = bytes(200 << 20)
    if encoding == "br":
        return brotli.compress(zeros, quality=5)
    return HEADS[encoding](zeros)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_a_bomb_ends_at_the_limit_and_is_refused(encoding: str) -> None:
    body = bomb(encoding)
    assert len(body) < 1 << 20
    content = content_for(dlp=Dlp(freeze=True))
    for one, declared in ((body, encoding), (body, ""), (base64.b64encode(body), "")):
        if (encoding, declared) == ("br", ""):
            continue  # brotli cannot be recognised
        tracemalloc.start()
        begun = time.monotonic()
        found = post(content, one, declared)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "unpacks to more than 64 MiB" in found.decision.reason and not found.freeze
        assert peak < 300 << 20 and time.monotonic() - begun < 20


def test_a_bomb_does_not_hide_what_stands_beside_it() -> None:
    found = post(content_for(dlp=Dlp(freeze=True)), bomb("gzip") + VALUE.encode())
    assert "the secret KEY" in found.decision.reason and found.freeze


def test_a_bomb_of_bombs_and_of_many_streams_ends_too() -> None:
    many = gzip.compress(b"", mtime=0) * 200_000
    for body, encoding in (
        (many, "gzip"),
        (many, ""),
        (brotli.compress(many, quality=1), "gzip, br"),
        (b"\x28\xb5\x2f\xfd" * 300_000, ""),
        (b"\x1f\x8b\x08" * 300_000, ""),
    ):
        begun = time.monotonic()
        found = post(content_for(), body, encoding)
        assert "compressed streams" in found.decision.reason  # too many, or too long: which depends on their bytes
        assert time.monotonic() - begun < 10


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "random": os.urandom,
    "percent": lambda size: b"%25" * (size // 3),
    "escapes": lambda size: b"\\u0041" * (size // 6),
    "backslashes": lambda size: b"\\" * size,
    "short runs": lambda size: (b"QUJD" * 7 + b" ") * (size // 29),
    "hex": lambda size: b"41" * (size // 2),
    "base64 of base64": lambda size: base64.b64encode(base64.b64encode(os.urandom(size // 2))),
    "almost keys": lambda size: b"sk-ant-" * (size // 7),
    "samples": lambda size: b"sk-ant-api03-xxxxxxxxxxxxxxxxxxxxxx " * (size // 36),
    "keys within base64": lambda size: b"/AKIAQ3EGR7LMZ5KXTB2W" * (size // 21),
    "almost private keys": lambda size: b"-----BEGIN A A A PRIVATE KEY-----\n" * (size // 34),
    "lines of base64": lambda size: (b"A" * 64 + b"\n") * (size // 65),
    "code": lambda size: ((Path(json.__file__).parent / "decoder.py").read_bytes() * (size // 10_000 + 1))[:size],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_ten_times_as_much_takes_ten_times_as_long(name: str) -> None:
    size = 10_000_000 if name in ("random", "code", "almost keys") else 3_000_000
    content = content_for(canaries=new_canaries(3))
    post(content, b"warm")

    def seconds(size: int) -> float:
        body = HOSTILE[name](size)
        begun = time.process_time()
        post(content, body)
        return time.process_time() - begun

    small, large = seconds(size // 10), seconds(size)
    assert large < 30 * small + 0.5 and large < 20, (small, large)


def test_a_large_body_is_looked_through_to_its_end_in_pieces() -> None:
    body = b" " * (WINDOW - 5) + VALUE.encode() + b" " * WINDOW
    assert max(map(len, views(body, Budget.of(len(body))))) == WINDOW
    # On the edge of two pieces, as itself and in base64, and at the end.
    for text in (body, body[:-WINDOW] + base64.b64encode(VALUE.encode()), b" " * 2 * WINDOW + VALUE.encode()):
        assert post(content_for(), text).decision.rule == "dlp"


def test_what_decodes_to_more_than_the_budget_is_told() -> None:
    with pytest.raises(TooMuchError, match="decodes to more"):
        list(views(b"%41" * 99, Budget(300, Stock())))
    assert len(list(views(b"%41" * 99, Budget(10_000, Stock())))) > 1
