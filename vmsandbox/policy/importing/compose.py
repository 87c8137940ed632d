"""Reads a compose file: one of its services becomes a policy.

Without the strict reader an alias in it could expand without bound, and of two equal keys the last would count.
Format: the Compose Specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmsandbox.errors import UserInputError
from vmsandbox.policy.format.strictyaml import StrictYaml
from vmsandbox.policy.importing.draft import Draft
from vmsandbox.policy.importing.mounts import settle_mounts
from vmsandbox.policy.importing.shapes import NotUnderstoodError
from vmsandbox.policy.importing.table import FILE, NETWORK, SERVICE, Key
from vmsandbox.policy.importing.texts import depends, shown

_EXAMPLE = "services: {app: {read_only: true}}"
# Their texts may have variables: each of them is looked at by itself.
_LOOKED_INTO = ("environment", "volumes", "tmpfs", "security_opt", "cap_add", "cap_drop", "dns", "healthcheck")


def read_compose(draft: Draft, content: bytes, service: str | None) -> None:
    """Fill a draft from a compose file.

    Args:
        service: which of the services; None: the only one.

    Raises:
        UserInputError: it is no compose file, or has several services and none is named.
    """
    from pydantic import RootModel

    reader = StrictYaml(f"the compose file {draft.source}", _EXAMPLE)
    data = reader.read(content, RootModel[dict[str, Any]]).root
    services = data.get("services")
    if not isinstance(services, dict) or not services:
        raise reader.invalid(["line 1: services: there is none"])
    name = _chosen(draft, services, service)
    body = services[name]
    if not isinstance(body, dict):
        raise reader.invalid([reader.at(("services", name), "not a mapping")])
    for key in data:
        if key not in ("services", "networks"):
            _leave_unmapped(draft, str(key), FILE)
    for other in services:
        if other != name:
            draft.leave(f"services.{shown(other)}", f"another service: --service {shown(other)}")
    top = data.get("networks") or {}
    draft.networks = top if isinstance(top, dict) else {}
    used = body.get("networks") or ()
    take_service(draft, body, f"services.{shown(name)}")
    _networks(draft, used if isinstance(used, list | dict) else ())


def take_service(draft: Draft, body: Mapping[Any, Any], at: str) -> None:
    """All keys of a service, and what they come to together."""
    _walk(draft, body, "", at)
    settle(draft)


def settle(draft: Draft) -> None:
    """What several keys come to together: a capability that is dropped and added is dropped."""
    kernel = draft.sandbox.get("kernel", {})
    for one in [name for name in kernel.get("capabilities", ()) if name in draft.dropped]:
        kernel["capabilities"].remove(one)
        draft.leave(f"cap_add {one}", "is dropped as well")
    settle_mounts(draft)
    draft.sandbox = {name: section for name, section in draft.sandbox.items() if section}


def take_key(draft: Draft, key: str, at: str, value: Any) -> None:
    """One key of a service by the table."""
    known = SERVICE[key]
    if known.take is None:
        draft.leave(at, known.text)
    elif key not in _LOOKED_INTO and isinstance(value, str) and depends(value):
        draft.leave(at, f"depends on a variable of the host: {shown(value)}")
    else:
        try:
            known.take(draft, at, value)
        except NotUnderstoodError as error:
            draft.problems.append(f"{at}: {error}")


def _walk(draft: Draft, body: Mapping[Any, Any], prefix: str, at: str) -> None:
    for key, value in body.items():
        name, place = f"{prefix}{key}", f"{at}.{shown(key)}"
        if name in SERVICE:
            take_key(draft, name, place, value)
        elif isinstance(value, dict) and any(one.startswith(f"{name}.") for one in SERVICE):
            _walk(draft, value, f"{name}.", place)
        else:
            _leave_unmapped(draft, place, {})


def _leave_unmapped(draft: Draft, at: str, known: Mapping[str, Key]) -> None:
    name = at.rpartition(".")[2]
    if name in known:
        draft.leave(at, known[name].text)
    elif name.startswith("x-"):
        draft.leave(at, "an extension: it has no meaning of its own")
    else:
        draft.leave(at, "unknown key")


def _networks(draft: Draft, used: Any) -> None:
    closed = draft.sandbox.get("network", {}).get("mode") == "none"
    for name, body in draft.networks.items():
        at = f"networks.{shown(name)}"
        if name not in used:
            draft.leave(at, "the service is not on it")
            continue
        for key in body or ():
            if key == "internal" and closed:
                draft.note(f"{at}.internal", "network.mode")
            elif key == "internal":
                draft.leave(f"{at}.internal", "another network of the service is not internal, or this one is not")
            else:
                _leave_unmapped(draft, f"{at}.{shown(key)}", NETWORK)
    details = used.items() if isinstance(used, dict) else ()
    for name, body in details:
        for key in body or ():
            draft.leave(f"networks.{shown(name)} ({shown(key)})", "a guest is on no network of docker's")


def _chosen(draft: Draft, services: Mapping[Any, Any], wanted: str | None) -> Any:
    if wanted is None and len(services) == 1:
        return next(iter(services))
    if wanted in services:
        return wanted
    names = ", ".join(shown(one) for one in services)
    raise UserInputError(
        f"{draft.source} has no service {shown(wanted)}" if wanted else f"{draft.source} has several services",
        details=f"services: {names}",
        resolution="name the one that is to be imported: --service NAME",
    )
