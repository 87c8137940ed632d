"""What a session's network use was, in a few lines, out of any number of events.

Without bounds a guest that asks for a million names would fill the host's memory, and its noise would push what it
really reached out of sight: hosts that were reached and hosts that were refused are counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.review.text import shown

MOST_HOSTS = 500  # of each sort
_MOST_RULES = 20  # of one host
_MOST_PACKAGES = 5000
_MOST_ALERTS = 100
_LINES = 20  # of each sort, for people
_LONGEST = 300  # characters that are kept of any text
_LONGEST_REMEDY = 1000
_USED = (EgressKind.ALLOWED, EgressKind.LEARNED)


@dataclass
class Refusal:
    """How often one rule refused one host, and what would allow it."""

    rule: str
    reason: str
    remedy: str
    count: int = 0


@dataclass
class HostUse:
    """What was done with one host and port. sent, received: bytes from and to the guest."""

    host: str
    port: int
    requests: int = 0
    sent: int = 0
    received: int = 0
    failed: int = 0
    refusals: dict[str, Refusal] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        return sum(one.count for one in self.refusals.values())

    def as_json(self) -> dict[str, Any]:
        refusals = [vars(one) for one in self.refusals.values()]
        return {**vars(self), "refusals": refusals}


@dataclass
class EgressSummary:
    """A session's network use. Texts in it were chosen by the guest, except rules.

    reached, refused: hosts by `host:port`; others: of more hosts than are kept, only the number of events.
    packages: (ecosystem, name, version, digest, index). alerts: (what, where, host).
    """

    reached: dict[str, HostUse] = field(default_factory=dict)
    refused: dict[str, HostUse] = field(default_factory=dict)
    others: int = 0
    packages: dict[tuple[str, ...], None] = field(default_factory=dict)
    more_packages: int = 0
    alerts: dict[tuple[str, ...], int] = field(default_factory=dict)
    more_alerts: int = 0
    limits: int = 0

    def lines(self) -> list[str]:
        """For people; everything that a guest chose is made safe to show."""
        if not (self.reached or self.refused or self.packages or self.alerts or self.limits):
            return ["network: nothing was asked for"]
        found = [_host_line(one) for one in _most(self.reached.values(), lambda one: one.sent + one.received)]
        found += _rest(len(self.reached), "hosts that were reached")
        for one in _most([*self.refused.values(), *self.reached.values()], lambda one: one.refused):
            found += _refusal_lines(one)
        found += _rest(len(self.refused), "hosts that were refused")
        failed = [one for one in self.refused.values() if one.failed]
        found += [f"failed: {shown(one.host, 120)}:{one.port}, {one.failed}×" for one in failed[:_LINES]]
        if self.others:
            found.append(f"{self.others} requests to further hosts, which are not listed")
        for package in [*self.packages][:_LINES]:
            ecosystem, name, version, digest, index = (shown(text, 80) for text in package)
            found.append(f"fetched {ecosystem}:{name} {version} from {index} {digest}".rstrip())
        found += _rest(len(self.packages) + self.more_packages, "packages")
        for (what, where, host), count in [*self.alerts.items()][:_LINES]:
            found.append(f"ALERT {shown(what, 120)} in the {shown(where, 60)} to {shown(host, 120)}, {count}×")
        found += _rest(len(self.alerts) + self.more_alerts, "alerts")
        if self.limits:
            found.append(f"a limit was reached {self.limits}×")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "reached": [one.as_json() for one in self.reached.values()],
            "refused": [one.as_json() for one in self.refused.values()],
            "other_hosts": self.others,
            "packages": [
                dict(zip(("ecosystem", "name", "version", "digest", "index"), one, strict=True))
                for one in self.packages
            ],
            "more_packages": self.more_packages,
            "alerts": [
                {"what": what, "where": where, "host": host, "count": count}
                for (what, where, host), count in self.alerts.items()
            ],
            "more_alerts": self.more_alerts,
            "limits": self.limits,
        }


def summarise(events: Iterable[EgressEvent]) -> EgressSummary:
    """Counts a session's events. Memory is bounded, whatever and however many they are."""
    summary = EgressSummary()
    for event in events:
        if event.kind is EgressKind.PACKAGE:
            _package(summary, event)
        elif event.kind is EgressKind.ALERT:
            _alert(summary, event)
        elif event.kind is EgressKind.LIMIT:
            summary.limits += 1
        elif event.kind is not EgressKind.READY:
            _host(summary, event)
    return summary


def _host(summary: EgressSummary, event: EgressEvent) -> None:
    key = f"{event.host[:_LONGEST]}:{event.port}"
    use = summary.reached.get(key)
    if use is None:
        table = summary.reached if event.kind in _USED else summary.refused
        if table is summary.reached and key in summary.refused:
            table[key] = summary.refused.pop(key)
        elif key not in table and len(table) >= MOST_HOSTS:
            summary.others += 1
            return
        use = table.setdefault(key, HostUse(event.host[:_LONGEST], event.port))
    if event.kind in _USED:
        use.requests += 1
    elif event.kind is EgressKind.CLOSED:
        use.sent += event.sent
        use.received += event.received
    elif event.kind is EgressKind.FAILED:
        use.failed += 1
    elif event.rule[:_LONGEST] in use.refusals or len(use.refusals) < _MOST_RULES:
        rule = event.rule[:_LONGEST]
        new = Refusal(rule, event.reason[:_LONGEST], event.remedy[:_LONGEST_REMEDY])
        use.refusals.setdefault(rule, new).count += times(event)
    else:
        summary.others += 1


def times(event: EgressEvent) -> int:
    """For how many of its kind an event stands: the broker makes one of equal refusals that follow each other."""
    untrusted = event.more.get("count", "1")
    return int(untrusted) if untrusted.isascii() and untrusted.isdigit() and len(untrusted) < 12 else 1


def _package(summary: EgressSummary, event: EgressEvent) -> None:
    names = ("ecosystem", "name", "version", "digest", "index")
    key = tuple(event.more.get(name, "")[:_LONGEST] for name in names)
    if key in summary.packages or len(summary.packages) < _MOST_PACKAGES:
        summary.packages[key] = None
    else:
        summary.more_packages += 1


def _alert(summary: EgressSummary, event: EgressEvent) -> None:
    key = (
        event.more.get("what", event.reason)[:_LONGEST],
        event.more.get("where", "")[:_LONGEST],
        event.host[:_LONGEST],
    )
    if key in summary.alerts or len(summary.alerts) < _MOST_ALERTS:
        summary.alerts[key] = summary.alerts.get(key, 0) + 1
    else:
        summary.more_alerts += 1


def _most(uses: Iterable[HostUse], by: Any) -> list[HostUse]:
    return sorted(uses, key=by, reverse=True)[:_LINES]


def _host_line(use: HostUse) -> str:
    name = f"{shown(use.host, 120)}:{use.port}"
    failed = f", {use.failed} failed" if use.failed else ""
    requests = f"{use.requests} request" + "s" * (use.requests != 1)
    return f"{name}: {requests}, {_size(use.sent)} sent, {_size(use.received)} received{failed}"


def _refusal_lines(use: HostUse) -> list[str]:
    found = []
    for one in list(use.refusals.values())[:3]:
        found.append(f"refused {one.count}×: {shown(one.reason or use.host, 200)} ({shown(one.rule, 80)})")
        if one.remedy:
            found.append(f"  to allow it: {shown(one.remedy, _LONGEST_REMEDY)}")
    return found


def _rest(count: int, what: str) -> list[str]:
    return [f"… and {count - _LINES} more {what}"] if count > _LINES else []


def _size(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
