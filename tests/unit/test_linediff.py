"""Hunks: exact for any bytes, one by one as git takes them, and in bounded time whatever a guest makes up."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmsandbox.review.linediff import MAX_BYTES, MAX_LINES, apply_hunks, hunks_of, split_lines
from vmsandbox.review.patch import hunk_bytes
from vmsandbox.review.values import Hunk

# Few different lines, so that they repeat; with and without a last newline, CRLF, a lone CR, no UTF-8.
LINES = st.lists(st.sampled_from([b"a", b"b", b"c", b"{", b"}", b"", b"x\r", b"\xff\xfe", b"a\rb"]), max_size=40)
FILES = st.builds(
    lambda lines, last: b"".join(line + b"\n" for line in lines) + last, LINES, st.sampled_from([b"", b"a", b"\r"])
)


def hunks(old: bytes, new: bytes) -> tuple[Hunk, ...]:
    found = hunks_of(old, new)
    assert found is not None
    return found


@given(FILES, FILES)
def test_all_is_the_new_file_and_none_the_old(old: bytes, new: bytes) -> None:
    found = hunks(old, new)
    assert apply_hunks(old, found, range(len(found))) == new
    assert apply_hunks(old, found, ()) == old
    assert bool(found) == (old != new)


@given(FILES, FILES, st.integers(0, 5))
def test_a_hunk_says_what_it_is(old: bytes, new: bytes, context: int) -> None:
    found = hunks_of(old, new, context)
    assert found is not None
    old_lines, new_lines = split_lines(old), split_lines(new)
    for hunk in found:
        minus = [line for sign, line in hunk.lines if sign != "+"]
        plus = [line for sign, line in hunk.lines if sign != "-"]
        assert (len(minus), len(plus)) == (hunk.old_count, hunk.new_count)
        assert any(sign != " " for sign, _ in hunk.lines)
        assert old_lines[max(hunk.old_start - 1, 0) :][: len(minus)] == minus
        assert new_lines[max(hunk.new_start - 1, 0) :][: len(plus)] == plus


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_subset_is_what_git_applies(tmp_path: Path, data: st.DataObject) -> None:
    old = data.draw(FILES)
    lines = split_lines(old)
    new_lines = list(lines)
    for _ in range(data.draw(st.integers(1, 5))):  # edits that are far apart: several hunks
        at = data.draw(st.integers(0, len(new_lines)))
        new_lines[at : at + data.draw(st.integers(0, 2))] = data.draw(st.lists(st.just(b"new\n"), max_size=2))
    new = b"".join(new_lines)
    found = hunks(old, new)
    chosen = [index for index in range(len(found)) if data.draw(st.booleans())]
    assert apply_hunks(old, found, chosen) == git_applies(tmp_path, old, [found[index] for index in chosen])


def git_applies(folder: Path, old: bytes, chosen: Sequence[Hunk]) -> bytes:
    """The file after `git apply` of a patch of just these hunks."""
    file = folder / "file"
    file.write_bytes(old)
    patch = b"diff --git a/file b/file\n--- a/file\n+++ b/file\n"
    moved = 0
    for hunk in chosen:  # the new side's numbers follow from what was applied before
        start = hunk.old_start + moved + bool(hunk.new_count) - bool(hunk.old_count)
        patch += hunk_bytes(hunk._replace(new_start=start))
        moved += hunk.new_count - hunk.old_count
    if chosen:
        git(folder, "apply", "--whitespace=nowarn", "-", stdin=patch)
    return file.read_bytes()


def git(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(folder), "GIT_DIR": os.devnull}
    done = subprocess.run(
        ["git", *arguments], input=stdin, cwd=folder, env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, (done.stderr, stdin)
    return done.stdout


def test_small_edits_of_a_large_file_are_small_hunks() -> None:
    old = [b"line %d\n" % (number % 700) for number in range(20_000)]
    new = list(old)
    new[5_000] = b"changed\n"
    new.insert(12_000, b"added\n")
    del new[18_000]
    found = hunks(b"".join(old), b"".join(new))
    assert [(hunk.old_start, hunk.old_count, hunk.new_count) for hunk in found] == [
        (4_998, 7, 7),
        (11_998, 6, 7),
        (17_997, 7, 6),
    ]


def numbered(numbers: Sequence[object]) -> bytes:
    return b"".join(b"%s\n" % str(number).encode() for number in numbers)


COUNT = 20_000
CHANCE = random.Random(1)
HOSTILE = {
    "reversed": (range(COUNT), range(COUNT)[::-1]),
    "interleaved": (range(COUNT), [x for number in range(COUNT) for x in (f"z{number}", number)]),
    "two lines": ([i % 2 for i in range(COUNT)], [i * 7 // 3 % 2 for i in range(COUNT)]),
    "few lines, random": ([CHANCE.randrange(9) for _ in range(COUNT)], [CHANCE.randrange(9) for _ in range(COUNT)]),
    "shuffled": (range(COUNT), CHANCE.sample(range(COUNT), COUNT)),
    "each twice, reversed": ([i // 2 for i in range(COUNT)], [i // 2 for i in range(COUNT)][::-1]),
    "nested": ([*range(COUNT // 2), *range(COUNT // 2)], [i // 2 for i in range(COUNT)]),
    "blocks moved": (
        [f"{b}.{i % 40}" for b in range(COUNT // 100) for i in range(100)],
        [f"{b}.{i % 40}" for b in reversed(range(COUNT // 100)) for i in range(100)],
    ),
    # Lines that are there twice until the end is split off, then the one before it, and so on.
    "chain": (
        [x for i in range(COUNT // 2) for x in (i, "o", i - 1)],
        [x for i in range(COUNT // 2) for x in (i, "p", "p", i - 1)],
    ),
    # Anchors that split off one line a time, with repeats between them.
    "staircase": (
        [x for i in range(COUNT // 4) for x in (i, "a", "b", i)],
        [x for i in range(COUNT // 4) for x in ("b", i, i, "a")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_repetition_takes_bounded_time(name: str) -> None:
    """difflib needs minutes for some of these; processor time, so that a busy host does not fail it."""
    old, new = (numbered(list(side)) for side in HOSTILE[name])
    began = time.process_time()
    found = hunks(old, new)
    assert time.process_time() - began < 5
    assert apply_hunks(old, found, range(len(found))) == new


def test_a_hopeless_stretch_leaves_something_for_the_others() -> None:
    hopeless = (
        numbered([CHANCE.randrange(9) for _ in range(6000)]),
        numbered([CHANCE.randrange(9) for _ in range(6000)]),
    )
    repeating = numbered([number % 50 for number in range(2000)])
    before, _, after = repeating.replace(b"7\n", b"seven\n", 1).rpartition(b"\n27\n")
    changed = before + b"\n" + after
    found = hunks(hopeless[0] + b"between\n" + repeating, hopeless[1] + b"between\n" + changed)
    assert [(hunk.old_count, hunk.new_count) for hunk in found[-2:]] == [(7, 7), (7, 6)]


def test_what_is_no_text_has_no_hunks() -> None:
    assert hunks_of(b"a\0b", b"a") is None
    assert hunks_of(b"a", b"a\0") is None
    assert hunks_of(b"", b"x" * (MAX_BYTES + 1)) is None
    assert hunks_of(b"", b"\n" * (MAX_LINES + 1)) is None
    assert hunks_of(b"", b"") == ()
    assert hunks_of(b"", b"a") == (Hunk(0, 0, 1, 1, (("+", b"a"),)),)
    assert hunks_of(b"a\n", b"a") == (Hunk(1, 1, 1, 1, (("-", b"a\n"), ("+", b"a"))),)


def test_hunks_of_another_file_are_refused() -> None:
    found = hunks(b"a\nb\nc\n", b"a\nX\nc\n")
    for old, chosen in itertools.product([b"a\nB\nc\n", b"", b"a\nb\n"], [(), (0,)]):
        with pytest.raises(ValueError, match="does not fit"):
            apply_hunks(old, found, chosen)
    with pytest.raises(ValueError, match="there are 1 hunks"):
        apply_hunks(b"a\nb\nc\n", found, (1,))
