"""Who may have how much of the host's memory and disk: reserved before it is used, or refused, or waited for.

Without it twenty sessions at once would each look at the memory that is free, see that it is enough, and together
meet the kernel's out-of-memory killer, which does not ask whose work it ends.

What is free for a new one: what the kernel says is available, less a margin, less what was promised to others and is
not in use yet. A promise counts as long as the process that was given it runs, or its guest does (`Kind.PROCESS`).
Those who wait are served in the order of their coming; nobody who comes later gets what they wait for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.ledger.book import Kind, Ledger, LedgerError, now
from vmsandbox.ledger.processes import Process, private_memory

if TYPE_CHECKING:
    import sqlite3

QEMU = "qemu"  # which part of a session a process is
STARTING = "starting-"  # what an owner begins with that has no session yet
_MIB = 1 << 20
_MARGIN_MEMORY, _MARGIN_SHARE = 512 * _MIB, 20  # at least so much stays, or a twentieth of all memory
_MARGIN_DISK = 1 << 30
_LOOK = 0.3  # seconds between two looks of who waits


class NoRoomError(HostError):
    """Others have what somebody needs."""


@dataclass(frozen=True)
class Need:
    """Bytes that somebody is going to use at most. label: who, for people."""

    label: str
    memory: int
    disk: int


@dataclass(frozen=True)
class Room:
    """Bytes of the host that are there for new sessions, before what was promised is taken off."""

    memory: int
    disk: int

    @classmethod
    def of(cls, folder: Path) -> Room:
        """What this host has, less a margin. folder: where sessions have their files (it may not exist yet)."""
        available, total = _memory()
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        disk = os.statvfs(place)
        return cls(available - margin_of(total), disk.f_bavail * disk.f_frsize - _MARGIN_DISK)


def margin_of(total: int) -> int:
    """Bytes of a host's memory that no session gets."""
    return max(_MARGIN_MEMORY, total // _MARGIN_SHARE)


@dataclass(frozen=True)
class Reserved:
    """What was promised to one owner, and how much of it is in use (in bytes)."""

    owner: str
    label: str
    memory: int
    disk: int
    memory_used: int = 0
    disk_used: int = 0

    @property
    def memory_open(self) -> int:
        """What it may still come to use."""
        return max(self.memory - self.memory_used, 0)

    @property
    def disk_open(self) -> int:
        """The same of the disk."""
        return max(self.disk - self.disk_used, 0)


def reservations(ledger: Ledger) -> list[Reserved]:
    """What is promised now. Raises LedgerError."""
    if not ledger.path.exists():
        return []
    with ledger.transaction(write=False) as connection:
        return _promised(connection, ledger.live)


def waiting(ledger: Ledger) -> list[str]:
    """The labels of those who wait, in order. Raises LedgerError."""
    if not ledger.path.exists():
        return []
    with ledger.transaction(write=False) as connection:
        rows = connection.execute("SELECT label, maker FROM queue ORDER BY ticket").fetchall()
    return [label for label, maker in rows if _is_alive(maker)]


def promised_text(ledger: Ledger) -> str:
    """What is promised to whom, and who waits, in one line; "" for nothing. Raises LedgerError."""
    promised, queue = reservations(ledger), waiting(ledger)
    if not promised and not queue:
        return ""
    memory, used = sum(one.memory for one in promised), sum(one.memory_used for one in promised)
    text = f"{_size(memory)} of memory ({_size(used)} in use) and {_size(sum(one.disk for one in promised))} of disk "
    text += f"are reserved by {len(promised)}"
    return text + (f"; waiting for room: {', '.join(queue)}" if queue else "")


@contextmanager
def admitted(
    ledger: Ledger,
    owner: str,
    need: Need,
    room: Callable[[], Room],
    *,
    patience: float | None = 0,
    queued: Callable[[int], None] = lambda _position: None,
) -> Iterator[None]:
    """Reserve what is needed; inside, the reservation is this process's. It stays, unless the context fails.

    Args:
        owner: whose reservation it is, until `release` or `Ledger.forget`.
        room: looks at the host.
        patience: seconds to wait for room; None: for ever.
        queued: told the position in the queue (1: the next one) while it waits, whenever that changes.

    Raises:
        NoRoomError: there is no room; it says who has it. UserInputError: there never will be.
        LedgerError: the ledger cannot be used.
    """
    _reserve_or_wait(ledger, owner, need, room, patience, queued)
    try:
        yield
    except BaseException:
        release(ledger, owner)
        raise


def release(ledger: Ledger, owner: str) -> None:
    """Give a reservation back. None is no error."""
    with suppress(LedgerError), ledger.transaction() as connection:
        connection.execute("DELETE FROM reservations WHERE owner = ?", (owner,))


def drop_dead(ledger: Ledger) -> None:
    """Take out of the ledger what was promised to, or is waited for by, those who are gone."""
    if not ledger.path.exists():
        return
    with suppress(LedgerError), ledger.transaction() as connection:
        kept = {one.owner for one in _promised(connection, ledger.live)}
        for (owner,) in connection.execute("SELECT owner FROM reservations").fetchall():
            if owner not in kept:
                connection.execute("DELETE FROM reservations WHERE owner = ?", (owner,))
        _ahead(connection, None)


def someone_is_starting(ledger: Ledger) -> bool:
    """Whether a session is on its way that has no folder yet. Raises LedgerError."""
    return any(one.owner.startswith(STARTING) for one in reservations(ledger))


def _reserve_or_wait(
    ledger: Ledger,
    owner: str,
    need: Need,
    room: Callable[[], Room],
    patience: float | None,
    queued: Callable[[int], None],
) -> None:
    until = None if patience is None else time.monotonic() + patience
    ticket: int | None = None
    told = 0
    try:
        while True:
            with ledger.transaction() as connection:
                if ticket is None and patience != 0:
                    ticket = _take_ticket(connection, need)
                ahead = _ahead(connection, ticket)
                promised = _promised(connection, ledger.live)
                problem = _problem(need, room(), promised, ahead)
                if problem is None:
                    values = (owner, need.label, need.memory, need.disk, str(Process.here()), now())
                    connection.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?)", values)
                    _drop_ticket(connection, ticket)
                    ticket = None
                    return
            if until is not None and time.monotonic() >= until:
                raise problem
            if isinstance(problem, UserInputError):
                raise problem
            if len(ahead) + 1 != told:
                told = len(ahead) + 1
                queued(told)
            time.sleep(_LOOK)
    finally:
        if ticket is not None:
            with suppress(LedgerError), ledger.transaction() as connection:
                _drop_ticket(connection, ticket)


def _problem(
    need: Need, room: Room, promised: list[Reserved], ahead: list[Need]
) -> NoRoomError | UserInputError | None:
    """Why it does not fit now, beside what is promised and what those ahead wait for."""
    _, total = _memory()
    if need.memory > total:
        return UserInputError(
            f"{need.label} needs {_size(need.memory)} of memory, and this host has {_size(total)} in all",
            resolution="ask for less: --memory MIB",
        )
    free_memory = room.memory - sum(one.memory_open for one in promised)
    free_disk = room.disk - sum(one.disk_open for one in promised)
    needs_memory = need.memory + sum(one.memory for one in ahead)
    needs_disk = need.disk + sum(one.disk for one in ahead)
    what = []
    if needs_memory > free_memory:
        what.append(f"{_size(need.memory)} of memory are needed, {_size(free_memory)} are free to be promised")
    if needs_disk > free_disk:
        what.append(f"{_size(need.disk)} of disk are needed, {_size(free_disk)} are free to be promised")
    if not what:
        return None
    lines = [*what, *(f"waits ahead of it: {one.label}, {_size(one.memory)} of memory" for one in ahead)]
    lines += [
        f"reserved by {one.label}: {_size(one.memory)} of memory ({_size(one.memory_used)} in use), "
        f"{_size(one.disk)} of disk" for one in promised
    ]  # fmt: skip
    return NoRoomError(
        "this host has no room for another guest now",
        details="\n".join(lines),
        resolution="--wait queues for room; `vmsandbox stop NAME` ends a guest; --memory MIB asks for less; "
        "`vmsandbox gc` gives disk back",
    )


def _take_ticket(connection: sqlite3.Connection, need: Need) -> int:
    values = (need.label, need.memory, need.disk, str(Process.here()), now())
    sql = "INSERT INTO queue (label, memory, disk, maker, written) VALUES (?, ?, ?, ?, ?)"
    return int(connection.execute(sql, values).lastrowid or 0)


def _drop_ticket(connection: sqlite3.Connection, ticket: int | None) -> None:
    connection.execute("DELETE FROM queue WHERE ticket = ?", (ticket,))


def _ahead(connection: sqlite3.Connection, ticket: int | None) -> list[Need]:
    """What those want who came before and still wait; who died meanwhile is taken out of the queue."""
    found = []
    rows = connection.execute("SELECT ticket, label, memory, disk, maker FROM queue ORDER BY ticket").fetchall()
    for number, label, memory, disk, maker in rows:
        if ticket is not None and number >= ticket:
            break
        if _is_alive(maker):
            found.append(Need(label, memory, disk))
        else:
            _drop_ticket(connection, number)
    return found


def _promised(connection: sqlite3.Connection, live: Path) -> list[Reserved]:
    guests: dict[str, list[Process]] = {}
    folders: dict[str, Path] = {}
    sql = "SELECT session, kind, identity FROM resources WHERE kind IN (?, ?)"
    for session, kind, identity in connection.execute(sql, (Kind.PROCESS.value, Kind.FOLDER.value)):
        process, _, part = identity.partition(" ")
        if kind == Kind.FOLDER:
            folders[session] = live / identity
        elif part == QEMU:
            with suppress(ValueError):
                guests.setdefault(session, []).append(Process.parse(process))
    found = []
    sql = "SELECT owner, label, memory, disk, maker FROM reservations ORDER BY written"
    for owner, label, memory, disk, maker in connection.execute(sql).fetchall():
        alive = [guest for guest in guests.get(owner, ()) if guest.is_alive]
        if alive or _is_alive(maker):
            used = sum(private_memory(guest.pid) for guest in alive)
            found.append(Reserved(owner, label, memory, disk, used, _bytes_below(folders.get(owner))))
    return found


def _bytes_below(folder: Path | None) -> int:
    """Bytes on disk of the files that QEMU has in a session's folder; 0 if it is not there."""
    found = 0
    for path in folder.glob("vm-*/*") if folder is not None else ():
        with suppress(OSError):
            found += path.lstat().st_blocks * 512
    return found


def _is_alive(maker: str) -> bool:
    with suppress(ValueError):
        return Process.parse(maker).is_alive
    return False


def _memory() -> tuple[int, int]:
    """Bytes of memory that are available without swapping, and that there are (proc(5), meminfo)."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        values[key] = int(value.split()[0]) * 1024
    return values["MemAvailable"], values["MemTotal"]


def _size(number: int) -> str:
    mib = max(number, 0) / _MIB
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
