"""What becomes of keys about the guest: one function each, the same for compose, docker's options and devcontainers.

Without them side by side, `--cap-add` and `cap_add` would mean two things. Each takes (draft, place, value).
"""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from vmsandbox.policy.format.rendering import plain_size
from vmsandbox.policy.format.words import capability
from vmsandbox.policy.importing.draft import Draft
from vmsandbox.policy.importing.mounts import take_mount, take_tmpfs, take_volume
from vmsandbox.policy.importing.shapes import NotUnderstoodError, a_flag, a_list, a_mapping, a_number, a_size, a_text
from vmsandbox.policy.importing.texts import depends, options, shown, size

Taker = Callable[[Draft, str, Any], None]


def security_opt(draft: Draft, at: str, value: Any) -> None:
    for place, one in draft.each(at, value):
        name, rest = _split(one)
        if name == "no-new-privileges":
            draft.set(place, "kernel.new_privileges", not a_flag(rest))
        elif name == "seccomp" and rest in ("unconfined", "builtin", ""):
            draft.leave(place, "no profile of docker's is in force unless a file names one")
        elif name == "seccomp":
            draft.add(place, "kernel.seccomp", _beside(draft, rest))
        elif name in ("apparmor", "label"):
            draft.leave(place, f"the guest has no {name} policies: the virtual machine is the boundary")
        else:
            draft.leave(place, "there is no key for this: the guest's own kernel is used by nobody else")


def cap_drop(draft: Draft, at: str, value: Any) -> None:
    for place, one in draft.each(at, value):
        if one.upper() == "ALL":
            draft.always(place, "no capability is kept but what kernel.capabilities names")
            continue
        try:
            name = capability(one)
        except ValueError as error:
            raise NotUnderstoodError(str(error)) from None
        draft.dropped.add(name)
        draft.always(place, "no capability is kept but what kernel.capabilities names")


def cap_add(draft: Draft, at: str, value: Any) -> None:
    for place, one in draft.each(at, value):
        if one.upper() == "ALL":
            draft.leave(place, "name the capabilities that are needed in kernel.capabilities")
            continue
        try:
            draft.add(place, "kernel.capabilities", capability(one))
        except ValueError as error:
            raise NotUnderstoodError(str(error)) from None


def privileged(draft: Draft, at: str, value: Any) -> None:
    if a_flag(value):
        draft.leave(at, "the worker is never root in the guest, and the guest reaches no device of the host")
    else:
        draft.always(at)


def read_only(draft: Draft, at: str, value: Any) -> None:
    if a_flag(value):
        draft.read_only = at
    else:
        draft.leave(at, "the guest's system is the worker's to read alone in every session")


def tmpfs(draft: Draft, at: str, value: Any) -> None:
    for place, one in draft.each(at, value):
        path, _, settings = one.partition(":")
        take_tmpfs(draft, place, path, options(settings))


def shm_size(draft: Draft, at: str, value: Any) -> None:
    take_tmpfs(draft, at, "/dev/shm", {"size": str(a_size(value))})  # noqa: S108 - a path of the guest


def volumes(draft: Draft, at: str, value: Any) -> None:
    for position, one in enumerate(a_list(value)):
        place = f"{at}[{position}]"
        if isinstance(one, dict):
            mount(draft, place, one)
        else:
            for _, text in draft.each(place, one):
                take_volume(draft, place, text)


def mount(draft: Draft, at: str, value: Any) -> None:
    """The long form of compose, and docker's `--mount`."""
    kind, source = value.get("type", "volume"), str(value.get("source", value.get("src", "")))
    target = next((str(value[key]) for key in ("target", "dst", "destination") if key in value), "")
    if depends(source) or depends(target):
        draft.leave(at, f"depends on a variable of the host: {shown(source)}:{shown(target)}")
    elif kind == "tmpfs":
        inner = value.get("tmpfs") or {"size": value.get("tmpfs-size"), "mode": value.get("tmpfs-mode")}
        settings = a_mapping(inner)
        take_tmpfs(draft, at, target, {name: str(one) for name, one in settings.items() if one is not None})
    elif kind == "bind":
        given = next((value[key] for key in ("read_only", "readonly", "ro") if key in value), False)
        take_mount(draft, at, source, target, a_flag(given))
    else:
        draft.leave(at, f"a mount of the kind {shown(kind)}: nothing outlives a session")


def working_dir(draft: Draft, at: str, value: Any) -> None:
    draft.working_dir = posixpath.normpath(a_text(value))
    draft.leave(at, "the project lies in ~/projects of the worker; it tells which mount is the project")


def networks(draft: Draft, at: str, value: Any) -> None:
    names = list(value) if isinstance(value, list | dict) else []
    internal = {name: a_flag((draft.networks.get(name) or {}).get("internal", False)) for name in map(str, names)}
    if internal and all(internal.values()):
        draft.set(at, "network.mode", "none", "networks that are internal alone")
        return
    outside = ", ".join(shown(name) for name, closed in internal.items() if not closed) or "default"
    draft.leave(at, f"{outside} reaches any host: say `network: {{mode: restricted, allowed_hosts: [...]}}`")


def network_mode(draft: Draft, at: str, value: Any) -> None:
    if a_text(value) == "none":
        draft.set(at, "network.mode", "none")
    else:
        draft.leave(at, f"{shown(value)}: a guest shares no network with the host or another guest")


def dns(draft: Draft, at: str, value: Any) -> None:
    for place, one in draft.each(at, value):
        try:
            ip_address(one)
        except ValueError:
            raise NotUnderstoodError(f"not an address: {shown(one)}") from None
        draft.add(place, "network.resolver", one)


def cpus(draft: Draft, at: str, value: Any) -> None:
    found = a_number(value)
    whole = math.ceil(found)
    draft.set(at, "resources.vcpus", whole, "" if whole == found else "whole processors, rounded up")


def memory(draft: Draft, at: str, value: Any) -> None:
    _limit(draft, at, "resources.memory", a_size(value), "of the whole guest, its kernel included")


def memory_reserved(draft: Draft, at: str, value: Any) -> None:
    _limit(draft, at, "resources.memory_reserved", a_size(value))


def disk(draft: Draft, at: str, value: Any) -> None:
    _limit(draft, at, "resources.disk", a_size(value))


def storage_opt(draft: Draft, at: str, value: Any) -> None:
    for name, one in a_mapping(value).items():
        if name == "size":
            disk(draft, f"{at}.size", one)
        else:
            draft.leave(f"{at}.{shown(name)}", "an option of docker's storage")


def write_rates(draft: Draft, at: str, value: Any) -> None:
    for position, one in enumerate(value if isinstance(value, list) else [value]):
        _limit(
            draft,
            f"{at}[{position}]",
            "resources.write_rate",
            a_size(a_mapping(one).get("rate")),
            "of the guest's disk",
        )


def processes(draft: Draft, at: str, value: Any) -> None:
    if value in (0, -1, "0", "-1"):
        draft.leave(at, "no limit is asked for")
    else:
        draft.set(at, "resources.processes", int(a_number(value)), "the worker's, threads included")


def ulimits(draft: Draft, at: str, value: Any) -> None:
    for name, one in a_mapping(value).items():
        place = f"{at}.{shown(name)}"
        least = min(one.values(), default=None) if isinstance(one, dict) else one
        if name == "nproc":
            processes(draft, place, least)
        else:
            draft.leave(place, "there is no key for it: memory, processes, disk and output of the guest have limits")


def _limit(draft: Draft, at: str, to: str, found: int, how: str = "") -> None:
    section, _, key = to.partition(".")
    before = size(draft.sandbox.get(section, {}).get(key))
    if before is not None:
        found = min(found, before)
        draft.sandbox[section].pop(key)
    draft.set(at, to, plain_size(found), how)


def _beside(draft: Draft, name: str) -> str:
    """A file that is named relative to the imported one, as the policy has to name it."""
    path = Path(os.path.normpath(draft.source.absolute().parent / name))
    where = os.path.relpath(path, draft.folder.absolute())
    return where if where.startswith("../") else f"./{where}"


def _split(text: str) -> tuple[str, str]:
    """`name:rest` or `name=rest`."""
    at = min((text.index(one) for one in ":=" if one in text), default=len(text))
    return text[:at], text[at + 1 :]
