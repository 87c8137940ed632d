"""What one policy allows that another does not: as sets of requests, not as lines of text.

Without it a person would approve a change by its looks: `api.example.org` beside `*.example.org` allows nothing new,
and one deny taken away may allow a great deal.

Hosts fall into classes that both policies cannot tell apart: each exact name that one of them mentions, what is left
below each `*.suffix`, and all the rest. One host of each class stands for it, and for each of them every port, method
and set of paths is compared. That is exact; where it is not (globs with an encoded slash, or so many that they cannot
be compared), a difference is assumed, and `Wider.exact` says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from string import ascii_lowercase, digits
from urllib.parse import quote

from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.globsets import wider
from vmsandbox.egress.hosts import MAX_HOST, parse_pattern, patterns_for
from vmsandbox.egress.looser import looser_network, looser_policy
from vmsandbox.egress.paths import SLASH, glob_matches
from vmsandbox.egress.values import Destination, EgressPolicy
from vmsandbox.policy.values import NetworkPolicy

ANY_METHOD = "*"
_LETTERS = ascii_lowercase + digits
_PLAIN = "/:@!$&'()+,;=~"


@dataclass(frozen=True)
class Wider:
    """One thing that is newly allowed.

    host      a name, an address, or `*.suffix` or `*`: what of it is not named on its own
    methods   `*`: any other one
    paths     globs; empty: any
    example   a request (destination, method, path) that was refused and is now allowed
    exact     False: it is only not proven that there is one
    """

    host: str
    ports: tuple[int, ...]
    methods: tuple[str, ...]
    paths: tuple[str, ...]
    example: tuple[Destination, str, str]
    exact: bool = True


@dataclass(frozen=True)
class PolicyDiff:
    """All that is newly allowed: requests, and what else became looser, one sentence each."""

    wider: tuple[Wider, ...]
    looser: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.wider or self.looser)


def diff_networks(before: NetworkPolicy, after: NetworkPolicy) -> PolicyDiff:
    """What `after` allows that `before` does not. Modes and sources of secrets are compared too."""
    compiled = [compile_policy(one, placeholders={s.name: s.name for s in one.secrets}) for one in (before, after)]
    found = diff_policies(*compiled)
    return PolicyDiff(found.wider, (*looser_network(before, after), *found.looser))


def diff_policies(before: EgressPolicy, after: EgressPolicy) -> PolicyDiff:
    """What `after` allows that `before` does not."""
    old, new = Rules(before), Rules(after)
    hosts = list(host_classes(before, after))
    ports = sorted({port for rule in after.allow for port in rule.ports})
    every = [one for policy in (before, after) for one in (policy, *policy.within)]
    methods = sorted({method for one in every for rule in one.allow for method in rule.methods})
    found: list[Wider] = []
    looser: list[str] = []
    for name, host in hosts:
        for port in ports:
            to = Destination(host, port)
            if new.host(to).allowed:
                found.extend(_requests(name, to, methods, old, new))
                looser.extend(_dialling(name, to, old, new))
    return PolicyDiff(_joined(found), (*dict.fromkeys(looser), *looser_policy(before, after, hosts)))


def host_classes(before: EgressPolicy, after: EgressPolicy) -> Iterator[tuple[str, str]]:
    """Each class of hosts as a pattern, with one host of it."""
    every = [one for policy in (before, after) for one in (policy, *policy.within)]
    named = {rule.pattern for one in every for rule in (*one.allow, *one.deny)} | {"*"}
    for policy in (before, after):
        named |= {pattern for secret in policy.secrets for pattern in secret.hosts}
    for pattern in sorted(named, key=lambda one: (one.startswith("*"), one)):
        if not pattern.startswith("*"):
            yield pattern, pattern
            continue
        for label in _labels(len(named)):
            host = label + pattern[1:]
            if len(host) <= MAX_HOST and not named.intersection(patterns_for(host)) - {pattern, *_wider_than(pattern)}:
                yield pattern, parse_pattern(host)
                break


def _labels(named: int) -> Iterator[str]:
    """Enough that one is not named, and short ones last, for a suffix that leaves room for nothing else."""
    yield from (f"any{number}" for number in range(named + 1))
    yield from map("".join, chain(product(_LETTERS), product(_LETTERS, repeat=2)))


def _wider_than(pattern: str) -> list[str]:
    return ["*"] if pattern == "*" else [one for one in patterns_for(pattern[2:]) if one.startswith("*")]


def _requests(name: str, to: Destination, methods: list[str], old: Rules, new: Rules) -> Iterator[Wider]:
    other = next(one for one in ("PURGE", "X-OTHER", "X-ANOTHER-ONE-OF-MANY") if one not in methods)
    for method in (*methods, other):
        now, then = new.paths(to, method), old.paths(to, method)
        if now is None or then == ():
            continue
        shown = ANY_METHOD if method == other else method
        if found := _new_paths(now, then):
            paths, reading, exact = found
            yield Wider(name, (to.port,), (shown,), paths, (to, method, _raw(reading)), exact)


def _new_paths(
    now: tuple[tuple[str, ...], ...], then: tuple[tuple[str, ...], ...] | None
) -> tuple[tuple[str, ...], str, bool] | None:
    """Globs of the paths that are new (empty: any), one such path, and whether it surely is one; None: there is none.

    Args:
        now, then: see `Rules.paths`; `then` allows not all of them.
    """
    if not now:
        if then is None:
            return (), "/", True
        witness = next((found for one in then if (found := wider(("/*",), one))), None)
        return (), witness.reading if witness else "//", True
    for old in (None,) if then is None else then:
        # What one of our sets does not let through, all of them together do not.
        witnesses = [wider(ours, () if old is None else old) for ours in now]
        if all(witnesses) and (witness := witnesses[0]):
            paths = now[0] if old is None else tuple(glob for glob in now[0] if wider((glob,), old)) or now[0]
            everywhere = all(any(glob_matches(glob, witness.reading) for glob in ours) for ours in now)
            return paths, witness.reading, witness.exact and everywhere
    return None


def _dialling(name: str, to: Destination, old: Rules, new: Rules) -> Iterator[str]:
    where = f"{name}:{to.port}"
    now, then = new.addresses(to), old.addresses(to)
    for address in now:
        if not old.host(to).allowed or not old.address(to, address, ()).allowed:
            yield f"{where} may be dialled at {address}"
    if then and not now:
        yield f"{where} is dialled wherever DNS says, no longer at {', '.join(then)} alone"
    if old.host(to).allowed and old.inspects(to) and not new.inspects(to):
        yield f"TLS to {where} is no longer looked into"


def _raw(reading: str) -> str:
    return SLASH.join(quote(part, safe=_PLAIN) for part in reading.split(SLASH)) or "/"


def _joined(found: list[Wider]) -> tuple[Wider, ...]:
    """Ports and methods that differ in nothing else, in one line."""
    by_method: dict[tuple[object, ...], list[Wider]] = defaultdict(list)
    for one in found:
        by_method[one.host, one.methods, one.paths].append(one)
    same: dict[tuple[object, ...], list[Wider]] = defaultdict(list)
    for many in by_method.values():
        ports = tuple(port for one in many for port in one.ports)
        first = many[0]
        merged = Wider(first.host, ports, first.methods, first.paths, first.example, all(one.exact for one in many))
        same[merged.host, merged.ports, merged.paths].append(merged)
    lines = []
    for many in same.values():
        first = many[0]
        methods = tuple(method for one in many for method in one.methods)
        methods = (ANY_METHOD,) if ANY_METHOD in methods and not _left_out(methods, found, first) else methods
        lines.append(
            Wider(first.host, first.ports, methods, first.paths, first.example, all(one.exact for one in many))
        )
    return tuple(lines)


def _left_out(methods: tuple[str, ...], found: list[Wider], like: Wider) -> set[str]:
    """The methods that are newly allowed somewhere, but not here: then "any" would say too much."""
    return {method for one in found for method in one.methods if one.host == like.host} - set(methods)
