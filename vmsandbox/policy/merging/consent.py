"""What a policy does not get only because it lies in the project: that would be the project's author's choice.

A repository that somebody else wrote brings its own `.claude/sandbox.yaml`. It may name public hosts, which get nothing
but what is the author's anyway. But a secret's source is a file, a variable or a *command* of this host, a variable of
this host's environment may be a secret as well, and an address is a place in this host's own network: those are a
person's to give, by naming the file (`--policy`).
"""

from __future__ import annotations

import re

from vmsandbox.policy.values import Policy

# What says how text looks and what time it is: no secret of anybody's.
_HARMLESS = re.compile(r"LANG|LANGUAGE|LC_[A-Z]+|TZ|TERM|COLORTERM|NO_COLOR|FORCE_COLOR|COLUMNS|LINES|CI")


def reaches_into_host(policy: Policy, *, network: bool = True) -> list[str]:
    """What a policy asks of this host, one line each with the key (empty: nothing).

    Args:
        network: whether the guest has a network at all; without one that section asks for nothing.
    """
    names = enumerate(policy.session.environment)
    wanted = [
        f"session.environment[{number}]: the host's {name}" for number, name in names if not _HARMLESS.fullmatch(name)
    ]
    return wanted + (_by_network(policy) if network else [])


def _by_network(policy: Policy) -> list[str]:
    wanted = []
    for number, secret in enumerate(policy.network.secrets):
        kind, source = next(
            (kind, value)
            for kind, value in (("env", secret.env), ("file", secret.file), ("command", secret.command))
            if value
        )
        text = " ".join(source) if isinstance(source, tuple) else source
        wanted.append(f"network.secrets[{number}]: {secret.name} from the host's {kind} {text}")
    for number, rule in enumerate(policy.network.rules):
        if rule.addresses:
            wanted.append(f"network.rules[{number}].addresses: {', '.join(rule.addresses)}")
    if policy.network.resolver:
        wanted.append(f"network.resolver: {', '.join(policy.network.resolver)}")
    return wanted
