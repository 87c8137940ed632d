"""What the broker did, written down: every event into `egress.jsonl`, the ones that matter into the journal.

A guest can ask for something a thousand times a second. Without the merging and the limits here, it would fill the
record, drown what matters, or slow the broker down for its own good.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmsandbox.egress.summary import times
from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.egress.wire import MAX_EVENT, event_to_json, parse_untrusted_event
from vmsandbox.errors import VmsandboxError
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal

FILE = "egress.jsonl"
ROUTINE_BYTES = 64 << 20  # of the file, for what was let through
ALL_BYTES = 80 << 20  # of the file, for what was refused as well
MERGE_SECONDS = 10.0  # a refusal of the same kind is written again at most this often
KINDS_OF_REFUSAL = 200  # told apart in the journal; further ones are counted together
HOSTS = 200

_ROUTINE = (EgressKind.READY, EgressKind.ALLOWED, EgressKind.CLOSED, EgressKind.LEARNED)


@dataclass
class Totals:
    """What a session did so far."""

    allowed: int = 0
    refused: int = 0
    alerts: int = 0
    packages: int = 0
    sent: int = 0
    received: int = 0
    unkept: int = 0
    hosts: Counter[str] = field(default_factory=Counter)


@dataclass
class _Merged:
    written: float
    waiting: int = 0


class EgressLog:
    """Takes the broker's events, one after the other.

    Args:
        folder: the session's record.
        journal: of the session.
        on_alert: told of an alert, and of the broker's end, after they were written.
    """

    def __init__(self, folder: Path, journal: Journal, on_alert: Callable[[EgressEvent], None]) -> None:
        self.totals = Totals()
        self._journal = journal
        self._on_alert = on_alert
        self._refusals: dict[tuple[str, ...], _Merged] = {}
        self._last: dict[tuple[str, ...], EgressEvent] = {}
        self._lock = threading.Lock()
        self._fd = os.open(
            folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )  # fmt: skip
        self._size = os.fstat(self._fd).st_size

    def take(self, event: EgressEvent) -> None:
        """Write one event down. A disk that is full loses events, and says how many."""
        with self._lock:
            self._keep(event)
            self._count(event)
        with suppress(VmsandboxError):
            if event.kind in (EgressKind.REFUSED, EgressKind.LIMIT):
                self._refused(event)
            elif event.kind is EgressKind.ALERT:
                more = event.more
                self._journal.append(
                    events.EgressAlert(
                        event.host, event.port, event.rule, event.reason, more.get("what", ""), more.get("where", "")
                    )
                )
            elif event.rule == "broker-ended":
                self._journal.append(events.EgressBroken(event.reason, event.more.get("details", "")))
        if event.kind is EgressKind.ALERT or event.rule == "broker-ended":
            self._on_alert(event)

    def close(self) -> None:
        """Write what was merged and the totals."""
        with self._lock:
            if self._fd < 0:
                return
            os.close(self._fd)
            self._fd = -1
        total = self.totals
        with suppress(VmsandboxError):
            for key, merged in self._refusals.items():
                if merged.waiting:
                    self._write_refusal(self._last[key], merged.waiting)
            self._journal.append(
                events.EgressClosed(
                    total.allowed, total.refused, total.alerts, total.packages, total.sent, total.received,
                    [host for host, _count in total.hosts.most_common(32)], total.unkept,
                )
            )  # fmt: skip

    def _keep(self, event: EgressEvent) -> None:
        line = event_to_json(event)
        room = ROUTINE_BYTES if event.kind in _ROUTINE else ALL_BYTES
        try:
            if self._fd < 0 or self._size + len(line) > room or os.write(self._fd, line) != len(line):
                self.totals.unkept += 1
            else:
                self._size += len(line)
        except OSError:
            self.totals.unkept += 1

    def _count(self, event: EgressEvent) -> None:
        total = self.totals
        match event.kind:
            case EgressKind.ALLOWED | EgressKind.LEARNED:
                total.allowed += 1
                if event.host in total.hosts or len(total.hosts) < HOSTS:
                    total.hosts[event.host] += 1
            case EgressKind.REFUSED | EgressKind.LIMIT:
                total.refused += times(event)
            case EgressKind.ALERT:
                total.alerts += 1
            case EgressKind.PACKAGE:
                total.packages += 1
            case EgressKind.CLOSED:
                total.sent += event.sent
                total.received += event.received
            case _:
                pass

    def _refused(self, event: EgressEvent) -> None:
        """The first of its kind at once, so that a person sees it; the next ones together, now and then."""
        key = (event.host, str(event.port), event.rule)
        if key not in self._refusals and len(self._refusals) >= KINDS_OF_REFUSAL:
            key = ("…", "", event.rule) if ("…", "", event.rule) in self._refusals else ("…", "", "")
        now = time.monotonic()
        merged = self._refusals.get(key)
        if merged is None:
            self._refusals[key] = _Merged(now)
            self._write_refusal(event, times(event))
        elif now - merged.written >= MERGE_SECONDS:
            count, merged.waiting, merged.written = merged.waiting + times(event), 0, now
            self._write_refusal(event, count)
        else:
            merged.waiting += times(event)
            self._last[key] = event

    def _write_refusal(self, event: EgressEvent, count: int) -> None:
        self._journal.append(
            events.EgressRefused(
                event.host, event.port, event.method, event.path, event.rule, event.reason, event.remedy, count
            )
        )


def read_events(folder: Path) -> Iterator[EgressEvent]:
    """The events of a record, in order; none where the session had no network."""
    path = folder / FILE
    if path.exists():
        yield from events_in(path)


def events_in(path: Path) -> Iterator[EgressEvent]:
    """The events of a file, in order. A line that is cut off (the disk was full) is left out. Raises OSError."""
    with path.open("rb") as file:
        while line := file.readline(MAX_EVENT + 1):
            with suppress(VmsandboxError):
                yield parse_untrusted_event(line)
