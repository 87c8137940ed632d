"""Regular expressions over lines in linear time (RE2), whatever the guest wrote and whatever the rule.

With Python's own engine, one line that a guest made for one pattern (`(a+)+$`) would hold the review for years.

A pattern sees one line at a time: nothing in it matches across a line's end. RE2's `never_nl` does that, so that a
whole file is searched in one call. What RE2 has not (look-around, back references) is an error when it is compiled.
Source: https://github.com/google/re2/wiki/Syntax
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_MEMORY = 64 << 20  # bytes for an expression and its automaton; it starts over when they are used up
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_LINE_ANCHORS = {"A": "^", "z": "$"}
# Whatever some interpreter takes for a line's end is one here: otherwise `x = 1\r` would hide what follows from `^`.
_OTHER_LINE_ENDS = bytes.maketrans(b"\r\v\f", b"\n\n\n")
_WIDE_LINE_ENDS = ((b"\xe2\x80\xa8", b"\n\n\n"), (b"\xe2\x80\xa9", b"\n\n\n"), (b"\xc2\x85", b"\n\n"))


class Hit(NamedTuple):
    """One line's first match: offsets into the data that was searched."""

    start: int
    end: int


class LinePattern:
    """One expression, matched anywhere in a line. `^` and `$` (also `\\A`, `\\z`) are the line's ends."""

    def __init__(self, pattern: str) -> None:
        """Raises ValueError, with RE2's words, for what RE2 cannot do."""
        self.pattern = pattern
        compiled(pattern)  # on its own first: `a)|(b` would be valid between our brackets
        self.source = "(?m:" + _ESCAPE.sub(lambda found: _LINE_ANCHORS.get(found[1], found[0]), pattern) + ")"
        self._regexp = compiled(self.source)

    def hits(self, data: bytes) -> Iterator[Hit]:
        """The first match in each line that matches."""
        at = 0
        while (match := self._regexp.search(data, at)) is not None:
            start, end = match.span()
            yield Hit(start, end)
            at = data.find(b"\n", end) + 1
            if not at:
                break

    def matches(self, data: bytes) -> bool:
        """Whether any line matches."""
        return self._regexp.search(data) is not None


class PatternSet:
    """Several patterns: one pass tells that none of them matches, which is nearly always so."""

    def __init__(self, patterns: Sequence[LinePattern]) -> None:
        self.patterns = tuple(patterns)
        self._any: Any = None
        if self.patterns:
            try:
                self._any = compiled("|".join(one.source for one in self.patterns))
            except ValueError:  # too many for one automaton: each for itself, slower
                self._any = None

    def hits(self, data: bytes) -> Iterator[tuple[int, Iterator[Hit]]]:
        """(index of the pattern, its hits) of each pattern that may match."""
        if self.patterns and (self._any is None or self._any.search(data) is not None):
            for number, one in enumerate(self.patterns):
                yield number, one.hits(data)


def one_line_end(data: bytes) -> bytes:
    """The data with everything that ends a line somewhere as newlines; every byte stays at its offset."""
    if b"\r" in data or b"\v" in data or b"\f" in data:
        data = data.translate(_OTHER_LINE_ENDS)
    if not data.isascii():
        for wide, newlines in _WIDE_LINE_ENDS:
            if wide in data:  # `replace` looks for it more slowly
                data = data.replace(wide, newlines)
    return data


def compiled(pattern: str, groups: bool = False) -> Any:
    """RE2's expression; `groups`: with the parts in brackets. Raises ValueError, with RE2's words."""
    import re2  # type: ignore[import-untyped]

    options = re2.Options()
    options.never_nl = True
    options.never_capture = not groups
    options.log_errors = False
    options.max_mem = _MEMORY
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else "not a regular expression"
        raise ValueError(reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)) from None
    except UnicodeEncodeError:
        raise ValueError("not text") from None
