"""The policy as the rest of the program sees it: a frozen value with no validation library behind it.

Without this split every start would pay for importing pydantic, also when there is no policy file. A
user's file is checked in `load.py`, which is imported only when there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

NO_NETWORK = "none"


@dataclass(frozen=True)
class NetworkRule:
    """One of `network.rules`, canonical: allows a host, narrowed to what it names.

    host        a pattern (`example.org`, `*.example.org`, `*`, an address) or a bundle (`@pypi`)
    ports, methods, paths   empty: not narrowed (ports: those of the web, or the bundle's)
    addresses   dialled instead of asking DNS
    tls         auto, inspect, passthrough
    """

    host: str
    ports: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    tls: str = "auto"


@dataclass(frozen=True)
class SecretSource:
    """One of `network.secrets`: where its value comes from on the host, never the value itself.

    name                 of the variable in the guest
    env, file, command   exactly one is given; file as written (`~/…` or relative to the project); command: argv
    hosts                patterns and bundles that it is for
    header, prefix       where it goes: header in lower case, prefix before the value
    methods              empty: any
    """

    name: str
    env: str | None = None
    file: str | None = None
    command: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    header: str = "authorization"
    prefix: str = ""
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkPolicy:
    """`sandbox.network`, checked and canonical; `vmsandbox.egress.compile` makes the rules of it.

    mode                       none, restricted, proxy, filtered; None: the file does not say
    allowed_hosts, denied_hosts   `name`, `*.name`, `*`, each with or without `:port`, an address, `@bundle`
    packages_allow             None: any
    limits                     the limits that are named, by name
    resolver                   DNS servers, `address` or `address:port` (`[address]:port` for IPv6)
    """

    mode: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    denied_hosts: tuple[str, ...] = ()
    rules: tuple[NetworkRule, ...] = ()
    secrets: tuple[SecretSource, ...] = ()
    packages_allow: tuple[str, ...] | None = None
    packages_deny: tuple[str, ...] = ()
    packages_minimum_age_days: float = 0
    dlp_secrets: bool = True
    dlp_canaries: bool = True
    dlp_freeze: bool = False
    limits: tuple[tuple[str, float], ...] = ()
    resolver: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What a person allows a session, in the words of `.claude/sandbox.yaml`. `Policy()` is the default.

    allowed_paths, denied_paths   globs: relative to the project, `~/…` or absolute; all on the host
    network                       what the guest may reach
    commands_*                    command lines or globs
    source                        the file that it was read from; None: the default
    """

    allowed_paths: tuple[str, ...] = ()
    denied_paths: tuple[str, ...] = ()
    network: NetworkPolicy = field(default_factory=NetworkPolicy)
    commands_allowed: tuple[str, ...] = ()
    commands_denied: tuple[str, ...] = ()
    commands_require_confirmation: tuple[str, ...] = ()
    source: Path | None = None


def unenforced(policy: Policy) -> list[str]:
    """What this version reads from the policy but does not act on, one plain sentence each, for a notice."""
    said = []
    if policy.allowed_paths:
        said.append(
            "filesystem.allowed_paths is not enforced yet: the whole project is copied in, except what is denied"
        )
    for name, commands in (
        ("allowed", policy.commands_allowed),
        ("denied", policy.commands_denied),
        ("require_confirmation", policy.commands_require_confirmation),
    ):
        if commands:
            said.append(f"commands.{name} is not enforced yet: any command may run inside the guest")
    return said
