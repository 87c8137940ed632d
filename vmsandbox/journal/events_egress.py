"""The events of a guest's network: its way to the broker, and what the broker refused or saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmsandbox.journal.event import Event


@dataclass(frozen=True)
class EgressOpened(Event):
    """The guest's way to the session's broker stands. `policy`: SHA-256 of the compiled policy, canonical JSON.

    secrets: names alone. hosts: the patterns that are allowed.
    """

    kind: ClassVar[str] = "egress.opened"
    mode: str
    policy: str
    learn: bool
    hosts: list[str]
    secrets: list[str]


@dataclass(frozen=True)
class EgressRefused(Event):
    """Requests that the broker refused, `times` since this was last written. All of it but `rule` is untrusted."""

    kind: ClassVar[str] = "egress.refused"
    host: str
    port: int
    method: str
    path: str
    rule: str
    reason: str
    remedy: str
    times: int


@dataclass(frozen=True)
class EgressAlert(Event):
    """Something left, or was about to leave, that never should: a canary, a secret, a placeholder at the wrong host."""

    kind: ClassVar[str] = "egress.alert"
    host: str
    port: int
    rule: str
    reason: str
    what: str
    where: str


@dataclass(frozen=True)
class EgressBroken(Event):
    """The broker, or the way to it, is gone before the session's end: the guest reaches nothing any more."""

    kind: ClassVar[str] = "egress.broken"
    reason: str
    details: str


@dataclass(frozen=True)
class EgressClosed(Event):
    """The end of a guest's network: totals of the requests, and how many events were too many to be kept."""

    kind: ClassVar[str] = "egress.closed"
    allowed: int
    refused: int
    alerts: int
    packages: int
    sent: int
    received: int
    hosts: list[str]
    unkept: int
