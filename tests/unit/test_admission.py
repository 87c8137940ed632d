"""Who gets the host's memory and disk: nothing is promised twice, nobody is overtaken, and the dead have no claims."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.ledger.admission import (
    QEMU,
    Need,
    Room,
    admitted,
    drop_dead,
    release,
    reservations,
    someone_is_starting,
    waiting,
)
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.ledger.processes import Process, private_memory

MIB = 1 << 20
GIB = 1 << 30
FORK = multiprocessing.get_context("fork")
GUEST = Need("one", 640 * MIB, 512 * MIB)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def room(memory: int, disk: int = 1000 * GIB) -> Room:
    return Room(memory, disk)


def take(ledger: Ledger, owner: str, need: Need, there: Room, patience: float | None = 0) -> None:
    with admitted(ledger, owner, need, lambda: there, patience=patience):
        pass


def test_twenty_guests_of_512_mib_fit_into_a_machine_of_24_gib(ledger: Ledger) -> None:
    there = room(23 * GIB - 24 * GIB // 20, 60 * GIB)
    for number in range(20):
        take(ledger, f"s{number}", GUEST, there)
    assert len(reservations(ledger)) == 20


def test_what_does_not_fit_is_refused_with_who_has_it(ledger: Ledger) -> None:
    take(ledger, "s1", Need("first", 2 * GIB, GIB), room(3 * GIB))
    with pytest.raises(HostError) as failure:
        take(ledger, "s2", Need("second", 2 * GIB, GIB), room(3 * GIB))
    error = failure.value
    assert "2.0 GiB of memory are needed, 1.0 GiB are free" in error.details
    assert "reserved by first: 2.0 GiB" in error.details and "--wait" in error.resolution
    assert [one.owner for one in reservations(ledger)] == ["s1"]
    release(ledger, "s1")
    take(ledger, "s2", Need("second", 2 * GIB, GIB), room(3 * GIB))


def test_disk_is_promised_as_memory_is(ledger: Ledger) -> None:
    take(ledger, "s1", Need("first", MIB, 3 * GIB), room(GIB, 4 * GIB))
    with pytest.raises(HostError, match="no room") as failure:
        take(ledger, "s2", Need("second", MIB, 2 * GIB), room(GIB, 4 * GIB))
    assert "2.0 GiB of disk are needed, 1.0 GiB are free" in failure.value.details


def test_more_than_the_host_has_is_refused_at_once_also_when_waiting(ledger: Ledger) -> None:
    with pytest.raises(UserInputError, match="in all"):
        take(ledger, "s", Need("huge", 1 << 50, 0), room(1 << 51), patience=None)
    assert waiting(ledger) == []


def test_a_start_that_fails_gives_back(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError), admitted(ledger, "starting-1", GUEST, lambda: room(GIB)):
        assert someone_is_starting(ledger)
        raise RuntimeError
    assert reservations(ledger) == [] and not someone_is_starting(ledger)


def test_the_reservation_becomes_the_sessions(ledger: Ledger) -> None:
    with admitted(ledger, "starting-1", GUEST, lambda: room(GIB)):
        ledger.plan("session", (Kind.DOMAIN, "u"), reserved_as="starting-1")
    assert [one.owner for one in reservations(ledger)] == ["session"]
    assert not someone_is_starting(ledger)
    ledger.forget("session")
    assert reservations(ledger) == []


def _one_of_many(path: Path, number: int, start: object, end: object, got: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    try:
        take(Ledger(path), f"s{number}", Need(f"s{number}", GIB, 0), room(4 * GIB))
    except HostError:
        os._exit(7)
    with got.get_lock():  # type: ignore[attr-defined]
        got.value += 1  # type: ignore[attr-defined]
    end.wait(30)  # type: ignore[attr-defined]


def test_of_ten_at_once_as_many_get_it_as_there_is_room_for(ledger: Ledger) -> None:
    start, end, got = FORK.Barrier(10), FORK.Event(), FORK.Value("i", 0)
    children = [FORK.Process(target=_one_of_many, args=(ledger.path, n, start, end, got)) for n in range(10)]
    for child in children:
        child.start()
    until = time.monotonic() + 30
    while sum(child.exitcode == 7 for child in children) < 6 and time.monotonic() < until:
        time.sleep(0.02)
    assert got.value == 4
    assert len(reservations(ledger)) == 4
    end.set()
    for child in children:
        child.join(30)
    assert reservations(ledger) == [], "who is gone has no claim"
    drop_dead(ledger)
    with ledger.transaction(write=False) as connection:
        assert connection.execute("SELECT count(*) FROM reservations").fetchone() == (0,)


def test_what_a_guest_uses_already_is_not_counted_twice(ledger: Ledger) -> None:
    script = "data = bytearray(200 << 20); data[::4096] = b'x' * len(data[::4096]); print(flush=True); input()"
    guest = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert guest.stdout is not None and guest.stdout.readline()
        assert private_memory(guest.pid) >= 200 * MIB
        take(ledger, "s", Need("one", 640 * MIB, 0), room(GIB))
        ledger.plan("s", (Kind.PROCESS, f"{Process.of(guest.pid)} {QEMU}"))
        (one,) = reservations(ledger)
        assert 200 * MIB <= one.memory_used < 300 * MIB and one.memory_open == one.memory - one.memory_used
        # The kernel counts what is in use as not available any more.
        take(ledger, "t", Need("two", 640 * MIB, 0), room(one.memory_open + 640 * MIB))
        with pytest.raises(HostError):
            take(ledger, "u", Need("three", 2 * MIB, 0), room(one.memory_open + 640 * MIB))
    finally:
        guest.kill()
        guest.wait()


def test_a_kept_session_keeps_its_promise_as_long_as_its_guest_lives(ledger: Ledger) -> None:
    guest = subprocess.Popen(["sleep", "60"])

    def start() -> None:
        take(ledger, "s", GUEST, room(GIB))
        ledger.plan("s", (Kind.PROCESS, f"{Process.of(guest.pid)} {QEMU}"))

    child = FORK.Process(target=start)
    child.start()
    child.join(30)
    try:
        assert [one.owner for one in reservations(ledger)] == ["s"]
    finally:
        guest.kill()
        guest.wait()
    assert reservations(ledger) == []


def test_they_are_served_in_the_order_of_their_coming(ledger: Ledger) -> None:
    there = [room(GIB)]
    served: list[str] = []
    positions: list[tuple[str, int]] = []

    def wait(label: str, memory: int) -> None:
        with admitted(
            ledger, label, Need(label, memory, 0), lambda: there[0], patience=30,
            queued=lambda position: positions.append((label, position)),
        ):  # fmt: skip
            served.append(label)

    threads = []
    for label, memory in (("big", 3 * GIB), ("small", 512 * MIB), ("other", 3 * GIB)):
        threads.append(threading.Thread(target=wait, args=(label, memory)))
        threads[-1].start()
        until = time.monotonic() + 20
        while len(waiting(ledger)) < len(threads) and time.monotonic() < until:
            time.sleep(0.02)
    time.sleep(0.8)
    assert served == [], "the small one would fit, but the big one came first"
    assert waiting(ledger) == ["big", "small", "other"]
    with pytest.raises(HostError, match="no room") as failure:
        take(ledger, "late", Need("late", 100 * MIB, 0), there[0])
    assert "waits ahead of it: big" in failure.value.details
    there[0] = room(7 * GIB)
    for thread in threads:
        thread.join(20)
    assert sorted(served) == ["big", "other", "small"] and waiting(ledger) == []
    assert {("big", 1), ("small", 2), ("other", 3)} <= set(positions)


def test_patience_ends(ledger: Ledger) -> None:
    began = time.monotonic()
    with pytest.raises(HostError):
        take(ledger, "s", GUEST, room(0), patience=0.5)
    assert 0.5 <= time.monotonic() - began < 5
    assert waiting(ledger) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_who_goes_leaves_the_queue(ledger: Ledger, number: signal.Signals) -> None:
    def wait() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            take(ledger, "s", GUEST, room(0), patience=None)
        except KeyboardInterrupt:
            os._exit(5)

    child = FORK.Process(target=wait)
    child.start()
    until = time.monotonic() + 20
    while waiting(ledger) != ["one"] and time.monotonic() < until:
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(20)
    assert child.exitcode == (5 if number == signal.SIGINT else -9)
    assert waiting(ledger) == []
    take(ledger, "t", GUEST, room(GIB))


def test_a_margin_stays(tmp_path: Path) -> None:
    available = int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    there = Room.of(tmp_path / "not" / "there")
    assert there.memory <= available - 400 * MIB
    disk = os.statvfs(tmp_path)
    assert abs(there.disk - (disk.f_bavail * disk.f_frsize - GIB)) < 512 * MIB
