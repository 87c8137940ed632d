"""What became looser between two policies besides the requests they allow: secrets, packages, DLP, limits.

Without it a change that hands a secret to another host, or switches the search for secrets off, would count as none.
Where sets cannot be compared (globs of package names), a difference in the text is taken for a looser one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from vmsandbox.egress.hosts import pattern_matches
from vmsandbox.egress.values import EgressPolicy, SecretUse
from vmsandbox.policy.values import NO_NETWORK, NetworkPolicy, SecretSource


def looser_network(before: NetworkPolicy, after: NetworkPolicy) -> tuple[str, ...]:
    """What of a policy's text never reaches the broker: its mode, and where secrets come from."""
    found = []
    old, new = before.mode or NO_NETWORK, after.mode or NO_NETWORK
    if old == NO_NETWORK != new:
        found.append(f"there is a network at all (mode {new})")
    elif new == "filtered" != old:
        found.append("the guest gets a network card (mode filtered)")
    known = {one.name: one for one in before.secrets}
    for secret in after.secrets:
        was = known.get(secret.name)
        if was is not None and _source(was) != _source(secret):
            found.append(f"the secret {secret.name} comes from {_source(secret)}, no longer from {_source(was)}")
        elif was is None and secret.command:
            found.append(f"the secret {secret.name} runs a program on the host: {' '.join(secret.command)!a}")
    return tuple(found)


def looser_policy(before: EgressPolicy, after: EgressPolicy, hosts: list[tuple[str, str]]) -> tuple[str, ...]:
    """What of the compiled policies is looser.

    Args:
        hosts: classes of hosts, as a pattern and one host of it each.
    """
    return (
        *_secrets(before, after, hosts),
        *_packages(before, after),
        *_dlp(before, after),
        *_limits(before, after),
        *(["what no rule allows is let through and recorded"] if after.learn and not before.learn else []),
        *([f"names are resolved by {', '.join(after.resolver) or 'the host'}"] * (after.resolver != before.resolver)),
    )


def _source(secret: SecretSource) -> str:
    if secret.env is not None:
        return f"the variable {secret.env}"
    return f"the file {secret.file!a}" if secret.file is not None else f"the program {' '.join(secret.command)!a}"


def _secrets(before: EgressPolicy, after: EgressPolicy, hosts: list[tuple[str, str]]) -> Iterator[str]:
    known = {one.name: one for one in before.secrets}
    for secret in after.secrets:
        was = known.get(secret.name)
        new_hosts = [name for name, host in hosts if _for(secret, host) and not (was and _for(was, host))]
        if new_hosts:
            yield f"the secret {secret.name} is sent to {', '.join(new_hosts)}"
        if was is None:
            continue
        if was.methods and (not secret.methods or set(secret.methods) - set(was.methods)):
            yield f"the secret {secret.name} is sent with {', '.join(secret.methods) or 'any method'}"
        if (was.header, was.prefix) != (secret.header, secret.prefix):
            yield f"the secret {secret.name} is sent as {secret.header}: {secret.prefix}…"


def _for(secret: SecretUse, host: str) -> bool:
    return any(pattern_matches(pattern, host) for pattern in secret.hosts)


def _packages(before: EgressPolicy, after: EgressPolicy) -> Iterator[str]:
    old, new = before.packages, after.packages
    if old.allow is not None:
        if new.allow is None:
            yield "any package may be fetched"
        elif more := [one for one in new.allow if one not in old.allow]:
            yield f"packages may be fetched: {', '.join(more)}"
    if gone := [one for one in old.deny if one not in new.deny]:
        yield f"packages are no longer denied: {', '.join(gone)}"
    if new.minimum_age_days < old.minimum_age_days:
        yield f"packages may be {new.minimum_age_days:g} days old, no longer {old.minimum_age_days:g}"


def _dlp(before: EgressPolicy, after: EgressPolicy) -> Iterator[str]:
    for one in fields(after.dlp):
        if getattr(before.dlp, one.name) and not getattr(after.dlp, one.name):
            what = (
                "a hit no longer freezes the guest" if one.name == "freeze" else f"{one.name} are no longer looked for"
            )
            yield f"dlp: {what}"


def _limits(before: EgressPolicy, after: EgressPolicy) -> Iterator[str]:
    for one in fields(after.limits):
        old, new = getattr(before.limits, one.name), getattr(after.limits, one.name)
        unlimited = one.name == "bytes_per_second"  # 0 there
        if (new or not unlimited) and (not old and unlimited):
            continue
        if new > old or (unlimited and not new and old):
            yield f"limits.{one.name} is {new:g}, no longer {old:g}" if new else f"limits.{one.name} is gone"
