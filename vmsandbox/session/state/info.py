"""What is written down of a session: the record that all its folders are named by.

Plain values, and the one way in which a file of a session is written: whoever reads it sees the old or the new one.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmsandbox.ledger.processes import process_started


@dataclass(frozen=True)
class SessionInfo:
    """What is written down of a session before it exists.

    owner_pid, owner_started   the process that must end it (0: kept; it lives until `stop`), and that process's
                               start time in clock ticks since boot, because process ids are used again
    guest_folder               where the project lies in the guest
    output_bytes               of stdout and stderr of one command; None: no limit
    """

    id: str
    name: str
    uuid: str
    domain: str
    created: str
    owner_pid: int
    owner_started: int
    image: str
    image_digest: str
    template: str
    ssh_ports: int
    memory_mib: int
    vcpus: int
    project: str | None = None
    guest_folder: str | None = None
    grade: str | None = None
    ready: bool = False
    network: str = "none"
    output_bytes: int | None = None

    def is_recorded_in(self, folder: Path) -> bool:
        """Whether a folder is this session's; one whose record cannot be read may be."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return bool(json.loads((folder / "session.json").read_text())["id"] == self.id)
        return True

    @property
    def owner_is_alive(self) -> bool:
        """Whether the owning process still runs (a kept session has none)."""
        return self.owner_pid > 0 and process_started(self.owner_pid) == self.owner_started


@dataclass(frozen=True)
class Halfway:
    """A session between two guests (`live/<name>/next.json`): its record before, and with the guest that comes."""

    before: SessionInfo
    coming: SessionInfo
    tag: str


@dataclass(frozen=True)
class SessionKeys:
    """The host key that the guest was given (public), and the only user key it accepts (private)."""

    host_key: str
    user_key: str


def new_session_id(name: str) -> str:
    """An identifier that sorts by time: "20260102-150405-name-1a2b3c"."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(3)}"


def write_text(path: Path, text: str) -> None:
    """Write a file of ours in one step: a reader sees the old or the new one, and nobody else sees either."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
