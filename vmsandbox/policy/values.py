"""The policy as the rest of the program sees it: a frozen value with no validation library behind it.

Without this split every start would pay for importing pydantic, also when there is no policy file. A
user's file is checked in `load.py`, which is imported only when there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NO_NETWORK = "none"


@dataclass(frozen=True)
class Policy:
    """What a person allows a session, in the words of `.claude/sandbox.yaml`. `Policy()` is the default.

    allowed_paths, denied_paths   globs: relative to the project, `~/…` or absolute; all on the host
    network_mode                  none, restricted, proxy, filtered; None: the file does not say
    allowed_hosts, denied_hosts   host names or globs
    commands_*                    command lines or globs
    source                        the file that it was read from; None: the default
    """

    allowed_paths: tuple[str, ...] = ()
    denied_paths: tuple[str, ...] = ()
    network_mode: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    denied_hosts: tuple[str, ...] = ()
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
    if policy.network_mode not in (None, NO_NETWORK):
        said.append(
            f"network.mode {policy.network_mode} is not available yet: the guest has no network at all, "
            "which is stricter than asked"
        )
    if policy.allowed_hosts:
        said.append(
            "network.allowed_hosts is not used yet: the guest has no network at all, which is stricter than asked"
        )
    if policy.denied_hosts:
        said.append("network.denied_hosts is not used yet: the guest has no network at all, so every host is denied")
    for name, commands in (
        ("allowed", policy.commands_allowed),
        ("denied", policy.commands_denied),
        ("require_confirmation", policy.commands_require_confirmation),
    ):
        if commands:
            said.append(f"commands.{name} is not enforced yet: any command may run inside the guest")
    return said
