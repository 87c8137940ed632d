"""The network sections of several policy files that hold together.

Without the rules kept apart (`within`), a project's precise allow would win over its organisation's broader deny, as
it does inside one file.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from vmsandbox.policy.layer import Layer
from vmsandbox.policy.places import covers
from vmsandbox.policy.values import NO_NETWORK, NetworkPolicy, SecretSource

# One of these is there: then the file says which hosts are reached, if only that none is.
_HOSTS = ("network.mode", "network.allowed_hosts", "network.denied_hosts", "network.rules")


def merge_network(outer: Layer, inner: Layer) -> NetworkPolicy:
    """Both hold: see `vmsandbox.policy.merging.merge`."""
    ours, theirs = outer.policy.network, inner.policy.network
    first, *rest = _chain(outer, inner)
    return NetworkPolicy(
        mode=_mode(ours.mode, theirs.mode),
        allowed_hosts=first.allowed_hosts,
        denied_hosts=first.denied_hosts,
        rules=first.rules,
        secrets=_secrets(outer, inner),
        packages_allow=_packages(ours.packages_allow, theirs.packages_allow),
        packages_deny=tuple(dict.fromkeys((*ours.packages_deny, *theirs.packages_deny))),
        packages_minimum_age_days=max(ours.packages_minimum_age_days, theirs.packages_minimum_age_days),
        dlp_secrets=_searched(outer, inner, "secrets"),
        dlp_canaries=_searched(outer, inner, "canaries"),
        dlp_freeze=ours.dlp_freeze or theirs.dlp_freeze,
        limits=_limits(dict(ours.limits), dict(theirs.limits)),
        resolver=ours.resolver or theirs.resolver,  # not what both name: nothing would mean the host's own
        within=tuple(rest),
    )


def says_hosts(layer: Layer) -> bool:
    """Whether a file says which hosts are reached."""
    return any(layer.says(key) for key in _HOSTS)


def _chain(outer: Layer, inner: Layer) -> list[NetworkPolicy]:
    """The hosts of all files that say any, the nearest first."""
    chain: list[NetworkPolicy] = []
    for layer in (inner, outer):
        if says_hosts(layer):
            section = layer.policy.network
            for one in (_hosts(section), *section.within):
                if not chain or chain[-1] != one:
                    chain.append(one)
    return chain or [NetworkPolicy()]


def _hosts(network: NetworkPolicy) -> NetworkPolicy:
    return NetworkPolicy(allowed_hosts=network.allowed_hosts, denied_hosts=network.denied_hosts, rules=network.rules)


def _mode(ours: str | None, theirs: str | None) -> str | None:
    """`restricted` and `filtered` allow every mode, `proxy` none but itself and none."""
    for mode in (NO_NETWORK, "proxy"):
        if mode in (ours, theirs):
            return mode
    return theirs or ours


def _secrets(outer: Layer, inner: Layer) -> tuple[SecretSource, ...]:
    ours, theirs = outer.policy.network.secrets, inner.policy.network.secrets
    if not (outer.says("network.secrets") and inner.says("network.secrets")):
        return ours if outer.says("network.secrets") else theirs
    pairs = [(one, other) for other in theirs for one in ours if one.name == other.name]
    return tuple(found for one, other in pairs if (found := _secret(one, other)))


def _secret(ours: SecretSource, theirs: SecretSource) -> SecretSource | None:
    """A secret that both name: from the same place, for the hosts and methods of both."""
    same = replace(ours, hosts=theirs.hosts, methods=theirs.methods)
    hosts = tuple(one for one in theirs.hosts if one in ours.hosts)
    methods = tuple(one for one in theirs.methods if one in ours.methods or not ours.methods)
    if same != theirs or not hosts or (theirs.methods and not methods):
        return None
    return replace(theirs, hosts=hosts, methods=methods or ours.methods)


def _packages(ours: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    found = [one for one in theirs if any(_same_packages(wide, one) for wide in ours)]
    found += [one for one in ours if any(_same_packages(wide, one) for wide in theirs)]
    return tuple(dict.fromkeys(found))


def _same_packages(wider: str, narrower: str) -> bool:
    """Whether one pattern has all packages of another, whichever way their names are spelt."""
    if wider == narrower:
        return True
    (kind, name), (other_kind, other) = (_split(one) for one in (wider, narrower))
    # A run of separators counts as one in some ecosystems: then a star that matches none of them proves nothing.
    runs = any(a in "-_." and b in "-_." for a, b in pairwise(other))
    return kind in ("", other_kind) and not runs and covers(name, other)


def _split(package: str) -> tuple[str, str]:
    kind, colon, name = package.partition(":")
    return (kind, name) if colon else ("", package)


def _searched(outer: Layer, inner: Layer, what: str) -> bool:
    """Searched if one of those that say so says so; if none does, it is."""
    said = [
        bool(getattr(one.policy.network, f"dlp_{what}")) for one in (outer, inner) if one.says(f"network.dlp.{what}")
    ]
    return any(said) if said else True


def _limits(ours: dict[str, float], theirs: dict[str, float]) -> tuple[tuple[str, float], ...]:
    found = {}
    for name in dict.fromkeys((*ours, *theirs)):
        values = [one[name] for one in (ours, theirs) if name in one]
        limited = [value for value in values if value or name != "bytes_per_second"]  # 0 there: no limit
        found[name] = min(limited, default=0)
    return tuple(found.items())
