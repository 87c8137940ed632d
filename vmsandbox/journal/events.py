"""The typed events of a session. Every adapter emits these; nothing else is written to a journal.

Those of the network and of the way back have modules of their own; all are imported from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmsandbox.journal.event import Event
from vmsandbox.journal.events_egress import (
    EgressAlert,
    EgressBroken,
    EgressClosed,
    EgressOpened,
    EgressRefused,
)
from vmsandbox.journal.events_return import (
    ChangesAccepted,
    ChangesApplied,
    ChangesReviewed,
    CommitsReturned,
    ReturnReceived,
    ReturnRefused,
    ReturnRulesKept,
)

# What is imported here to be had from here, beside what is defined here.
__all__ = [
    "ChangesAccepted",
    "ChangesApplied",
    "ChangesReviewed",
    "CommitsReturned",
    "EgressAlert",
    "EgressBroken",
    "EgressClosed",
    "EgressOpened",
    "EgressRefused",
    "Event",
    "ReturnReceived",
    "ReturnRefused",
    "ReturnRulesKept",
]


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
class SnapshotTaken(Event):
    """The guest's memory and disk were kept. parent: the snapshot before. pause: seconds that the guest stood still."""

    kind: ClassVar[str] = "snapshot.taken"
    tag: str
    parent: str | None
    bytes: int
    pause: float


@dataclass(frozen=True)
class SnapshotRemoved(Event):
    """A snapshot was deleted; `bytes` of the host's disk are free again."""

    kind: ClassVar[str] = "snapshot.removed"
    tag: str
    bytes: int


@dataclass(frozen=True)
class RolledBack(Event):
    """Another guest, made of this snapshot, has taken the session's place. uuid: its own."""

    kind: ClassVar[str] = "session.rolledback"
    tag: str
    uuid: str
    verified: bool
    seconds: float


@dataclass(frozen=True)
class ForkedFrom(Event):
    """The guest began as a snapshot of another session. digest: of the snapshot's memory. project: what lies in it."""

    kind: ClassVar[str] = "session.forked"
    session: str
    tag: str
    digest: str
    project: str | None


@dataclass(frozen=True)
class ProjectPushed(Event):
    """A project was copied in; `manifest` is the digest of the manifest kept beside the journal."""

    kind: ClassVar[str] = "project.pushed"
    files: int
    bytes: int
    withheld: int
    manifest: str
    project: str


@dataclass(frozen=True)
class PushScanned(Event):
    """What was found in what was to be copied in: counts by kind, the first 30 findings (kind, path, line, what).

    files: that were looked at. partly: of them, those of which only the beginning was. refused: nothing was sent.
    """

    kind: ClassVar[str] = "push.scanned"
    files: int
    partly: int
    counts: dict[str, int]
    findings: list[dict[str, object]]
    refused: bool


@dataclass(frozen=True)
class PolicyEnforced(Event):
    """What is in force in the guest is what its policy says, read from a process of the worker's before any command.

    facts: SHA-256 of what was read, canonical JSON; checks: how many single things were compared.
    """

    kind: ClassVar[str] = "policy.enforced"
    facts: str
    checks: int
    seconds: float


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
class CommandAsked(Event):
    """The guest asked whether this may run. All but `answer` is untrusted.

    answer: yes, no, always, withdrawn, or why it was no. by: person, or "" where nobody was asked.
    """

    kind: ClassVar[str] = "command.asked"
    argv: list[str]
    cwd: str
    program: str
    rule: str
    answer: str
    by: str
    seconds: float


@dataclass(frozen=True)
class CommandDenied(Event):
    """The guest's supervisor refused a command, `times` since this was last written. Command and rule are untrusted."""

    kind: ClassVar[str] = "command.denied"
    command: str
    rule: str
    times: int


@dataclass(frozen=True)
class GuestFrozen(Event):
    """The guest's processors were stopped: by a person, or by the broker's alarm."""

    kind: ClassVar[str] = "guest.frozen"
    by: str
    reason: str


@dataclass(frozen=True)
class GuestThawed(Event):
    """A person let a frozen guest go on."""

    kind: ClassVar[str] = "guest.thawed"


@dataclass(frozen=True)
class ClockSet(Event):
    """The guest was told the time again: the host's clock had jumped by so many seconds."""

    kind: ClassVar[str] = "guest.clock"
    jump: float


@dataclass(frozen=True)
class GuestPaused(Event):
    """QEMU has stopped the guest at a write that failed. free: bytes that the host's disk had then."""

    kind: ClassVar[str] = "guest.paused"
    reason: str
    free: int


@dataclass(frozen=True)
class GuestResumed(Event):
    """There is room again, and a guest that was paused for lack of it goes on."""

    kind: ClassVar[str] = "guest.resumed"
    free: int


@dataclass(frozen=True)
class LimitReached(Event):
    """A limit of the policy was met. time, idle (seconds): the session ends. output (bytes): the command was ended."""

    kind: ClassVar[str] = "session.limit"
    limit: str
    value: float


@dataclass(frozen=True)
class HealthcheckFailed(Event):
    """A run of the health check failed: `failures` in a row. status None: cut off. output: untrusted, its end.

    Written until the guest counts as unhealthy; from then on only the change back is.
    """

    kind: ClassVar[str] = "health.failed"
    failures: int
    status: int | None
    seconds: float
    output: str


@dataclass(frozen=True)
class HealthChanged(Event):
    """The guest is healthy or unhealthy from now on. failures: in a row, until now."""

    kind: ClassVar[str] = "health.changed"
    state: str
    failures: int


@dataclass(frozen=True)
class SessionFailed(Event):
    """vmsandbox gave up on something; the session may go on or end."""

    kind: ClassVar[str] = "session.failed"
    brief: str
    details: str


@dataclass(frozen=True)
class BaselineProven(Event):
    """Image and template are as before the session; what the host has of it is, too: nothing after its end.

    digest: of what was compared; files: of image and template.
    """

    kind: ClassVar[str] = "baseline.proven"
    digest: str
    files: int


@dataclass(frozen=True)
class BaselineDiffers(Event):
    """Something is not as it was before the session (or its rollback), or something of it is left."""

    kind: ClassVar[str] = "baseline.differs"
    differences: list[str]


@dataclass(frozen=True)
class SessionClosed(Event):
    """The guest is gone; `leftovers` names what could not be removed (empty when all went)."""

    kind: ClassVar[str] = "session.closed"
    reason: str
    leftovers: list[str]
