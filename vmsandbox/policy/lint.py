"""What is odd in a policy that loads, beside its network: rules without effect or with too much of it.

Without it a deny that comes to nothing, or an allow that the organisation's file takes back, would be believed.
(`vmsandbox.egress.lint` looks at the network.)
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vmsandbox.policy.fetchers import bundles_for
from vmsandbox.policy.format.rendering import plain_policy
from vmsandbox.policy.layer import Layer
from vmsandbox.policy.looser import covers_command
from vmsandbox.policy.merging.merge_network import says_hosts
from vmsandbox.policy.merging.provenance import dotted
from vmsandbox.policy.places import inside
from vmsandbox.policy.tree.globs import is_glob
from vmsandbox.policy.values import NO_NETWORK, CommandsPolicy, FilesystemPolicy, KernelPolicy, Policy

# Which make a worker as good as the guest's root.
_MIGHTY = ("sys_admin", "sys_module", "sys_ptrace", "sys_rawio", "dac_override", "bpf", "setuid", "mac_admin", "mknod")
_SYSTEM = ("/etc", "/usr", "/bin", "/sbin", "/lib", "/boot", "/dev", "/proc", "/sys", "/run", "/var", "/root")


class Finding(NamedTuple):
    """One thing that a person should look at. where: `network.allowed_hosts[2]`. warning: it is probably a mistake."""

    where: str
    text: str
    warning: bool


def lint_policy(policy: Policy) -> tuple[Finding, ...]:
    """What is odd in one file alone."""
    return (
        *_paths(policy.filesystem),
        *_commands(policy.commands),
        *_kernel(policy.kernel),
        *_network(policy),
        *_once(policy),
    )


def lint_within(own: Layer, effective: Policy, wider: Sequence[Layer]) -> tuple[Finding, ...]:
    """What of a file has no effect because a wider one says otherwise.

    Args:
        own: the file.
        effective: what holds.
        wider: the other files that hold.
    """
    folder = own.source.parent if own.source else None
    ours = plain_policy(own.policy, folder)
    theirs = plain_policy(effective, folder, complete=True)
    names = ", ".join(str(one.source) for one in wider)
    return (
        *_taken_back(ours, theirs, (), names),
        *_commands_taken_back(own.policy.commands, effective.commands, names),
        *_no_hosts(wider),
    )


def _paths(section: FilesystemPolicy) -> Iterator[Finding]:
    denied = [one for one in section.denied_paths if not is_glob(one) and _anchored(one)]
    for number, path in enumerate(section.allowed_paths):
        where = f"filesystem.allowed_paths[{number}]"
        if hit := next((one for one in denied if inside(path, _folder(one))), None):
            yield Finding(where, f"allows {path}, which lies in {hit}, which is denied", True)
        if any(other != path and inside(path, other) for other in section.allowed_paths):
            yield Finding(where, f"allows {path} a second time", False)
        if path == "/" or _of_the_system(path):
            yield Finding(where, f"allows {path}, which is the guest's system", True)
        elif section.read_only and inside(path, "./") and path != section.output:
            yield Finding(where, f"allows {path}, which is in a read-only project", True)
    if section.output and (hit := next((one for one in denied if inside(section.output, _folder(one))), None)):
        yield Finding("filesystem.output", f"lies in {hit}, which is denied", True)
    for number, pattern in enumerate(section.denied_paths):
        if pattern in ("./", ".", "/", "~/", "~", "*", "**"):
            yield Finding(f"filesystem.denied_paths[{number}]", f"{pattern} denies the project itself", True)
    for number, mount in enumerate(section.tmpfs):
        if hit := next((one for one in denied if inside(mount.path, _folder(one))), None):
            yield Finding(f"filesystem.tmpfs[{number}]", f"{mount.path} lies in {hit}, which is denied", True)


def _of_the_system(path: str) -> bool:
    scratch = ("/var/tmp", "/var/cache", "/dev/shm", "/run/user")  # noqa: S108
    return any(inside(path, one) for one in _SYSTEM) and not any(inside(path, one) for one in scratch)


def _anchored(pattern: str) -> bool:
    return pattern.startswith(("./", "/", "~/"))


def _folder(pattern: str) -> str:
    """A denied path in the form of an allowed one."""
    head = pattern[:2] if pattern[:2] in ("./", "~/") else "/"
    rest = posixpath.normpath(pattern[len(head) :] or ".")
    return head if rest == "." else head + rest.lstrip("/")


def _commands(section: CommandsPolicy) -> Iterator[Finding]:
    for number, pattern in enumerate(section.allowed):
        where = f"commands.allowed[{number}]"
        if hit := _covering(pattern, section.denied):
            yield Finding(where, f"allows {pattern!a}, all of which {hit!a} denies", True)
        if hit := _covering(pattern, [one for one in section.allowed if one != pattern]):
            yield Finding(where, f"allows {pattern!a}, which {hit!a} allows already", False)
        if hit := _covering(pattern, section.require_confirmation):
            yield Finding(where, f"allows {pattern!a}, all of which {hit!a} asks about", False)
        if shlex.split(pattern)[0] == "*":
            yield Finding(where, "allows every program there is", True)
    runs = (*section.allowed, *section.require_confirmation)  # what is asked about need not be allowed as well
    for number, pattern in enumerate(section.denied):
        if section.allowed and not any(_may_meet(pattern, one) for one in runs):
            yield Finding(f"commands.denied[{number}]", f"denies {pattern!a}, which nothing allows", False)
    for number, pattern in enumerate(section.require_confirmation):
        if hit := _covering(pattern, section.denied):
            text = f"asks about {pattern!a}, all of which {hit!a} denies"
            yield Finding(f"commands.require_confirmation[{number}]", text, True)


def _covering(pattern: str, others: Sequence[str]) -> str | None:
    return next((one for one in others if covers_command(one, pattern)), None)


def _may_meet(one: str, other: str) -> bool:
    """Whether two patterns could mean the same command: not, if they name different programs."""
    first, second = (shlex.split(text)[0].rpartition("/")[2] for text in (one, other))
    # Versions (python3 beside python) and wrappers (pip beside python) are the matcher's: nothing is said of them.
    plain = [name.rstrip("0123456789.") for name in (first, second)]
    return is_glob(first + second) or plain[0] == plain[1]


def _kernel(section: KernelPolicy) -> Iterator[Finding]:
    for number, name in enumerate(section.capabilities):
        if name in _MIGHTY:
            text = f"{name} makes the worker nearly the guest's root: the other rules in the guest hold no longer"
            yield Finding(f"kernel.capabilities[{number}]", text, True)
    if section.new_privileges:
        yield Finding("kernel.new_privileges", "lets set-user-ID programs gain privileges", False)


def _network(policy: Policy) -> Iterator[Finding]:
    network = policy.network
    if network.mode in (None, NO_NETWORK) and (network.allowed_hosts or network.rules):
        why = "is none" if network.mode else "is not there"
        yield Finding("network.mode", f"{why}: no host is reached, although some are allowed", True)


def _once(policy: Policy) -> Iterator[Finding]:
    bundles = bundles_for(policy.session.post_create)
    if bundles and policy.network.mode in (None, NO_NETWORK):
        hosts = ", ".join(f'"{one}"' for one in bundles)
        text = f"fetches packages and has no network: network: {{mode: restricted, allowed_hosts: [{hosts}]}}"
        yield Finding("session.post_create", text, True)
    if policy.session.schedule is not None:
        text = "starts nothing by itself: `vmsandbox policy timer --install -- COMMAND` makes the timer"
        yield Finding("session.schedule", text, False)


def _taken_back(ours: Any, theirs: Any, where: tuple[str | int, ...], names: str) -> Iterator[Finding]:
    if where[:1] == ("commands",) or where in (("network", "allowed_hosts"), ("network", "rules")):
        return  # compared elsewhere
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name, value in ours.items():
            yield from _taken_back(value, theirs.get(name), (*where, name), names)
    elif isinstance(ours, list) and isinstance(theirs, list):
        for number, item in enumerate(ours):
            if item not in theirs:
                yield Finding(dotted((*where, number)), f"does not hold as it stands: {names} allows less", True)
    elif ours != theirs:
        yield Finding(dotted(where), f"does not hold: it is {theirs}, by {names}", True)


def _commands_taken_back(ours: CommandsPolicy, effective: CommandsPolicy, names: str) -> Iterator[Finding]:
    for number, pattern in enumerate(ours.allowed):
        for wider in effective.within:
            runs = (*wider.allowed, *wider.require_confirmation)
            refused = wider.allowed and not any(_may_meet(pattern, one) for one in runs)
            if refused or _covering(pattern, wider.denied):
                yield Finding(f"commands.allowed[{number}]", f"{pattern!a} has no effect: not allowed by {names}", True)
                break


def _no_hosts(wider: Sequence[Layer]) -> Iterator[Finding]:
    for layer in wider:
        network = layer.policy.network
        if says_hosts(layer) and not network.allowed_hosts and not network.rules:
            yield Finding("network", f"{layer.source} names no host that is allowed, so none is reached", True)
