"""Finds given values (a secret, a placeholder, a canary) in bytes, also encoded, also with other characters in between.

Decoding alone (`decoding.py`) finds a value where the encoded text is whole. Here the value itself is encoded, so that
it is found at any place of a base64 text, in a piece of one, and with line ends or quotes in between.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

from vmsandbox.egress.decoding import unescaped

SHORTEST = 8  # characters; a shorter value would be found everywhere
_SHORTEST_FORM = 8
_SHORTEST_SQUEEZED = 14  # letters and digits that must remain where everything else is ignored
_LONG = 32  # characters of a value of which a quarter cannot be there by chance
_OTHER = bytes(code for code in range(256) if not chr(code).isalnum() or code > 127)
_URL_SAFE = bytes.maketrans(b"+/", b"-_")


class Needles:
    """The values to look for, each under the name that `find` gives for it."""

    def __init__(self, values: Mapping[str, str], *, pieces: bool = False) -> None:
        """pieces: a part of a value counts too (half of a short one, a quarter of a long one)."""
        plain: dict[bytes, str] = {}
        squeezed: dict[bytes, str] = {}
        self._forms = (plain, squeezed)
        for name, value in values.items():
            raw = value.encode("utf-8", "surrogateescape")
            if len(raw) < SHORTEST:
                continue
            for part in (raw, *(_pieces(raw) if pieces else ())):
                for form in _forms(part):
                    plain.setdefault(form, name)
                    # Nothing but letters and digits: what stands in between is ignored, NULs of UTF-16 too.
                    bare = squeeze(form)
                    if len(bare) >= _SHORTEST_SQUEEZED:
                        squeezed.setdefault(bare, name)
        self._plain = _Any(plain)
        self._squeezed = _Any(squeezed)

    @classmethod
    def together(cls, needles: Iterable[Needles]) -> Needles:
        """All of them: tells in one pass that none is there."""
        found = cls({})
        for one in needles:
            for mine, its in zip(found._forms, one._forms, strict=True):
                mine.update(its)
        found._plain, found._squeezed = map(_Any, found._forms)
        return found

    def find(self, data: bytes, squeezed: bytes) -> str | None:
        """The name of a value that the data holds, or None. squeezed: `squeeze(data)`."""
        return self._plain.find(data) or self._squeezed.find(squeezed)


def squeeze(data: bytes) -> bytes:
    """The letters and digits alone."""
    return data.translate(None, _OTHER)


class _Any:
    """Many strings at once, in one linear pass (RE2)."""

    def __init__(self, names: dict[bytes, str]) -> None:
        self._names = names
        self._regexp: Any = None
        if names:
            import re2  # type: ignore[import-untyped]

            options = re2.Options()
            options.encoding = re2.Options.Encoding.LATIN1
            options.log_errors = False
            longest_first = sorted(names, key=len, reverse=True)
            self._regexp = re2.compile(b"|".join(map(re2.escape, longest_first)), options)

    def find(self, data: bytes) -> str | None:
        if self._regexp is None or (match := self._regexp.search(data)) is None:
            return None
        return self._names[match.group()]


def _forms(value: bytes) -> Iterator[bytes]:
    """The value in each encoding that leaves it recognisable wherever it stands."""
    text = value.decode("utf-8", "replace")
    yield value
    yield from unescaped(value)  # what is left of it when the text around it is unescaped
    yield json.dumps(text)[1:-1].encode()
    yield quote(text, safe="").encode()
    yield quote_plus(text).encode()
    for low in {value.lower(), value.upper()}:  # a host name has no upper case
        if len(value) >= _SHORTEST_SQUEEZED:
            yield low
    yield value.hex().encode()
    yield value.hex().upper().encode()
    for before in range(3):
        letters = b64encode(bytes(before) + value)
        # The first and the last letter may hold bits of what stands beside the value.
        inside = letters[(before * 8 + 5) // 6 : (before + len(value)) * 8 // 6]
        if len(inside) >= _SHORTEST_FORM:
            yield inside
            yield inside.translate(_URL_SAFE)


def _pieces(value: bytes) -> Iterator[bytes]:
    """Parts of which one is whole, however the value is cut in two."""
    step = len(value) // (4 if len(value) >= _LONG else 2)
    yield from (value[at : at + step] for at in range(0, len(value) - step + 1, step))
