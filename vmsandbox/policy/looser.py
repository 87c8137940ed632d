"""What of a policy became looser beside its network: paths, commands, kernel, limits, what goes in and comes back.

Without it `policy diff` would call a change harmless that makes `/etc` writable or lets `curl` run. Paths and patterns
are compared as sets: `./src/a` beside `./src` is nothing new. What cannot be compared counts as new.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import fields

from vmsandbox.policy.format.rendering import plain_duration, plain_size
from vmsandbox.policy.places import USUALLY_WRITABLE, covers, inside, inside_any, mount_over
from vmsandbox.policy.tree.globs import is_glob
from vmsandbox.policy.values import (
    CommandsPolicy,
    FilesystemPolicy,
    KernelPolicy,
    Policy,
    PushPolicy,
    ReturnPolicy,
    SessionPolicy,
)

_GRADES = (None, "emulated", "separated", "isolated")
_ACCEPTED = ("none", "safe", "all", None)
_COUNTS = ("vcpus", "processes", "files", "deletions")


def looser_policy(before: Policy, after: Policy) -> tuple[str, ...]:
    """One sentence each, with the key; the network is compared elsewhere (`vmsandbox.egress.diff`)."""
    return (
        *([f"image: {after.image or 'any'}, no longer {before.image}"] * (before.image not in (None, after.image))),
        *_grade(before.isolation, after.isolation),
        *_filesystem(before.filesystem, after.filesystem),
        *_commands(before.commands, after.commands),
        *_kernel(before.kernel, after.kernel),
        *_limits("resources", before.resources, after.resources),
        *_session(before.session, after.session),
        *_push(before.push, after.push),
        *_returns(before.returns, after.returns),
    )


def covers_command(wider: str, narrower: str) -> bool:
    """Whether every command that a pattern means is meant by another one, too. False where that is not sure."""
    if wider == narrower:
        return True
    ours, theirs = shlex.split(wider), shlex.split(narrower)
    if not _covers_program(ours[0], theirs[0]):
        return False
    if len(ours) == 1:
        return True  # a program alone: whatever its arguments
    if ours[-1] == "*":  # any number of words, none included
        return len(theirs) >= len(ours) - 1 and ours[1:-1] == theirs[1 : len(ours) - 1]
    return ours[1:] == theirs[1:]


def _covers_program(wider: str, narrower: str) -> bool:
    if wider in ("*", narrower):
        return True
    return ("/" in wider) == ("/" in narrower) and not set(wider + narrower) & set("?[") and covers(wider, narrower)


def writable(section: FilesystemPolicy) -> tuple[str, ...]:
    """All places that the worker may write: paths, those of a read-only project left out."""
    places = section.allowed_paths or USUALLY_WRITABLE
    if section.read_only:
        places = tuple(one for one in places if not inside(one, "./")) + ((section.output,) if section.output else ())
    return tuple(dict.fromkeys((*places, *(one.path for one in section.tmpfs))))


def may_write(section: FilesystemPolicy, path: str) -> bool:
    """Whether the worker may write a path."""
    if section.read_only and inside(path, "./"):
        return section.output is not None and inside(path, section.output)
    return inside_any(path, writable(section))


def _grade(before: str | None, after: str | None) -> Iterator[str]:
    if _GRADES.index(after) < _GRADES.index(before):
        yield f"isolation: {after or 'any'} is enough, no longer {before}"


def _filesystem(before: FilesystemPolicy, after: FilesystemPolicy) -> Iterator[str]:
    unsaid = bool(before.allowed_paths) and not after.allowed_paths and "/" not in before.allowed_paths
    if unsaid:
        yield "filesystem.allowed_paths: all that the worker owns may be written"
    for path in writable(after):
        if not may_write(before, path) and not (unsaid and path in USUALLY_WRITABLE):
            yield f"filesystem: {path} may be written"
    if before.read_only and not after.read_only and "./" not in writable(after) and may_write(after, "./"):
        yield "filesystem: the project may be written"
    for pattern in before.denied_paths:
        if not _denied_by(pattern, after.denied_paths):
            yield f"filesystem.denied_paths: {pattern} is no longer denied"
    for was in before.tmpfs:
        now = mount_over(was.path, after.tmpfs)
        if now is None and may_write(after, was.path):
            yield f"filesystem.tmpfs: {was.path} is no longer limited"
        elif now and now.size > was.size:
            yield f"filesystem.tmpfs: {was.path} has {plain_size(now.size)}, no longer {plain_size(was.size)}"
        if not was.exec and ((now and now.exec) or (now is None and may_write(after, was.path))):
            yield f"filesystem.tmpfs: programs in {was.path} may run"


def _denied_by(pattern: str, others: Iterable[str]) -> bool:
    """Whether a denied path is still one, by itself or by a folder that is named."""
    plain = posixpath.normpath(pattern)
    for other in others:
        if posixpath.normpath(other) == plain:
            return True
        anchored = other.startswith(("./", "/", "~/")) and pattern[:2] == other[:2]
        if anchored and not is_glob(other) and plain.startswith(posixpath.normpath(other).rstrip("/") + "/"):
            return True
    return False


def _commands(before: CommandsPolicy, after: CommandsPolicy) -> Iterator[str]:
    if before.allowed and not after.allowed:
        yield "commands.allowed: any command that is not denied may run"
    elif before.allowed:
        for pattern in after.allowed:
            if not any(covers_command(one, pattern) for one in before.allowed):
                yield f"commands.allowed: {pattern!a} may run"
        for pattern in after.require_confirmation:
            if not any(covers_command(one, pattern) for one in (*before.allowed, *before.require_confirmation)):
                yield f"commands.require_confirmation: {pattern!a} may run if a person says so"
    for pattern in before.denied:
        if not any(covers_command(one, pattern) for one in after.denied):
            yield f"commands.denied: {pattern!a} is no longer denied"
    for pattern in before.require_confirmation:
        if not any(covers_command(one, pattern) for one in (*after.require_confirmation, *after.denied)):
            yield f"commands.require_confirmation: {pattern!a} is no longer asked about"


def _kernel(before: KernelPolicy, after: KernelPolicy) -> Iterator[str]:
    now = {one.text for one in after.seccomp}
    for profile in before.seccomp:
        if profile.text not in now:
            yield f"kernel.seccomp: {profile.source.name} no longer holds as it was"
    if more := [one for one in after.capabilities if one not in before.capabilities]:
        yield f"kernel.capabilities: {', '.join(more)}"
    for name in ("new_privileges", "user_namespaces"):
        if getattr(after, name) and not getattr(before, name):
            yield f"kernel.{name}: true"


def _session(before: SessionPolicy, after: SessionPolicy) -> Iterator[str]:
    yield from _limits("session", before, after, ("time", "idle"))
    if more := [one for one in after.environment if one not in before.environment]:
        yield f"session.environment: the host's {', '.join(more)} pass into the guest"
    known = dict(before.variables)
    for name, value in after.variables:
        if known.get(name) != value:
            yield f"session.variables: {name} is {value[:80]!a}"
    if after.post_create and after.post_create != before.post_create:
        yield f"session.post_create: {shlex.join(after.post_create)[:200]!a} runs"
    if after.healthcheck and after.healthcheck != before.healthcheck:
        yield f"session.healthcheck: {shlex.join(after.healthcheck.test)[:200]!a} runs"
    if after.schedule and after.schedule != before.schedule:
        yield f"session.schedule: {after.schedule}"


def _push(before: PushPolicy, after: PushPolicy) -> Iterator[str]:
    for one in fields(PushPolicy):
        if (getattr(before, one.name), getattr(after, one.name)) == ("refuse", "warn"):
            yield f"push.{one.name}: a find is a warning, no longer a refusal"


def _returns(before: ReturnPolicy, after: ReturnPolicy) -> Iterator[str]:
    if _ACCEPTED.index(after.accept) > _ACCEPTED.index(before.accept):
        yield f"return.accept: {after.accept or 'as asked for'}, no longer {before.accept}"
    for pattern in before.denied_paths:
        if not _denied_by(pattern, after.denied_paths):
            yield f"return.denied_paths: {pattern} may come back"
    yield from _limits("return", before, after, ("files", "bytes", "deletions"))


def _limits(section: str, before: object, after: object, names: tuple[str, ...] = ()) -> Iterator[str]:
    for name in names or tuple(vars(before)):
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and (new is None or new > old):
            shown = [_shown(section, name, one) for one in (new, old)]
            yield f"{section}.{name}: {shown[0]}, no longer {shown[1]}"


def _shown(section: str, name: str, value: float | None) -> str:
    if value is None:
        return "as it comes"
    if section == "session":
        return str(plain_duration(value))
    return str(value if name in _COUNTS else plain_size(int(value)))
