"""Gives a fork its own identity before anything else of it is used.

Everything is made on the host: SSH host key and user key, machine id, boot id, hostname, clock, and a seed for the
kernel's random pool. The guest only stores it; a guest that lies harms nobody but itself.
"""

from __future__ import annotations

import base64
import os
import secrets
import time
import uuid as uuids
from typing import Any

from vmsandbox.errors import GuestError
from vmsandbox.guest.control import ControlPort
from vmsandbox.session.state.info import SessionKeys

SEED_BYTES = 64  # twice what the kernel's generator holds


def go_on_as(control: ControlPort, deadline: float) -> str:
    """A guest that comes from a snapshot of its own session: fresh random state and clock; its (untrusted) machine id.

    Its keys, and what is written on the host of them, stay.

    Raises:
        GuestError: it did not answer in `deadline` seconds, or could not do it.
    """
    try:
        untrusted = control.request("again", deadline=deadline, **_of_this_moment())
    finally:
        control.close()
    return str(untrusted.get("machine_id"))[:64]


def _of_this_moment() -> dict[str, Any]:
    return {"seed": base64.b64encode(os.urandom(SEED_BYTES)).decode(), "clock_ns": time.time_ns()}


def give_identity(
    control: ControlPort,
    hostname: str,
    deadline: float,
    network: dict[str, Any] | None = None,
    disk_free: int | None = None,
) -> tuple[SessionKeys, str]:
    """Personalise a fork; returns its keys and its machine id. Closes the control port's connection.

    Args:
        network: settings beyond that (`session.network.guest_settings`).
        disk_free: bytes that its file system is to have free; None: all there are.

    Raises:
        GuestError: the guest did not answer in `deadline` seconds, or could not do it.
    """
    from vmsandbox.guest.keys import new_key_pair

    host_key, user_key = new_key_pair(), new_key_pair()
    machine_id = secrets.token_hex(16)
    try:
        untrusted = control.request(
            "identity",
            deadline=deadline,
            **_of_this_moment(),
            hostname=hostname,
            machine_id=machine_id,
            boot_id=str(uuids.uuid4()),
            host_key=host_key.private,
            user_key=user_key.public,
            **({"network": network} if network else {}),
            **({"disk_free": disk_free} if disk_free is not None else {}),
        )
    finally:
        control.close()
    if untrusted.get("machine_id") != machine_id:
        raise GuestError("the guest did not take its identity", details=repr(untrusted)[:500])
    return SessionKeys(host_key.public, user_key.private), machine_id
