"""Several policy files that hold together: an organisation's, a person's, a project's.

Each key that a file has holds; a key that it does not have says nothing, and what no file says is the default. So the
order matters only for what cannot be combined (an image, a command that runs once): there the wider file wins. Without
this a project could allow itself what its organisation does not.

What becomes of two values is in docs/policy.md. Requests and commands cannot be merged as lists: there the wider
files' rules are kept beside the project's (`within`), and all of them are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import reduce
from typing import TypeVar

from vmsandbox.errors import RefusedError
from vmsandbox.policy.layer import Layer
from vmsandbox.policy.merging.merge_network import merge_network
from vmsandbox.policy.merging.return_rules import narrowed
from vmsandbox.policy.places import common, inside, inside_any, mount_over
from vmsandbox.policy.values import (
    CommandsPolicy,
    FilesystemPolicy,
    KernelPolicy,
    Policy,
    PushPolicy,
    ResourcesPolicy,
    SessionPolicy,
    Tmpfs,
)

T = TypeVar("T")
_GRADES = ("emulated", "separated", "isolated")
_COMMANDS = ("commands.allowed", "commands.denied", "commands.require_confirmation")


def merge(layers: Sequence[Layer]) -> Policy:
    """What holds when all of these do.

    Args:
        layers: the widest (the organisation's) first, the project's last. None at all: the default.

    Raises:
        RefusedError: they allow nothing in common where nothing cannot be said (paths to write).
    """
    return reduce(merge_two, layers).policy if layers else Policy()


def merge_two(outer: Layer, inner: Layer) -> Layer:
    """Two layers as one."""
    ours, theirs = outer.policy, inner.policy
    policy = Policy(
        image=ours.image or theirs.image,
        isolation=_strictest(_GRADES[::-1], ours.isolation, theirs.isolation),
        filesystem=_filesystem(outer, inner),
        network=merge_network(outer, inner),
        commands=_commands(outer, inner),
        kernel=_kernel(outer, inner),
        resources=_resources(ours.resources, theirs.resources),
        session=_session(outer, inner),
        push=PushPolicy(
            **{
                one.name: "refuse"
                if "refuse" in (getattr(ours.push, one.name), getattr(theirs.push, one.name))
                else "warn"
                for one in fields(PushPolicy)
            }
        ),
        returns=narrowed(ours.returns, theirs.returns),
        source=theirs.source,
        outer=tuple(
            dict.fromkeys(one for one in (*ours.outer, ours.source, *theirs.outer) if one and one != theirs.source)
        ),
    )
    return Layer(
        policy,
        outer.said | inner.said,
        files=tuple(dict.fromkeys((*outer.files, *inner.files))),
        signed=outer.signed or inner.signed,
    )


def join(outer: Layer, inner: Layer, key: str, get: Callable[[Policy], T], both: Callable[[T, T], T]) -> T:
    """The value of a key: that of the file that has it; of two that have it, what `both` makes of them."""
    if outer.says(key) and inner.says(key):
        return both(get(outer.policy), get(inner.policy))
    return get((outer if outer.says(key) else inner).policy)


def least(one: T | None, other: T | None) -> T | None:
    """The smaller; None says nothing."""
    known = [value for value in (one, other) if value is not None]
    return min(known, default=None)  # type: ignore[type-var]


def union(one: tuple[T, ...], other: tuple[T, ...]) -> tuple[T, ...]:
    """All of both, each once."""
    return tuple(dict.fromkeys((*one, *other)))


def in_both(one: tuple[T, ...], other: tuple[T, ...]) -> tuple[T, ...]:
    """What both have, in the order of the second."""
    return tuple(value for value in other if value in one)


def _strictest(order: Sequence[str], *values: str | None) -> str | None:
    return min((one for one in values if one is not None), key=order.index, default=None)


def _filesystem(outer: Layer, inner: Layer) -> FilesystemPolicy:
    ours, theirs = outer.policy.filesystem, inner.policy.filesystem
    read_only = ours.read_only or theirs.read_only
    return FilesystemPolicy(
        allowed_paths=join(
            outer, inner, "filesystem.allowed_paths", lambda one: one.filesystem.allowed_paths, _allowed
        ),
        denied_paths=union(ours.denied_paths, theirs.denied_paths),
        read_only=read_only,
        output=_output(outer, inner) if read_only else None,
        tmpfs=_tmpfs(outer, inner),
    )


def _allowed(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[str, ...]:
    found = common(theirs, ours)
    if not found:
        raise RefusedError(
            "the policies allow no path in common",
            details=f"filesystem.allowed_paths: {', '.join(ours)} in one, {', '.join(theirs)} in another",
            resolution="allow paths within those of the wider policy (`vmsandbox policy show` says where each is from)",
        )
    return found


def _output(outer: Layer, inner: Layer) -> str | None:
    """The folder of a read-only project that every layer lets be written."""
    for layer in (inner, outer):
        path = layer.policy.filesystem.output
        if path and may_write(outer, path) and may_write(inner, path):
            return path
    return None


def may_write(layer: Layer, path: str) -> bool:
    """Whether a layer alone lets a path of the project be written, as far as it says."""
    section = layer.policy.filesystem
    if section.read_only:
        return section.output is not None and inside(path, section.output)
    return not section.allowed_paths or inside_any(path, section.allowed_paths)


def _tmpfs(outer: Layer, inner: Layer) -> tuple[Tmpfs, ...]:
    """A tmpfs is a place to write, too: each stays only where the other layer lets be written.

    One below a tmpfs of the other layer stays within its limits: no more room, no programs where there were none.
    """
    ours, theirs = outer.policy.filesystem.tmpfs, inner.policy.filesystem.tmpfs
    found: dict[str, Tmpfs] = {}
    for mounts, other in ((ours, inner), (theirs, outer)):
        for one in mounts:
            around = mount_over(one.path, other.policy.filesystem.tmpfs)
            if around:
                found[one.path] = Tmpfs(one.path, min(one.size, around.size), one.exec and around.exec)
            elif _may_mount(other, one.path):
                found[one.path] = one
    return tuple(found.values())


def _may_mount(layer: Layer, path: str) -> bool:
    section = layer.policy.filesystem
    return not section.allowed_paths or inside_any(path, section.allowed_paths)


def _commands(outer: Layer, inner: Layer) -> CommandsPolicy:
    seconds = join(outer, inner, "commands.confirm_seconds", lambda one: one.commands.confirm_seconds, min)
    chain: list[CommandsPolicy] = []
    for layer in (inner, outer):
        if says_commands(layer):
            section = layer.policy.commands
            for one in (replace(section, confirm_seconds=60, within=()), *section.within):
                if not chain or chain[-1] != one:
                    chain.append(one)
    first, *rest = chain or [CommandsPolicy()]
    return replace(first, confirm_seconds=seconds, within=tuple(rest))


def says_commands(layer: Layer) -> bool:
    """Whether a file says which commands may run."""
    return any(layer.says(key) for key in _COMMANDS)


def _kernel(outer: Layer, inner: Layer) -> KernelPolicy:
    def both(one: bool, other: bool) -> bool:
        return one and other

    return KernelPolicy(
        seccomp=union(outer.policy.kernel.seccomp, inner.policy.kernel.seccomp),
        capabilities=join(outer, inner, "kernel.capabilities", lambda one: one.kernel.capabilities, in_both),
        new_privileges=join(outer, inner, "kernel.new_privileges", lambda one: one.kernel.new_privileges, both),
        user_namespaces=join(outer, inner, "kernel.user_namespaces", lambda one: one.kernel.user_namespaces, both),
    )


def _resources(ours: ResourcesPolicy, theirs: ResourcesPolicy) -> ResourcesPolicy:
    found = {one.name: least(getattr(ours, one.name), getattr(theirs, one.name)) for one in fields(ResourcesPolicy)}
    if found["memory_reserved"] is not None:
        found["memory_reserved"] = least(found["memory_reserved"], found["memory"])
    return ResourcesPolicy(**found)


def _session(outer: Layer, inner: Layer) -> SessionPolicy:
    ours, theirs = outer.policy.session, inner.policy.session
    # One with its files: of the wider file that has it.
    once = next((one for one in (ours, theirs) if one.post_create), ours if ours.post_create_files else theirs)
    return SessionPolicy(
        time=least(ours.time, theirs.time),
        idle=least(ours.idle, theirs.idle),
        environment=join(outer, inner, "session.environment", lambda one: one.session.environment, in_both),
        variables=tuple({**dict(theirs.variables), **dict(ours.variables)}.items()),
        post_create=once.post_create,
        post_create_files=once.post_create_files,
        healthcheck=ours.healthcheck or theirs.healthcheck,
        schedule=ours.schedule or theirs.schedule,
    )
