"""The typed events of a session. Every adapter emits these; nothing else is written to a journal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all events. `kind` is the stable name in the file; the fields are the record's `data`."""

    kind: ClassVar[str] = "event"

    def data(self) -> dict[str, object]:
        """The event's fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class SessionOpened(Event):
    """A session's folder was made; nothing else of it exists yet."""

    kind: ClassVar[str] = "session.opened"
    session: str
    name: str
    uuid: str
    project: str | None
    vmsandbox: str


@dataclass(frozen=True)
class ForkStarted(Event):
    """The guest exists (still paused): what it was made from."""

    kind: ClassVar[str] = "guest.forked"
    image: str
    image_digest: str
    template: str
    network: str
    vcpus: int
    memory_mib: int


@dataclass(frozen=True)
class IsolationAssessed(Event):
    """The grade of the live guest, with each check and its evidence."""

    kind: ClassVar[str] = "guest.isolation"
    grade: str
    checks: dict[str, str]


@dataclass(frozen=True)
class GuestReady(Event):
    """The guest has its own identity and answers over SSH."""

    kind: ClassVar[str] = "guest.ready"
    host_key: str
    machine_id: str
    seconds: float


@dataclass(frozen=True)
class ProjectPushed(Event):
    """A project was copied in; `manifest` is the digest of the manifest kept beside the journal."""

    kind: ClassVar[str] = "project.pushed"
    files: int
    bytes: int
    withheld: int
    manifest: str


@dataclass(frozen=True)
class CommandStarted(Event):
    """The host asked the guest to run a command (None: a login shell)."""

    kind: ClassVar[str] = "command.started"
    command: list[str] | None
    terminal: bool


@dataclass(frozen=True)
class CommandEnded(Event):
    """A command ended with this status (negative: ended by that signal)."""

    kind: ClassVar[str] = "command.ended"
    status: int
    seconds: float


@dataclass(frozen=True)
class ChangesListed(Event):
    """The guest's tree was compared with what was pushed."""

    kind: ClassVar[str] = "changes.listed"
    added: int
    modified: int
    deleted: int
    renamed: int
    mode: int


@dataclass(frozen=True)
class SessionFailed(Event):
    """vmsandbox gave up on something; the session may go on or end."""

    kind: ClassVar[str] = "session.failed"
    brief: str
    details: str


@dataclass(frozen=True)
class SessionClosed(Event):
    """The guest is gone; `leftovers` names what could not be removed (empty when all went)."""

    kind: ClassVar[str] = "session.closed"
    reason: str
    leftovers: list[str]
