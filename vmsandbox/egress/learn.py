"""Proposes the smallest policy that allows what was seen while learning.

Without it a person would read a thousand lines of events and write `*`. Everything in an event but its rule was chosen
by the guest: what is no host, port or path of the one parser is left out and counted, never written into a policy.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import quote

from vmsandbox.egress.decide import DEFAULT_DENY, LEARN
from vmsandbox.egress.hosts import BadHostError, parse_destination
from vmsandbox.egress.paths import SLASH, BadPathError, readings
from vmsandbox.egress.values import EgressEvent, EgressKind

MAX_HOSTS = 500
_FEW_PATHS = 4
_PLAIN = "/:@!$&'()+,;=~"
_METHOD_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ-")


@dataclass(frozen=True)
class Proposal:
    """A policy to read and then to apply.

    text: YAML of a whole policy file; empty when there is nothing to propose. hosts: how many it allows.
    skipped: events that could not be put into a policy. truncated: there were more than 500 hosts.
    """

    text: str
    hosts: int
    skipped: int = 0
    truncated: bool = False


@dataclass
class _Seen:
    """What was seen of one host."""

    ports: set[int] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)
    any_path: bool = False
    opaque: bool = False  # a tunnel that was not looked into: only the host and port are known


def propose(events: Iterable[EgressEvent]) -> Proposal:
    """The smallest policy for all events that only the default refused, or that learning let through.

    Exact hosts, the ports and methods that were used, and paths where they begin in few ways.
    """
    seen: dict[str, _Seen] = defaultdict(_Seen)
    skipped = 0
    truncated = False
    for event in events:
        if event.kind is not EgressKind.LEARNED and event.rule not in (LEARN, DEFAULT_DENY):
            continue
        if event.kind not in (EgressKind.LEARNED, EgressKind.REFUSED, EgressKind.ALLOWED):
            continue
        host = _host(event)
        if host is None:
            skipped += 1
        elif host not in seen and len(seen) >= MAX_HOSTS:
            truncated = True
        elif event.port:
            _note(seen[host], event)
        elif event.via == "dns":
            seen.setdefault(host, _Seen())
    if not seen:
        return Proposal("", 0, skipped, truncated)
    return Proposal(_text(seen), len(seen), skipped, truncated)


def _host(event: EgressEvent) -> str | None:
    host = f"[{event.host}]" if ":" in event.host else event.host
    try:
        return parse_destination(host, 443).host
    except BadHostError:
        return None


def _note(seen: _Seen, event: EgressEvent) -> None:
    if not 1 <= event.port <= 65535:
        return
    seen.ports.add(event.port)
    method = event.method
    if method == "CONNECT":  # the tunnel; what goes through it has events of its own, if it is looked into
        return
    if not method or len(method) > 32 or not set(method) <= _METHOD_LETTERS or method == "TRACE":
        seen.opaque = True
        return
    seen.methods.add(method)
    try:
        found = readings(event.path)
    except BadPathError:
        seen.any_path = True
        return
    if len(found) > 1 or "*" in found[0] or "…" in found[0]:  # `…`: a path that was cut
        seen.any_path = True
    else:
        seen.paths.add(found[0])


def _text(seen: dict[str, _Seen]) -> str:
    hosts: list[str] = []
    rules: list[dict[str, object]] = []
    for host, one in sorted(seen.items()):
        shown = f"[{host}]" if ":" in host else host
        ports = sorted(one.ports) or [443]
        if one.opaque or not one.methods:
            hosts.extend(f"{shown}:{port}" for port in ports)
            continue
        rule: dict[str, object] = {"host": shown, "ports": ports, "methods": sorted(one.methods)}
        if not one.any_path and (paths := _globs(one.paths)):
            rule["paths"] = paths
        rules.append(rule)
    lines = ["# What was learned: read each line before you keep it.", "sandbox:", "  network:", "    mode: restricted"]
    if hosts:
        lines.append("    allowed_hosts:")
        lines.extend(f"      - {json.dumps(host)}" for host in hosts)
    if rules:
        lines.append("    rules:")
        lines.extend(f"      - {json.dumps(rule)}" for rule in rules)
    return "\n".join(lines) + "\n"


def _globs(paths: set[str]) -> list[str]:
    """The paths themselves if they are few, else the folders at the top if those are; none if neither is."""
    if len(paths) <= _FEW_PATHS and all(len(path) <= 256 for path in paths):
        return sorted(_written(path) for path in paths)
    tops = {path[: path.index("/", 1) + 1] if "/" in path[1:] else path for path in paths}
    if len(tops) > _FEW_PATHS or any(len(top) > 256 for top in tops):
        return []
    return sorted(_written(top) + ("*" if top.endswith("/") and top != "/" else "") for top in tops)


def _written(path: str) -> str:
    return SLASH.join(quote(part, safe=_PLAIN) for part in path.split(SLASH))
