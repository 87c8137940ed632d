"""Which commits change something in places that a policy lets nothing come back from.

A branch is taken whole or not: without its commits that touch such a place, those after them would say something else.
A commit counts if its tree differs there from that of any parent, so that neither a merge nor a revert brings it in.

The trees are the guest's: some of them name more paths than there are atoms (each folder ten times in the one above).
So they are read here, level by level, within a budget; where it does not suffice, every branch has touched something.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from vmsandbox.git.objects import TREE, parse_tree
from vmsandbox.process import Finished

_MOST_PLACES = 100_000  # folders that differ
_MOST_ENTRIES = 500_000  # five seconds
_AT_ONCE = 500  # trees
_MAX_PATH = 4096

Ask = Callable[..., Finished]
TOO_MUCH = "its commits change too much to be looked through for return.denied_paths"


class Denied(NamedTuple):
    """base: the commit that the guest was given, which has touched nothing. rule: path → the pattern, or None."""

    base: str
    rule: Callable[[str], str | None]


class Touched(NamedTuple):
    """Where a commit changed something that is denied. Show the path through `review.text.shown` only."""

    path: str
    rule: str


class _Budget:
    def __init__(self) -> None:
        self.places, self.entries = _MOST_PLACES, _MOST_ENTRIES


_Trees = tuple[str, str | None, str | None]  # prefix, tree before, tree after


def touching(
    ask: Ask, algorithm: str, tips: Iterable[str], new: list[str], denied: Denied
) -> dict[str, Touched | None]:
    """Tip → what its new commits touch; None: too much to be looked through. Those that touch nothing are left out.

    ask: git in the quarantine. new: revisions (`^…`) that what the tips reach is cut at.
    """
    parents = _parents(ask, tips, new)
    roots = _root_trees(ask, parents)
    pairs: dict[_Trees, set[str]] = {}
    for commit, above in parents.items():
        befores: list[str | None] = [roots[parent] for parent in above]
        for before in befores or [None]:
            if before != roots[commit]:
                pairs.setdefault(("", before, roots[commit]), set()).add(commit)
    found = _differing(ask, algorithm, pairs, denied.rule)
    if found is None:
        return dict.fromkeys(tips)
    if not found:
        return {}
    out: dict[str, Touched | None] = {}
    for tip in tips:
        hit = next((found[one] for one in _parents(ask, [tip], new) if one in found), None)
        if hit is not None:
            out[tip] = hit
    return out


def _parents(ask: Ask, tips: Iterable[str], new: list[str]) -> dict[str, list[str]]:
    rows = ask("rev-list", "--parents", "--stdin", stdin="".join(f"{one}\n" for one in [*tips, *new]).encode()).text
    words = [row.split() for row in rows.splitlines()]
    return {commit: above for commit, *above in words}


def _root_trees(ask: Ask, parents: dict[str, list[str]]) -> dict[str, str]:
    commits = sorted({*parents, *(one for above in parents.values() for one in above)})
    asked = "".join(f"{one}^{{tree}}\n" for one in commits).encode()
    rows = ask("cat-file", "--batch-check", stdin=asked).text.splitlines()
    return {commit: row.split()[0] for commit, row in zip(commits, rows, strict=True)}


def _differing(
    ask: Ask, algorithm: str, level: dict[_Trees, set[str]], rule: Callable[[str], str | None]
) -> dict[str, Touched] | None:
    """Commit → the first denied place in which its trees differ. None: over the budget."""
    found: dict[str, Touched] = {}
    budget = _Budget()
    while level:
        further: dict[_Trees, set[str]] = {}
        items = list(level.items())
        for start in range(0, len(items), _AT_ONCE // 2):
            part = items[start : start + _AT_ONCE // 2]
            trees = _read(ask, algorithm, {one for (_, *both), _ in part for one in both if one is not None})
            for (prefix, before, after), commits in part:
                budget.places -= 1
                commits -= found.keys()
                if not commits:
                    continue
                for path, old, new in _entries(prefix, trees.get(before or ""), trees.get(after or "")):
                    budget.entries -= 1
                    if budget.places < 0 or budget.entries < 0 or len(path) > _MAX_PATH:
                        return None
                    if (pattern := rule(path)) is not None:
                        found.update(dict.fromkeys(commits, Touched(path, pattern)))
                        break
                    if old is not None or new is not None:
                        further.setdefault((f"{path}/", old, new), set()).update(commits)
        level = further
    return found


def _entries(
    prefix: str, before: dict[bytes, tuple[int, bytes]] | None, after: dict[bytes, tuple[int, bytes]] | None
) -> Iterator[tuple[str, str | None, str | None]]:
    """(path, tree before, tree after) of each entry that differs; None where it is no tree."""
    old, new = before or {}, after or {}
    for name in {**old, **new}:
        one, other = old.get(name), new.get(name)
        if one != other:
            yield prefix + os.fsdecode(name), _tree(one), _tree(other)


def _tree(entry: tuple[int, bytes] | None) -> str | None:
    return entry[1].hex() if entry is not None and entry[0] == TREE else None


def _read(ask: Ask, algorithm: str, oids: set[str]) -> dict[str, dict[bytes, tuple[int, bytes]]]:
    if not oids:
        return {}
    found: dict[str, dict[bytes, tuple[int, bytes]]] = {}
    output = ask("cat-file", "--batch", stdin="".join(f"{one}\n" for one in sorted(oids)).encode()).stdout
    for oid, content in batch(output):
        found[oid] = {name: (mode, raw) for mode, name, raw in parse_tree(content, algorithm)}
    return found


def batch(output: bytes) -> Iterator[tuple[str, bytes]]:
    """`cat-file --batch`: "id type size", newline, the bytes, newline."""
    at = 0
    while at < len(output):
        end = output.index(b"\n", at)
        oid, _kind, size = output[at:end].split(b" ")
        yield oid.decode(), output[end + 1 : end + 1 + int(size)]
        at = end + 2 + int(size)
