"""Which lines changed, as hunks that can be taken one by one.

A guest chooses both the file and how it repeats itself, and the standard library's difflib needs minutes for a
few thousand lines chosen badly. Here the work has a ceiling: lines that are there once on both sides anchor the
comparison (patience diff: Bram Cohen, 2010), what is between them is compared by Myers' algorithm ("An O(ND)
Difference Algorithm", 1986), and a stretch that would cost too much is shown as replaced as a whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterator, Sequence

from vmsandbox.review.values import Hunk

MAX_BYTES = 4 << 20  # of one file; more than that nobody reads line by line
MAX_LINES = 60_000
_STEPS = 3_000_000  # of the comparison, in all: about two seconds

_Range = tuple[int, int, int, int]  # old from, old to, new from, new to


class _TooDear(Exception):
    """Not an error: comparing a stretch would cost more than is left, or find nothing."""


def is_text(data: bytes) -> bool:
    """Whether it can be shown line by line: no NUL, not too large, not too many lines."""
    return len(data) <= MAX_BYTES and b"\0" not in data and data.count(b"\n") <= MAX_LINES


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their line ending. Only a newline ends a line, as for git; the last one may have none."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def hunks_of(old: bytes, new: bytes, context: int = 3) -> tuple[Hunk, ...] | None:
    """What changed from old to new, in order; no hunks if they are the same, None if one of them is not text.

    context: lines shown around a change. Changes that are at most twice as far apart are one hunk. The time is
    bounded for any input; the hunks are exact, but need not be the fewest.
    """
    if not (is_text(old) and is_text(new)):
        return None
    old_lines, new_lines = split_lines(old), split_lines(new)
    return tuple(_as_hunks(old_lines, new_lines, differences(old_lines, new_lines), context))


def apply_hunks(old: bytes, hunks: Sequence[Hunk], chosen: Collection[int]) -> bytes:
    """The old bytes with just the chosen hunks (indexes into `hunks`) put in.

    Raises:
        ValueError: a hunk that does not fit the old bytes, or an index that is none.
    """
    unknown = set(chosen) - set(range(len(hunks)))
    if unknown:
        raise ValueError(f"there are {len(hunks)} hunks, asked for {sorted(unknown)}")
    lines = split_lines(old)
    out: list[bytes] = []
    position = 0
    for index, hunk in enumerate(hunks):
        start = hunk.old_start - 1 if hunk.old_count else hunk.old_start
        end = start + hunk.old_count
        replaced = [line for sign, line in hunk.lines if sign != "+"]
        if start < position or lines[start:end] != replaced or len(replaced) != hunk.old_count:
            raise ValueError(f"hunk {index} does not fit the old file")
        out += lines[position:start]
        out += [line for sign, line in hunk.lines if sign != "-"] if index in chosen else replaced
        position = end
    return b"".join(out + lines[position:])


def differences(old_items: Sequence[Hashable], new_items: Sequence[Hashable], steps: int = _STEPS) -> list[_Range]:
    """Stretches that differ (old from, old to, new from, new to), in order; between them the two are the same.

    steps: how much work is put into finding what they have in common.
    """
    numbers: dict[Hashable, int] = {}
    old = [numbers.setdefault(item, len(numbers)) for item in old_items]
    new = [numbers.setdefault(item, len(numbers)) for item in new_items]
    left = [steps]
    stack: list[_Range] = [(0, len(old), 0, len(new))]
    found: list[_Range] = []
    while stack:
        a, a_end, b, b_end = _trimmed(old, new, stack.pop())
        if a == a_end or b == b_end:
            if (a, b) != (a_end, b_end):
                found.append((a, a_end, b, b_end))
            continue
        try:
            parts = _split(old, new, (a, a_end, b, b_end), left)
        except _TooDear:
            found.append((a, a_end, b, b_end))
            continue
        stack += reversed(parts)
    return list(_joined(found))


def _joined(found: list[_Range]) -> Iterator[_Range]:
    """Neighbours with nothing between them as one."""
    current: _Range | None = None
    for part in found:
        if current is not None and current[1] == part[0] and current[3] == part[2]:
            current = (current[0], part[1], current[2], part[3])
            continue
        if current is not None:
            yield current
        current = part
    if current is not None:
        yield current


def _trimmed(old: list[int], new: list[int], part: _Range) -> _Range:
    a, a_end, b, b_end = part
    while a < a_end and b < b_end and old[a] == new[b]:
        a, b = a + 1, b + 1
    while a < a_end and b < b_end and old[a_end - 1] == new[b_end - 1]:
        a_end, b_end = a_end - 1, b_end - 1
    return a, a_end, b, b_end


def _split(old: list[int], new: list[int], part: _Range, left: list[int]) -> list[_Range]:
    """The parts of a stretch that still have to be compared: between anchors, or Myers' own, which are final.

    Final ones come back as they are: they have nothing on one side, or no line in common.
    """
    a, a_end, b, b_end = part
    _spend(left, (a_end - a) + (b_end - b))
    if set(old[a:a_end]).isdisjoint(new[b:b_end]):
        raise _TooDear  # nothing to find
    anchors = _anchors(old, new, part)
    if anchors:
        parts = []
        for x, y in anchors:
            parts.append((a, x, b, y))
            a, b = x + 1, y + 1
        return [*parts, (a, a_end, b, b_end)]
    return _myers(old, new, part, left)


def _spend(left: list[int], steps: int) -> None:
    left[0] -= steps
    if left[0] < 0:
        raise _TooDear


def _anchors(old: list[int], new: list[int], part: _Range) -> list[tuple[int, int]]:
    """Lines that are there exactly once on both sides, the longest row of them that is in order on both."""
    a, a_end, b, b_end = part
    in_old = _once(old, a, a_end)
    in_new = _once(new, b, b_end)
    pairs = [(x, in_new[line]) for line, x in in_old.items() if line in in_new]
    # Longest increasing subsequence of the new positions, by patience sorting. Pairs are in old's order.
    tops: list[int] = []
    piles: list[int] = []
    before: list[int] = []
    for index, (_, y) in enumerate(pairs):
        at = bisect_left(tops, y)
        before.append(piles[at - 1] if at else -1)
        if at == len(tops):
            tops.append(y)
            piles.append(index)
        else:
            tops[at], piles[at] = y, index
    row = []
    index = piles[-1] if piles else -1
    while index >= 0:
        row.append(pairs[index])
        index = before[index]
    return row[::-1]


def _once(lines: list[int], start: int, end: int) -> dict[int, int]:
    """Position of each line that is there once, in order."""
    found: dict[int, int] = {}
    for position in range(start, end):
        found[lines[position]] = -1 if lines[position] in found else position
    return {line: position for line, position in found.items() if position >= 0}


def _myers(old: list[int], new: list[int], part: _Range, left: list[int]) -> list[_Range]:
    """The shortest edit of one stretch, as stretches with nothing in common.

    furthest[k] is how far in the old lines a path on diagonal k (old minus new position) has come with d
    edits; each round is kept, to walk back from the end.
    """
    a0, a_end, b0, b_end = part
    n, m = a_end - a0, b_end - b0
    furthest = {1: 0}
    rounds: list[dict[int, int]] = []
    while True:
        d = len(rounds)
        # Half of what is left: a hopeless stretch must not take all from those behind it.
        if d * d > left[0] // 2:
            raise _TooDear
        steps = d + 1
        now: dict[int, int] = {}
        for k in range(-d, d + 1, 2):
            down = k == -d or (k != d and furthest.get(k - 1, -1) < furthest.get(k + 1, -1))
            x = furthest[k + 1] if down else furthest[k - 1] + 1
            y = x - k
            start = x
            while x < n and y < m and old[a0 + x] == new[b0 + y]:
                x, y = x + 1, y + 1
            steps += x - start
            now[k] = x
            if x >= n and y >= m:
                rounds.append(now)
                return _walk_back(rounds, part)
        _spend(left, steps)
        rounds.append(now)
        furthest = now


def _walk_back(rounds: list[dict[int, int]], part: _Range) -> list[_Range]:
    a0, a_end, b0, b_end = part
    x, y = a_end - a0, b_end - b0
    edits: list[_Range] = []
    for d in range(len(rounds) - 1, 0, -1):
        furthest = rounds[d - 1]
        k = x - y
        down = k == -d or (k != d and furthest.get(k - 1, -1) < furthest.get(k + 1, -1))
        came_from = k + 1 if down else k - 1
        before_x = furthest[came_from]
        before_y = before_x - came_from
        after_x, after_y = (before_x, before_y + 1) if down else (before_x + 1, before_y)
        edits.append((a0 + before_x, a0 + after_x, b0 + before_y, b0 + after_y))
        x, y = before_x, before_y
    return list(_joined(edits[::-1]))


def _as_hunks(old: list[bytes], new: list[bytes], changes: list[_Range], context: int) -> Iterator[Hunk]:
    group: list[_Range] = []
    for change in changes:
        if group and change[0] - group[-1][1] > 2 * context:
            yield _hunk(old, new, group, context)
            group = []
        group.append(change)
    if group:
        yield _hunk(old, new, group, context)


def _hunk(old: list[bytes], new: list[bytes], group: list[_Range], context: int) -> Hunk:
    start = max(group[0][0] - context, 0)
    end = min(group[-1][1] + context, len(old))
    new_start = group[0][2] - (group[0][0] - start)
    new_end = group[-1][3] + (end - group[-1][1])
    lines: list[tuple[str, bytes]] = []
    position = start
    for a, a_end, b, b_end in group:
        lines += [(" ", line) for line in old[position:a]]
        lines += [("-", line) for line in old[a:a_end]]
        lines += [("+", line) for line in new[b:b_end]]
        position = a_end
    lines += [(" ", line) for line in old[position:end]]
    old_count, new_count = end - start, new_end - new_start
    # As `diff -u` counts: the line before it, if there is none of that side.
    return Hunk(start + bool(old_count), old_count, new_start + bool(new_count), new_count, tuple(lines))
