"""Makes the rules that the broker decides by of what a person wrote.

Without one place for it, bundles, default ports and limits would mean one thing to `policy check` and another to the
broker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace

from vmsandbox.egress.bundles import bundles
from vmsandbox.egress.hosts import parse_entry
from vmsandbox.egress.values import (
    WEB_PORTS,
    Dlp,
    EgressLimits,
    EgressPolicy,
    HostRule,
    PackageRules,
    SecretUse,
    Tls,
)
from vmsandbox.errors import UserInputError
from vmsandbox.policy.values import NetworkPolicy, NetworkRule, SecretSource


def compile_policy(
    network: NetworkPolicy, *, placeholders: Mapping[str, str] | None = None, learn: bool = False
) -> EgressPolicy:
    """The rules of a checked `network` section. Its mode is not looked at.

    Args:
        placeholders: by the secrets' names; a secret that has none is left out: it is not in force.
        learn: what is refused only because no rule is there is let through.

    Raises:
        UserInputError: a rule narrows a bundle to nothing, or a name is no host (never of what `load_policy` made).
    """
    known = placeholders or {}
    allow, deny = _hosts(network)
    return EgressPolicy(
        allow=allow,
        deny=deny,
        secrets=tuple(_secret(one, known[one.name]) for one in network.secrets if known.get(one.name)),
        packages=PackageRules(network.packages_allow, network.packages_deny, network.packages_minimum_age_days),
        dlp=Dlp(network.dlp_secrets, network.dlp_canaries, network.dlp_freeze),
        limits=_limits(network),
        resolver=network.resolver,
        learn=learn,
        # On purpose without `learn`: what a wider policy refuses is not learned of.
        within=tuple(EgressPolicy(*_hosts(one)) for one in network.within),
    )


def _hosts(network: NetworkPolicy) -> tuple[tuple[HostRule, ...], tuple[HostRule, ...]]:
    allow = [rule for i, text in enumerate(network.allowed_hosts) for rule in _entry(text, f"allowed_hosts[{i}]")]
    for number, one in enumerate(network.rules):
        allow.extend(_narrowed(one, f"network.rules[{number}]"))
    deny = [rule for i, text in enumerate(network.denied_hosts) for rule in _denied(text, f"denied_hosts[{i}]")]
    return tuple(allow), tuple(deny)


def _entry(text: str, where: str) -> Iterator[HostRule]:
    if text.startswith("@"):
        yield from _bundle(text, where)
        return
    pattern, port = parse_entry(text)
    yield HostRule(pattern, ports=WEB_PORTS if port is None else (port,), source=f"network.{where}")


def _denied(text: str, where: str) -> Iterator[HostRule]:
    # On purpose: a denied host without a port is denied on all ports, and a bundle's hosts whatever is asked of them.
    if text.startswith("@"):
        for pattern in dict.fromkeys(rule.pattern for rule in _bundle(text, where)):
            yield HostRule(pattern, ports=(), source=f"network.{where}")
        return
    pattern, port = parse_entry(text)
    yield HostRule(pattern, ports=() if port is None else (port,), source=f"network.{where}")


def _bundle(text: str, where: str) -> tuple[HostRule, ...]:
    try:
        return bundles()[text[1:]]
    except KeyError:
        raise UserInputError(f"network.{where}: there is no bundle {text!a}") from None


def _narrowed(rule: NetworkRule, source: str) -> Iterator[HostRule]:
    tls = Tls(rule.tls)
    if not rule.host.startswith("@"):
        ports = rule.ports or WEB_PORTS
        yield HostRule(rule.host, ports, rule.methods, rule.paths, rule.addresses, tls, source)
        return
    found = False
    for one in _bundle(rule.host, source.removeprefix("network.")):
        ports = tuple(port for port in one.ports if port in rule.ports) if rule.ports else one.ports
        methods = tuple(method for method in one.methods if method in rule.methods) if rule.methods else one.methods
        if ports and methods:
            found = True
            # load.py refuses paths here: those of a bundle and of a rule cannot both be kept.
            yield replace(
                one, ports=ports, methods=methods, addresses=rule.addresses, tls=tls, source=f"{source} {rule.host}"
            )
    if not found:
        raise UserInputError(f"{source}: nothing of {rule.host} is left", resolution="name what the bundle has")


def _secret(secret: SecretSource, placeholder: str) -> SecretUse:
    hosts: list[str] = []
    for text in secret.hosts:
        hosts.extend([rule.pattern for rule in _bundle(text, "secrets")] if text.startswith("@") else [text])
    return SecretUse(
        secret.name, placeholder, tuple(dict.fromkeys(hosts)), secret.header, secret.prefix, secret.methods
    )


def _limits(network: NetworkPolicy) -> EgressLimits:
    kinds = {one.name: one.type for one in fields(EgressLimits)}
    return EgressLimits(**{name: int(value) if kinds[name] == "int" else value for name, value in network.limits})  # type: ignore[arg-type]
