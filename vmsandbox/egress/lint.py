"""What is odd in a `network` section that loads: rules without effect, and rules that allow more than they look like.

Without it a deny that comes to nothing, or a plain `github.com` beside `@github`, would be believed.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmsandbox.egress.addresses import refused_address
from vmsandbox.egress.bundles import bundles
from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.diff import host_classes
from vmsandbox.egress.hosts import is_address, pattern_matches, patterns_for, precision
from vmsandbox.egress.values import Destination, EgressPolicy, HostRule, Tls
from vmsandbox.policy.lint import Finding
from vmsandbox.policy.values import NetworkPolicy


def lint(network: NetworkPolicy) -> tuple[Finding, ...]:
    """All findings, those of one kind together."""
    policy = compile_policy(network, placeholders={one.name: one.name for one in network.secrets})
    rules = Rules(policy)
    classes = dict(host_classes(policy, policy))
    return (
        *_any_host(policy),
        *_unreachable(policy, rules, classes),
        *_idle_denies(network, policy, classes),
        *_widening(network, policy),
        *_hidden(policy, classes),
        *_incomplete_tools(network, rules),
        *_never_dialled(policy),
        *_secrets(policy, rules, classes),
    )


def _any_host(policy: EgressPolicy) -> Iterator[Finding]:
    for rule in policy.allow:
        if rule.pattern == "*":
            narrowed = ", narrowed by methods or paths" if rule.methods or rule.paths else ""
            yield Finding(rule.source, f"allows every host there is{narrowed}", True)


def _unreachable(policy: EgressPolicy, rules: Rules, classes: dict[str, str]) -> Iterator[Finding]:
    by_source: dict[str, list[HostRule]] = {}
    for rule in policy.allow:
        by_source.setdefault(f"{rule.source} {rule.pattern}", []).append(rule)
    for same in by_source.values():
        rule = same[0]
        host = classes.get(rule.pattern)
        ports = {port for one in same for port in one.ports}
        if host is None or not any(_lets_through(rules, rule, one, port) for one in classes.values() for port in ports):
            refusal = "" if host is None else f": {rules.host(Destination(host, min(ports))).reason}"
            yield Finding(rule.source, f"allows nothing of {rule.pattern}{refusal}", True)
    seen: set[HostRule] = set()
    for rule in policy.allow:
        plain = HostRule(rule.pattern, rule.ports, rule.methods, rule.paths, rule.addresses, rule.tls)
        if plain in seen:
            yield Finding(rule.source, f"allows {rule.pattern} a second time", False)
        seen.add(plain)


def _lets_through(rules: Rules, rule: HostRule, host: str, port: int) -> bool:
    decision = rules.host(Destination(host, port))
    return decision.allowed and decision.matched is not None and decision.matched.pattern == rule.pattern


def _idle_denies(network: NetworkPolicy, policy: EgressPolicy, classes: dict[str, str]) -> Iterator[Finding]:
    for number, text in enumerate(network.denied_hosts):
        source = f"network.denied_hosts[{number}]"
        ours = [rule for rule in policy.deny if rule.source == source]
        if any(rule.pattern == "*" and not rule.ports for rule in ours) and len(ours) == 1:
            continue  # the default, written down: as it should be
        without = Rules(EgressPolicy(policy.allow, tuple(rule for rule in policy.deny if rule.source != source)))
        if not any(_denies_something(rule, without, policy, classes) for rule in ours):
            yield Finding(source, f"denies {text}, which nothing allows", False)


def _denies_something(deny: HostRule, without: Rules, policy: EgressPolicy, classes: dict[str, str]) -> bool:
    ports = {port for rule in policy.allow for port in rule.ports if not deny.ports or port in deny.ports}
    hosts = [host for host in classes.values() if pattern_matches(deny.pattern, host)]
    for host in hosts:
        for port in ports:
            decision = without.host(Destination(host, port))
            if decision.matched and precision(decision.matched.pattern) <= precision(deny.pattern):
                return True
    return False


def _widening(network: NetworkPolicy, policy: EgressPolicy) -> Iterator[Finding]:
    """A plain allow beside what was meant to narrow: together they allow all that the plain one does."""
    for rule in policy.allow:
        if rule.methods or rule.paths:
            continue
        for other in policy.allow:
            if other.pattern != rule.pattern or not (other.methods or other.paths) or other is rule:
                continue
            if set(other.ports) & set(rule.ports):
                what = "passes through unseen" if rule.tls is Tls.PASSTHROUGH else "allows all of"
                text = f"{what} {rule.pattern}, so that {other.source} narrows nothing there"
                yield Finding(rule.source, text, True)
                break
    for number, text in enumerate(network.allowed_hosts):
        for name, members in bundles().items():
            plain = any(one.pattern == text and (one.paths or "POST" in one.methods) for one in members)
            if plain and f"@{name}" not in network.allowed_hosts:
                yield Finding(
                    f"network.allowed_hosts[{number}]",
                    f"allows every request to {text}, also those that write; @{name} allows what the tool needs",
                    False,
                )


def _hidden(policy: EgressPolicy, classes: dict[str, str]) -> Iterator[Finding]:
    """A port that a less precise pattern allows, and a more precise one takes away by not naming it."""
    ports: dict[str, set[int]] = {}
    for rule in policy.allow:
        ports.setdefault(rule.pattern, set()).update(rule.ports)
    told: set[str] = set()
    for rule in policy.allow:
        if rule.methods or rule.paths or rule.pattern in told or rule.pattern not in classes:
            continue  # what is narrowed is meant to be
        for wider in patterns_for(classes[rule.pattern]):
            gone = ports.get(wider, set()) - ports[rule.pattern]
            if wider != rule.pattern and gone:
                told.add(rule.pattern)
                shown = ", ".join(map(str, sorted(gone)))
                yield Finding(
                    rule.source, f"leaves {rule.pattern} without port {shown}, which {wider} would allow", False
                )
                break


def _incomplete_tools(network: NetworkPolicy, rules: Rules) -> Iterator[Finding]:
    """One host of a package index named, and the others that the tool needs not allowed."""
    for number, text in enumerate(network.allowed_hosts):
        for name, members in bundles().items():
            index = name in ("pypi", "npm", "crates", "go", "rubygems")
            if not index or all(one.pattern != text for one in members) or f"@{name}" in network.allowed_hosts:
                continue
            hosts = dict.fromkeys(one.pattern for one in members)
            missing = [one for one in hosts if not rules.host(Destination(one, 443)).allowed]
            if missing:
                yield Finding(
                    f"network.allowed_hosts[{number}]",
                    f"is one of the hosts of @{name}, which has also {', '.join(missing)}",
                    False,
                )


def _never_dialled(policy: EgressPolicy) -> Iterator[Finding]:
    for rule in policy.allow:
        if is_address(rule.pattern) and not rule.addresses:
            why = refused_address(rule.pattern, ())
            if why:
                text = f"{rule.pattern} is {why}, and is not dialled: name it under `addresses` of a rule"
                yield Finding(rule.source, text, True)


def _secrets(policy: EgressPolicy, rules: Rules, classes: dict[str, str]) -> Iterator[Finding]:
    ports = {port for rule in policy.allow for port in rule.ports}
    for number, secret in enumerate(policy.secrets):
        for pattern in secret.hosts:
            hosts = [host for host in classes.values() if pattern_matches(pattern, host)]
            there = [Destination(host, port) for host in hosts for port in ports]
            allowed = [to for to in there if rules.host(to).allowed]
            where = f"network.secrets[{number}]"
            if not allowed:
                yield Finding(where, f"{secret.name} is for {pattern}, which nothing allows", True)
            elif any(to.port != 80 and not rules.inspects(to) for to in allowed):
                yield Finding(
                    where, f"{secret.name} is for {pattern}, which is passed through: nothing can be put in", True
                )
