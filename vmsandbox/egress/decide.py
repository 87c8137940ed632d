"""Decides what a guest may reach. Pure: the same policy and question, the same answer.

The most precise pattern of a host decides (an exact name, a longer `*.suffix`, a shorter one, `*`). All allow rules of
that pattern together are what is allowed: ports, methods and paths; a less precise one adds nothing to it. A deny of
the same or a more precise pattern wins. Deny rules have no ports (all of them) or some.

Without the remedy in each refusal a person would widen the policy by guessing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from vmsandbox.egress import remedies
from vmsandbox.egress.hosts import (
    BadHostError,
    parse_address,
    patterns_for,
    precision,
    refused_address,
)
from vmsandbox.egress.paths import BadPathError, glob_matches, readings
from vmsandbox.egress.values import Decision, Destination, EgressPolicy, HostRule, Tls

DEFAULT_DENY = "default-deny"
LEARN = "learn"
_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")  # RFC 9110 5.6.2
_TUNNELS = ("CONNECT", "TRACE")


class Rules:
    """A policy and those that it is within: each of them has to allow, and the first that refuses decides.

    Args:
        policy: as `compile_policy` makes it: patterns, methods and globs are canonical.
    """

    def __init__(self, policy: EgressPolicy) -> None:
        self._layers = [_Layer(one) for one in (policy, *policy.within)]

    def host(self, to: Destination) -> Decision:
        """Whether anything at all may go there: asked before TLS is looked into, and of every tunnel."""
        return self._every(lambda layer: layer.host(to))

    def request(self, to: Destination, method: str, path: str) -> Decision:
        """Whether one request may be made. Its host has to be the one that was checked (SNI, Host, :authority).

        Args:
            path: as it was sent, still encoded; from `?` on it is ignored.
        """
        return self._every(lambda layer: layer.request(to, method, path))

    def paths(self, to: Destination, method: str) -> tuple[tuple[str, ...], ...] | None:
        """Sets of globs; a path has to match one of each that a method may ask for. Empty: any path; None: none."""
        found = []
        for layer in self._layers:
            globs = layer.paths(to, method)
            if globs is None:
                return None
            if globs:
                found.append(globs)
        return tuple(found)

    def name(self, host: str) -> Decision:
        """Whether a canonical name may be resolved: something at it is allowed, on whichever port."""
        refusal = None
        for port in sorted({port for layer in self._layers for port in layer.ports(host)}) or [443]:
            decision = self.host(Destination(host, port))
            if decision.allowed:
                return decision
            refusal = refusal or decision
        assert refusal is not None
        return refusal

    def inspects(self, to: Destination) -> bool:
        """Whether TLS to there is looked into: unless every policy passes it through."""
        return any(layer.inspects(to) for layer in self._layers)

    def addresses(self, to: Destination) -> tuple[str, ...]:
        """What is dialled instead of asking DNS; empty: DNS is asked.

        The widest policy says which there are; those within it can only take some away.
        """
        found = named = self._layers[-1].addresses(to)
        for layer in self._layers:
            ours = layer.addresses(to)
            found = tuple(one for one in found if not ours or one in ours)
        return found or named  # none in common: each will be refused

    def address(self, to: Destination, address: str, own_addresses: Collection[str]) -> Decision:
        """Whether this address may be dialled for that destination. Asked right before the dial, of what is dialled."""
        named = self._layers[-1].addresses(to)
        return self._every(
            lambda layer: layer.address(to, address, own_addresses),
            # What the widest policy names for a host holds for those within it that name nothing there.
            [layer for layer in self._layers if not named or layer.addresses(to)],
        )

    def _every(self, ask: Callable[[_Layer], Decision], layers: list[_Layer] | None = None) -> Decision:
        asked = self._layers if layers is None else layers
        first = ask(asked[0])
        if not first.allowed and asked[0] is self._layers[0]:
            return first
        for layer in asked:
            decision = first if layer is asked[0] else ask(layer)
            if not decision.allowed:
                # Nothing that a project adds to its own policy would change it.
                return replace(decision, reason=f"{decision.reason} (in a policy above the project's)", remedy="")
        return first


class _Layer:
    """One policy alone, indexed by pattern."""

    def __init__(self, policy: EgressPolicy) -> None:
        self._policy = policy
        self._allow = _by_pattern(policy.allow)
        self._deny = _by_pattern(policy.deny)

    def host(self, to: Destination) -> Decision:
        pattern, rules = self._deciding(to.host)
        here = [rule for rule in rules if to.port in rule.ports]
        denied = self._denied(to)
        if denied and (not rules or precision(denied.pattern) >= precision(pattern)):
            # `*` denied beside nothing allowed is the default, written down.
            return self._by_deny(to, denied) if rules or denied.pattern != "*" else self._by_default(to)
        if here:
            return Decision(True, here[0].source, f"{here[0].source} allows {to}", matched=here[0])
        if rules:
            ports = ", ".join(map(str, sorted({port for rule in rules for port in rule.ports})))
            reason = f"port {to.port} of {to.host} is not allowed: {rules[0].source} allows {ports}"
            return Decision(False, rules[0].source, reason, remedies.allow_port(pattern, to.port))
        return self._by_default(to)

    def request(self, to: Destination, method: str, path: str) -> Decision:
        if not _METHOD.fullmatch(method) or method.upper() in _TUNNELS:
            return Decision(False, "bad-method", f"{method[:64]!a} is no method that is passed on")
        decision = self.host(to)
        if not decision.allowed or decision.matched is None:
            return decision
        pattern, rules = self._deciding(to.host)
        here = [rule for rule in rules if to.port in rule.ports]
        by_method = [rule for rule in here if not rule.methods or method in rule.methods]
        if not by_method:
            methods = ", ".join(sorted({one for rule in here for one in rule.methods}))
            reason = f"{method} is not allowed for {to.host}: {here[0].source} allows {methods}"
            return Decision(False, here[0].source, reason, remedies.allow_request(pattern, to.port, method, path))
        for rule in by_method:
            if not rule.paths:
                return Decision(True, rule.source, f"{rule.source} allows {method} {to}", matched=rule)
        return self._by_path(to, method, path, by_method)

    def paths(self, to: Destination, method: str) -> tuple[str, ...] | None:
        """The globs of the paths that a method may ask for: empty for any path, None for none."""
        if not self.host(to).allowed:
            return None
        _, rules = self._deciding(to.host)
        here = [rule for rule in rules if to.port in rule.ports and (not rule.methods or method in rule.methods)]
        if not here:
            return None
        any_path = any(not rule.paths for rule in here)
        return () if any_path else tuple(dict.fromkeys(glob for rule in here for glob in rule.paths))

    def ports(self, host: str) -> set[int]:
        """Those of the rules that decide about a host."""
        return {port for rule in self._deciding(host)[1] for port in rule.ports}

    def inspects(self, to: Destination) -> bool:
        """Whether TLS to there is looked into: always, unless the rules that decide all say `passthrough`.

        Unseen, nothing would hold the Host of a request to the name that was let through: many names are served at one
        address, and some of them are anybody's.
        """
        _, rules = self._deciding(to.host)
        here = [rule for rule in rules if to.port in rule.ports]
        unseen = [rule for rule in here if rule.tls is Tls.PASSTHROUGH and not (rule.methods or rule.paths)]
        return not unseen or any(rule.tls is Tls.INSPECT or rule.methods or rule.paths for rule in here)

    def addresses(self, to: Destination) -> tuple[str, ...]:
        _, rules = self._deciding(to.host)
        found = (one for rule in rules if to.port in rule.ports for one in rule.addresses)
        return tuple(dict.fromkeys(found))

    def address(self, to: Destination, address: str, own_addresses: Collection[str]) -> Decision:
        try:
            address = parse_address(address)
        except BadHostError:
            return Decision(False, "bad-address", f"{to.host} has no address that can be dialled")
        if named := self.addresses(to):
            _, rules = self._deciding(to.host)
            rule = next((one for one in rules if to.port in one.ports and address in one.addresses), None)
            if rule is None:
                reason = f"{address} is none of the addresses that the policy names for {to.host}: {', '.join(named)}"
                return Decision(False, "other-address", reason)
            return Decision(True, rule.source, f"{rule.source} names {address} for {to.host}", matched=rule)
        why = refused_address(address, own_addresses)
        if why is None:
            return Decision(True, "public-address", f"{address} is a public address")
        reason = f"{to.host} is at {address}, {why}, where only an address that the policy names is dialled"
        return Decision(False, "private-address", reason, remedies.allow_address(to, address))

    def _deciding(self, host: str) -> tuple[str, list[HostRule]]:
        """The most precise pattern with allow rules that covers a host, and all of its rules."""
        for pattern in patterns_for(host):
            if rules := self._allow.get(pattern):
                return pattern, rules
        return "*", []

    def _denied(self, to: Destination) -> HostRule | None:
        for pattern in patterns_for(to.host):
            for rule in self._deny.get(pattern, ()):
                if not rule.ports or to.port in rule.ports:
                    return rule
        return None

    def _by_deny(self, to: Destination, rule: HostRule) -> Decision:
        if rule.pattern == "*" and self._policy.learn:
            return Decision(True, LEARN, f"{to} is let through to learn; the policy does not allow it")
        reason = f"{rule.source} denies {to.host}" + (f" ({rule.pattern})" if rule.pattern != to.host else "")
        # An exact deny is taken away by nothing that could be added.
        return Decision(False, rule.source, reason, "" if rule.pattern == to.host else remedies.allow_host(to))

    def _by_default(self, to: Destination) -> Decision:
        if self._policy.learn:
            return Decision(True, LEARN, f"{to} is let through to learn; the policy does not allow it")
        return Decision(False, DEFAULT_DENY, f"no rule allows {to.host}", remedies.allow_host(to))

    def _by_path(self, to: Destination, method: str, path: str, rules: list[HostRule]) -> Decision:
        source = rules[0].source
        try:
            found = readings(path)
        except BadPathError as error:
            return Decision(False, "ambiguous-path", f"{source} allows only some paths of {to.host}: {error.brief}")
        matched: HostRule | None = None
        for reading in found:
            matched = next((rule for rule in rules for glob in rule.paths if glob_matches(glob, reading)), None)
            if matched is None:
                remedy = remedies.allow_request(rules[0].pattern, to.port, method, path)
                globs = ", ".join(dict.fromkeys(glob for rule in rules for glob in rule.paths))
                reason = f"{method} {ascii(reading[:200])[1:-1]} is not allowed for {to.host}: {source} allows {globs}"
                return Decision(False, source, reason, remedy)
        assert matched is not None
        return Decision(True, matched.source, f"{matched.source} allows {method} {to}", matched=matched)


def _by_pattern(rules: Iterable[HostRule]) -> dict[str, list[HostRule]]:
    found: dict[str, list[HostRule]] = defaultdict(list)
    for rule in rules:
        found[rule.pattern].append(rule)
    return dict(found)
