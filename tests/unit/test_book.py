"""The ledger: what was written is there whatever happens to who wrote it; what cannot be read decides nothing."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from apply_trees import small_disk

from vmsandbox import failpoints
from vmsandbox.ledger.book import Kind, Ledger, LedgerError, NewerLedgerError
from vmsandbox.ledger.processes import Process, boot_id, process_started

THING = (Kind.SOCKETS, "one-1a2b3c")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "home" / "ledger.sqlite")


def identities(ledger: Ledger, session: str | None = None) -> list[str]:
    return [row.identity for row in ledger.rows(session)]


def in_child(work: Callable[[], object]) -> int:
    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    return child.exitcode or 0


def test_what_is_planned_is_there_until_it_is_gone(ledger: Ledger) -> None:
    assert ledger.rows() == []
    assert not ledger.path.exists(), "to look makes nothing"
    ledger.plan("s1", THING, (Kind.DOMAIN, "u1"))
    ledger.plan("s2", THING)
    assert sorted(identities(ledger, "s1")) == ["one-1a2b3c", "u1"]
    ledger.gone("s1", THING)
    assert identities(ledger, "s1") == ["u1"] and identities(ledger, "s2") == ["one-1a2b3c"]
    ledger.forget("s1")
    assert [row.session for row in ledger.rows()] == ["s2"]
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_it_is_written_before_and_stays_when_the_making_fails(ledger: Ledger) -> None:
    with pytest.raises(OSError, match="no"), ledger.planned("s", Kind.SNAPSHOT, "one/snapshots/a"):
        assert identities(ledger) == ["one/snapshots/a"]
        raise OSError("no")
    assert identities(ledger) == ["one/snapshots/a"]
    with ledger.for_a_while("t", THING):
        assert len(ledger.rows()) == 2
    assert identities(ledger) == ["one/snapshots/a"]


def test_a_kill_right_after_leaves_the_row(ledger: Ledger) -> None:
    def child() -> None:
        with failpoints.switched_on(lambda name: failpoints.act("kill") if name == "ledger.planned" else None):
            ledger.plan("s", THING)

    assert in_child(child) == -9
    (row,) = ledger.rows()
    assert row.identity == THING[1] and not row.maker_is_alive


def test_a_child_has_a_connection_of_its_own(ledger: Ledger) -> None:
    ledger.plan("parent", THING)
    assert in_child(lambda: ledger.plan("child", THING)) == 0
    ledger.plan("parent", (Kind.DOMAIN, "u"))
    assert sorted({row.session for row in ledger.rows()}) == ["child", "parent"]


def test_many_at_once_lose_nothing(ledger: Ledger) -> None:
    def work(number: int) -> None:
        for count in range(10):
            ledger.plan(f"s{number}", (Kind.DOMAIN, f"{number}-{count}"))
            if count % 2:
                ledger.gone(f"s{number}", (Kind.DOMAIN, f"{number}-{count}"))

    children = [FORK.Process(target=work, args=(number,)) for number in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 8
    assert len(ledger.rows()) == 8 * 5


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to be looked at" * 40, b"SQLite format 3\0"]
)
def test_a_damaged_one_decides_nothing_and_is_kept(ledger: Ledger, content: bytes) -> None:
    ledger.path.parent.mkdir(parents=True)
    ledger.path.write_bytes(content)
    with pytest.raises(LedgerError) as failure:
        ledger.plan("s", THING)
    assert "--new-ledger" in failure.value.resolution
    with pytest.raises(LedgerError):
        ledger.rows()
    ledger.gone("s", THING)  # an end goes on without it
    ledger.forget("s")
    assert ledger.path.read_bytes() == content
    aside = ledger.set_aside()
    assert aside.read_bytes() == content
    ledger.plan("s", THING)
    assert identities(ledger) == [THING[1]]


def test_a_page_overwritten_in_the_middle_is_noticed(ledger: Ledger) -> None:
    ledger.plan("s", *((Kind.DOMAIN, str(number)) for number in range(2000)))
    plain = sqlite3.connect(ledger.path)
    plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    plain.close()
    with ledger.path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096 * 4))
    with pytest.raises(LedgerError):
        Ledger(ledger.path).rows()


def test_one_of_a_newer_version_is_left_as_it_is(ledger: Ledger) -> None:
    ledger.plan("s", THING)
    other = sqlite3.connect(ledger.path)
    other.execute("PRAGMA user_version = 99")
    other.close()
    for one in (ledger, Ledger(ledger.path)):  # one that has it open, and one that comes later
        with pytest.raises(NewerLedgerError, match="newer"):
            one.rows()
        with pytest.raises(NewerLedgerError):
            one.plan("s", (Kind.DOMAIN, "u"))
        one.forget("s")
    other = sqlite3.connect(ledger.path)
    assert other.execute("SELECT count(*) FROM resources").fetchone() == (1,)
    other.close()


def test_another_programs_file_is_not_written_to(ledger: Ledger) -> None:
    ledger.path.parent.mkdir(parents=True)
    other = sqlite3.connect(ledger.path)
    other.execute("CREATE TABLE precious (a)")
    other.execute("PRAGMA user_version = 1")
    other.close()
    with pytest.raises(LedgerError, match="cannot be used"):
        ledger.plan("s", THING)


def _on_a_full_disk(folder: Path) -> None:
    if not small_disk(folder, "tmpfs"):
        os._exit(77)
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.plan("first", THING)
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(LedgerError):
        for number in range(200):
            ledger.plan("more", *((Kind.DOMAIN, f"{number}-{count}") for count in range(100)))
    ledger.gone("first", (Kind.DOMAIN, "nothing"))
    assert "first" in {row.session for row in ledger.rows()}
    filler.unlink()
    ledger.plan("last", THING)
    assert {"first", "last"} <= {row.session for row in ledger.rows()}


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    status = in_child(lambda: _on_a_full_disk(tmp_path / "small"))
    if status == 77:
        pytest.skip("no file system can be mounted here")
    assert status == 0


def test_a_process_is_its_number_its_start_and_its_boot() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        process = Process.of(child.pid)
        assert process.is_alive and Process.parse(str(process)) == process
        assert not Process(child.pid, process.started + 1, process.boot).is_alive
        assert not Process(child.pid, process.started, "another-boot").is_alive
        assert Process(child.pid, process.started + 1, process.boot).end(0) and child.poll() is None
        assert process.end(5)
        assert child.wait(5) == -15
    finally:
        child.kill()
        child.wait()
    assert not process.is_alive and process_started(child.pid) is None and len(boot_id()) == 36


def test_one_that_ignores_the_asking_is_killed() -> None:
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    assert Process.of(child.pid).end(0.1)
    assert child.wait(5) == -9


def test_a_session_pays_milliseconds(ledger: Ledger) -> None:
    """Four writes are what a session makes of them from its beginning to its end."""
    ledger.plan("s", THING)
    began = time.monotonic()
    for number in range(40):
        ledger.plan(f"s{number}", THING, (Kind.DOMAIN, "u"), (Kind.FOLDER, "one"))
    assert (time.monotonic() - began) / 10 < 0.05
