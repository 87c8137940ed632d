"""The ledger: what this installation ever made that may still be there, written down before it is made.

A session's own folder says what it is and who ends it, and a lock says who makes a template. Both can be lost, and
then nobody would know of the guest, the network or the sockets. The ledger holds their identities, in one file of
SQLite beside the sessions' folders. A row goes only after its thing is gone, so a row may be of something that never
came to be, and nothing that came to be is without one.

It is written with synchronous=NORMAL in WAL mode: what was written survives every death of this program, and the
file survives a power cut, after which the last rows may be missing. What those would have named is gone then (guests,
processes, sockets, networks), or is found by its folder.

A ledger that cannot be read, or that a newer version wrote, says nothing: nothing is removed because of it, nothing
new is made, and sessions end as always.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import Layout

if TYPE_CHECKING:
    import sqlite3

VERSION = 1
_APPLICATION = 0x766D7362  # "vmsb": which program's file it is (SQLite's PRAGMA application_id)
_BUSY_SECONDS = 20.0
_SCHEMA = (
    # maker: the process that writes the row (`Process`)
    """CREATE TABLE resources (session TEXT NOT NULL, kind TEXT NOT NULL, identity TEXT NOT NULL, maker TEXT NOT NULL,
       written TEXT NOT NULL, PRIMARY KEY (session, kind, identity)) WITHOUT ROWID""",
    """CREATE TABLE reservations (owner TEXT PRIMARY KEY, label TEXT NOT NULL, memory INTEGER NOT NULL,
       disk INTEGER NOT NULL, maker TEXT NOT NULL, written TEXT NOT NULL)""",
    """CREATE TABLE queue (ticket INTEGER PRIMARY KEY AUTOINCREMENT, label TEXT NOT NULL, memory INTEGER NOT NULL,
       disk INTEGER NOT NULL, maker TEXT NOT NULL, written TEXT NOT NULL)""",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)


class Kind(StrEnum):
    """What a row is of, and how its identity is written (names are below the folder that is said)."""

    DOMAIN = "guest"  # UUID
    PROCESS = "process"  # `Process`, a blank, its part: qemu, keeper, watcher, broker
    NETWORK = "network"  # name of the network, filter and rules
    SOCKETS = "sockets"  # name in Layout.run
    FOLDER = "session folder"  # name in Layout.live
    SNAPSHOT = "snapshot"  # NAME/snapshots/TAG in Layout.live
    TEMPLATE = "template"  # name in Layout.templates, while it is made
    IMAGE = "image"  # NAME/FOLDER in Layout.images, while it is built
    APPLY = "apply"  # the project's absolute path


Thing = tuple[Kind, str]


class LedgerError(VmsandboxError):
    """The ledger cannot be read or written."""


class NewerLedgerError(LedgerError):
    """The ledger was written by a newer version: that one can read it."""


@dataclass(frozen=True)
class Row:
    """One thing that was, or was about to be, made."""

    session: str
    kind: str
    identity: str
    maker: str
    written: str

    @property
    def maker_is_alive(self) -> bool:
        """Whether the process that wrote it still runs."""
        with suppress(ValueError):
            return Process.parse(self.maker).is_alive
        return False


class Ledger:
    """The ledger of one installation. Any number of threads and processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: Any = None
        self._opened: tuple[int, int, int] | None = None  # our pid, the file's device and inode

    @classmethod
    def of(cls, layout: Layout) -> Ledger:
        """The ledger of an installation."""
        return cls.at(layout.ledger)

    @classmethod
    def at(cls, path: Path) -> Ledger:
        """The ledger in this file; one object for each."""
        with _all_lock:
            return _all.setdefault(path, cls(path))

    @property
    def live(self) -> Path:
        """`Layout.live` of the same installation."""
        return self.path.parent / "live"

    # -- what was made -------------------------------------------------------------------------------------

    def plan(self, session: str, *things: Thing, reserved_as: str = "") -> None:
        """Write down what is about to be made, all at once. Raises LedgerError: then it must not be made.

        reserved_as: the owner of a reservation that becomes the session's.
        """
        rows = [(session, kind, identity, str(Process.here()), now()) for kind, identity in things]
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO resources VALUES (?, ?, ?, ?, ?)", rows)
            if reserved_as:
                connection.execute("UPDATE reservations SET owner = ? WHERE owner = ?", (session, reserved_as))
        failpoint("ledger.planned")

    @contextmanager
    def planned(self, session: str, kind: Kind, identity: str) -> Iterator[None]:
        """Make it inside: it is written down before. The row stays, also if that fails, until `gone`."""
        self.plan(session, (kind, identity))
        yield

    @contextmanager
    def for_a_while(self, session: str, *things: Thing) -> Iterator[None]:
        """For what is made and gone again at the end of the context. If that fails, the rows stay, for `gc`."""
        self.plan(session, *things)
        yield
        self.gone(session, *things)

    def gone(self, session: str, *things: Thing) -> None:
        """These are gone. Without the ledger that is no matter: `gc` looks whether they are."""
        failpoint("ledger.gone")
        with suppress(LedgerError), self.transaction() as connection:
            rows = [(session, kind, identity) for kind, identity in things]
            connection.executemany("DELETE FROM resources WHERE session = ? AND kind = ? AND identity = ?", rows)

    def forget(self, session: str) -> None:
        """Everything of this session is gone, and what it had reserved is free."""
        with suppress(LedgerError), self.transaction() as connection:
            connection.execute("DELETE FROM resources WHERE session = ?", (session,))
            connection.execute("DELETE FROM reservations WHERE owner = ?", (session,))

    def rows(self, session: str | None = None) -> list[Row]:
        """What is written down, of one session or of all. An installation that made nothing has none."""
        if not self.path.exists():
            return []
        columns = "SELECT session, kind, identity, maker, written FROM resources"
        with self.transaction(write=False) as connection:
            if session is None:
                found = connection.execute(f"{columns} ORDER BY written, session").fetchall()
            else:
                found = connection.execute(f"{columns} WHERE session = ? ORDER BY written", (session,)).fetchall()
        return [Row(*row) for row in found]

    # -- the file ------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """All that is done inside, or nothing of it. Raises LedgerError."""
        import sqlite3  # here: `vmsandbox exec` and the like should not pay for it

        with self._lock:
            try:
                connection = self._connected(sqlite3)
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    if (version := _header(connection)[1]) != VERSION:  # a newer program has changed it meanwhile
                        raise self._newer(version)
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            except (sqlite3.Error, OSError) as error:
                raise self._failed(error) from error

    def set_aside(self) -> Path:
        """Rename a ledger that cannot be used (it is kept), so that the next use makes a new one. Raises OSError."""
        aside = self.path.with_name(f"{self.path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}.aside")
        with self._lock:
            for end in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + end).rename(aside.with_name(aside.name + end))
        return aside

    def _connected(self, sqlite3: Any) -> sqlite3.Connection:
        """The connection, made anew in a child, and where the file is not the one that was opened."""
        if not self.path.exists():
            self.path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                # EXCL, on purpose: to close a descriptor of a file that SQLite has open would end its locks (fcntl(2)).
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        status = self.path.stat()
        current = (os.getpid(), status.st_dev, status.st_ino)
        if self._connection is not None and self._opened == current:
            return self._connection  # type: ignore[no-any-return]
        if self._connection is not None:
            # Never closed: in a child, SQLite would let go of its parent's locks ("How To Corrupt", sqlite.org).
            _never_closed.append(self._connection)
            self._connection = None
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._prepare(connection)
        self._connection, self._opened = connection, current
        return connection  # type: ignore[no-any-return]

    def _prepare(self, connection: sqlite3.Connection) -> None:
        application, version = _header(connection)
        if (application, version) != (_APPLICATION, VERSION):
            connection.execute("BEGIN IMMEDIATE")  # of several that make it, one does
            application, version = _header(connection)
            if (application, version) == (0, 0):
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")
            if (application, version) not in ((0, 0), (_APPLICATION, VERSION)):
                raise self._newer(version) if version > VERSION else OSError("it is another program's file")
        connection.execute("PRAGMA journal_mode = WAL")  # stays as it is where the file system cannot
        connection.execute("PRAGMA synchronous = NORMAL")

    def _newer(self, version: int) -> NewerLedgerError:
        return NewerLedgerError(
            "the ledger of this installation was written by a newer vmsandbox",
            details=f"{self.path} has version {version}; this program knows {VERSION}",
            resolution="use the newer program; sessions that run can be ended with this one (`vmsandbox stop`)",
        )

    def _failed(self, error: Exception) -> LedgerError:
        return LedgerError(
            "the ledger of this installation cannot be used",
            details=f"{self.path}: {error}",
            resolution="make room or give back the right to write there; if the file itself is damaged, "
            "`vmsandbox gc --new-ledger` sets it aside and begins another one",
        )


def things_of(rows: Iterable[Row]) -> list[Thing]:
    """The things of rows, as `gone` takes them. A kind that this version does not know is left out."""
    return [(Kind(row.kind), row.identity) for row in rows if row.kind in list(Kind)]


def now() -> str:
    """The time as it is written into rows: for people, never for a decision."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return application, connection.execute("PRAGMA user_version").fetchone()[0]


_all: dict[Path, Ledger] = {}
_all_lock = threading.Lock()
_never_closed: list[Any] = []
