"""The journal: whatever is done to its file, the first record that is not what was written is named."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from vmsandbox.errors import JournalError
from vmsandbox.journal import events
from vmsandbox.journal.chain import GENESIS, Journal, record_hash, verified_records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "events.jsonl")
    for number in range(6):
        journal.append(events.CommandEnded(number, 0.5))
    return journal.path


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def first_bad(path: Path) -> str:
    with pytest.raises(JournalError) as bad:
        list(verified_records(path))
    return bad.value.brief


def test_records_are_chained(path: Path) -> None:
    records = list(verified_records(path))
    assert [record["seq"] for record in records] == list(range(6))
    assert [record["prev"] for record in records] == [GENESIS, *(record["hash"] for record in records[:-1])]
    assert records[2]["kind"] == "command.ended"
    assert records[2]["data"] == {"status": 2, "seconds": 0.5}
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_edit_is_found(path: Path) -> None:
    lines = lines_of(path)
    lines[3] = lines[3].replace(b'"status":3', b'"status":0')
    path.write_bytes(b"".join(lines))
    assert first_bad(path).startswith("record 3 ")


def test_an_edit_with_a_new_hash_is_found_at_the_next_record(path: Path) -> None:
    lines = lines_of(path)
    record = json.loads(lines[3])
    record["data"]["status"] = 0
    record["hash"] = record_hash(record)
    lines[3] = json.dumps(record).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    assert first_bad(path).startswith("record 4 ")


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda lines: lines[:2] + lines[3:], 2),  # deleted
        (lambda lines: lines[1:], 0),  # the first deleted
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 2),  # reordered
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 3),  # doubled
        (lambda lines: [*lines[:5], lines[5][:40]], 5),  # cut in the middle of a record
        (lambda lines: [*lines[:2], b"not json\n", *lines[2:]], 2),
        (lambda lines: [*lines[:2], b"[1, 2]\n", *lines[2:]], 2),
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], 2),
        (lambda lines: [*lines[:2], b"\xff\xfe\n", *lines[2:]], 2),
    ],
)
def test_the_first_bad_record_is_named(path: Path, change: object, bad: int) -> None:
    path.write_bytes(b"".join(change(lines_of(path))))  # type: ignore[operator]
    assert first_bad(path).startswith(f"record {bad} ")


def test_the_good_records_before_the_bad_one_are_still_read(path: Path) -> None:
    path.write_bytes(b"".join(lines_of(path)[:4]) + b"garbage\n")
    seen = []
    with pytest.raises(JournalError):
        for record in verified_records(path):
            seen.append(record["seq"])
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: data.replace(b'"status":5', b'"status":6')])
def test_nothing_is_appended_to_a_damaged_end(path: Path, damage: object) -> None:
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    before = path.read_bytes()
    with pytest.raises(JournalError, match="damaged"):
        Journal(path).append(events.CommandEnded(0, 0))
    assert path.read_bytes() == before


def _append_many(path: Path) -> None:
    for number in range(25):
        Journal(path).append(events.CommandEnded(number, 0))


def test_several_processes_append_to_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path,)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(list(verified_records(path))) == 100


def test_a_link_in_the_journals_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    link = tmp_path / "events.jsonl"
    link.symlink_to(target)
    with pytest.raises(JournalError):
        Journal(link).append(events.CommandEnded(0, 0))
    assert target.read_text() == "kept"


def test_a_guests_words_do_not_fill_the_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    journal.append(events.SessionFailed("x" * 10_000_000, "\x1b[2J\udcff" + "y" * 10_000_000))
    journal.append(events.CommandStarted(["z" * 100_000] * 100_000, False))
    assert journal.path.stat().st_size < 100_000
    assert len(journal.read()) == 2
    assert all(byte < 0x7F for byte in journal.path.read_bytes()), "an escape sequence in the file"


def test_a_full_disk_is_an_error_that_says_so() -> None:
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(Path("/proc/version/events.jsonl")).append(events.CommandEnded(0, 0))


HALF = """
import resource, signal, sys
from pathlib import Path
from vmsandbox.errors import JournalError
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
try:
    Journal(path).append(events.SessionClosed("no room", []))
except JournalError as error:
    print(error.details)
"""


def test_a_record_that_had_room_for_a_part_only_is_taken_back(path: Path) -> None:
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", HALF, path], capture_output=True, text=True, check=True)
    assert "a part of the record" in done.stdout and path.read_bytes() == before
    Journal(path).append(events.SessionClosed("there is room again", []))
    assert len(list(verified_records(path))) == before.count(b"\n") + 1
