"""Whether one set of path globs allows a path that another does not.

Without it a comparison of two policies would be one of texts: `/v1/*` beside `/v1/models` would look wider than `/*`.
Globs are regular languages: both sets are run side by side over every path there can be, state by state (a subset
construction, made as it is walked). Only paths that `readings` gives count: no `//`, no dot segments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MOST_STATES = 20_000
_START, _SLASH, _DOT, _DOTS, _WITHIN = range(5)
_SPARE = "zqjxkvwyuonmlhgfdcbaeirstp0123456789ZQJXKVWYUONMLHGFDCBAEIRSTP"

_States = frozenset[tuple[int, int]]


class Witness(NamedTuple):
    """A path that one set allows and the other does not. exact: False where that is only assumed."""

    reading: str
    exact: bool


def wider(after: Sequence[str], before: Sequence[str]) -> Witness | None:
    """A path that `after` allows and `before` does not, the shortest; None if there is none.

    Args:
        after, before: canonical globs; no glob at all matches nothing.
    """
    if set(after) <= set(before) or "*" in before or "/*" in before:
        return None
    # First without a percent sign: what is found then is a path that can be asked for as it stands.
    for percent in (False, True):
        found = _search(after, before, percent)
        if found is not None:
            return Witness(found, not percent and found != "")
    return None


def _search(after: Sequence[str], before: Sequence[str], percent: bool) -> str | None:
    """The word, None if there is none, "" if there were too many states to tell."""
    start = (_closed(after, ((i, 0) for i in range(len(after)))), _closed(before, ((i, 0) for i in range(len(before)))))
    queue = deque([(start[0], start[1], _START, "")])
    seen = {(start[0], start[1], _START)}
    letters = _letters([*after, *before], percent)
    while queue:
        ours, theirs, shape, word = queue.popleft()
        if shape in (_SLASH, _WITHIN) and _accepts(after, ours) and not _accepts(before, theirs):
            return word
        for letter in letters:
            next_shape = _shape(shape, letter)
            if next_shape is None or not (next_ours := _step(after, ours, letter)):
                continue
            state = (next_ours, _step(before, theirs, letter), next_shape)
            if state not in seen:
                if len(seen) >= _MOST_STATES:
                    return ""
                seen.add(state)
                queue.append((*state, word + letter))
    return None


def _letters(globs: Iterable[str], percent: bool) -> list[str]:
    """One letter for each way that a character can matter: those that are named, and one that is not."""
    named = set("".join(globs)) - {"*"}
    spare = next((one for one in _SPARE if one not in named), "\u00b5")
    return [spare, *sorted((named | {"/", ".", ";"}) - ({"%"} if not percent else set()))]


def _shape(shape: int, letter: str) -> int | None:
    """Where in a path's segment the word ends; None: no canonical path begins like that."""
    if shape == _START:
        return _SLASH if letter == "/" else None
    if letter == "/":
        return _SLASH if shape == _WITHIN else None
    if letter == ";" and shape in (_DOT, _DOTS):
        return None
    if letter == "." and shape in (_SLASH, _DOT):
        return _DOT if shape == _SLASH else _DOTS
    return _WITHIN


def _closed(globs: Sequence[str], states: Iterable[tuple[int, int]]) -> _States:
    found = set()
    for glob, at in states:
        found.add((glob, at))
        while at < len(globs[glob]) and globs[glob][at] == "*":
            at += 1
            found.add((glob, at))
    return frozenset(found)


def _step(globs: Sequence[str], states: _States, letter: str) -> _States:
    after = []
    for glob, at in states:
        if at < len(globs[glob]):
            if globs[glob][at] == "*":
                after.append((glob, at))
            elif globs[glob][at] == letter:
                after.append((glob, at + 1))
    return _closed(globs, after)


def _accepts(globs: Sequence[str], states: _States) -> bool:
    return any(at == len(globs[glob]) for glob, at in states)
