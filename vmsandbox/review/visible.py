"""Lines of a file as a person can read them: nothing invisible, nothing that acts, and what changed within a line.

`shown` makes a name unambiguous and doubles each backslash; in source text that would be noise. Here a line comes in
pieces, and what stands for something that does not show as itself is a piece of its own, which looks different.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

from vmsandbox.review.linediff import differences
from vmsandbox.review.text import shown
from vmsandbox.review.values import FileChange, Hunk

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]", re.DOTALL)
_LONGEST_COMPARED = 1000  # characters of a line in which single changes are looked for
_STEPS = 20_000
_MOST_MARKS = 3  # combining marks on one letter: more would paint over other lines
_SAME = 0.3  # the part that two lines must have in common for their difference to mean something


class Piece(NamedTuple):
    """A run of characters. odd: stands for something invisible. note: about the line, not in it. new: it changed."""

    text: str
    look: Literal["plain", "odd", "note"] = "plain"
    new: bool = False


class Row(NamedTuple):
    """A line beside its counterpart. Numbers are from 1; None where there is no line on that side."""

    old_number: int | None
    old: bytes | None
    new_number: int | None
    new: bytes | None

    @property
    def same(self) -> bool:
        """Whether it is context."""
        return self.old == self.new


def rows_of(hunk: Hunk) -> Iterator[Row]:
    """The hunk side by side: the first line that went beside the first that came, and so on."""
    old, new = hunk.old_start, hunk.new_start
    gone: list[bytes] = []
    come: list[bytes] = []
    for sign, line in (*hunk.lines, (" ", None)):
        if sign == "-":
            gone.append(line or b"")
        elif sign == "+":
            come.append(line or b"")
        else:
            for index in range(max(len(gone), len(come))):
                left, right = index < len(gone), index < len(come)
                yield Row(
                    old + index if left else None,
                    gone[index] if left else None,
                    new + index if right else None,
                    come[index] if right else None,
                )
            old, new = old + len(gone), new + len(come)
            gone, come = [], []
            if line is not None:
                yield Row(old, line, new, line)
                old, new = old + 1, new + 1


def pieces_of(line: bytes, limit: int, changed: Sequence[tuple[int, int]] = ()) -> list[Piece]:
    """One line. limit: characters of it that are shown. changed: from and to of characters that are marked."""
    body = line.removesuffix(b"\n")
    text = body.removesuffix(b"\r").decode("utf-8", "surrogateescape")
    pieces: list[Piece] = []
    position = 0
    for start, end in (*changed, (len(text), len(text))):
        pieces += _visible(text[position : min(start, limit)], False)
        pieces += _visible(text[min(start, limit) : min(end, limit)], True)
        position = min(end, limit)
    if len(text) > limit:
        pieces.append(Piece(f"… {len(text) - limit:,} more characters", "note"))
    if body.endswith(b"\r"):
        pieces.append(Piece("␍", "note"))
    if not line.endswith(b"\n"):
        pieces.append(Piece("no newline at the end", "note"))
    return pieces


def changed_within(old: bytes, new: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Which characters of two lines differ, as (from, to) on each side; nothing if they have little in common."""
    texts = [line.rstrip(b"\r\n").decode("utf-8", "surrogateescape") for line in (old, new)]
    if any(len(text) > _LONGEST_COMPARED for text in texts):
        return [], []
    tokens: list[list[str]] = [_TOKEN.findall(text) for text in texts]
    ranges = differences(tokens[0], tokens[1], _STEPS)
    starts = [[0], [0]]
    for side in (0, 1):
        for token in tokens[side]:
            starts[side].append(starts[side][-1] + len(token))
    marks = [
        [
            (starts[side][one[2 * side]], starts[side][one[2 * side + 1]])
            for one in ranges
            if one[2 * side] < one[2 * side + 1]
        ]
        for side in (0, 1)
    ]
    for text, marked in zip(texts, marks, strict=True):
        kept = len(text.strip()) - sum(len(text[start:end].strip()) for start, end in marked)
        if kept < _SAME * len(text.strip()):
            return [], []
    return marks[0], marks[1]


def line_counts(change: FileChange) -> tuple[int, int]:
    """How many lines came and how many went."""
    signs = [sign for hunk in change.hunks or () for sign, _ in hunk.lines]
    return signs.count("+"), signs.count("-")


def _visible(text: str, new: bool) -> Iterator[Piece]:
    if text.isascii() and text.replace("\t", " ").isprintable():
        if text:
            yield Piece(text, "plain", new)
        return
    looks: list[tuple[bool, str]] = []
    marks = _MOST_MARKS  # at the start a mark would change what stands before it
    for character in text:
        if unicodedata.category(character).startswith("M"):
            marks += 1
            safe = _safe(character) if marks > _MOST_MARKS else _safe_mark(character)
        else:
            safe = character if character in "\\\t" else _safe(character)
            marks = 0 if safe == character and not character.isspace() else _MOST_MARKS
        looks.append((safe != character, safe))
    for odd, run in groupby(looks, key=lambda one: one[0]):
        yield Piece("".join(safe for _, safe in run), "odd" if odd else "plain", new)


@lru_cache(maxsize=4096)
def _safe(character: str) -> str:
    return shown(character)


@lru_cache(maxsize=4096)
def _safe_mark(character: str) -> str:
    return shown(f"a{character}")[1:]
