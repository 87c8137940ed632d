"""A filtered card is never part of a snapshot: the guest's is taken out before, and the guest that comes gets one.

Its address and its tap belong to one bridge of this host, and its state to one device of QEMU's. A connection that is
open meanwhile goes on: the card comes back with the address that it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from vmsandbox.errors import RefusedError, VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.plugging import check_plugged_in, holds_tap, plug_in, unplug
from vmsandbox.process import Programs
from vmsandbox.session.filtered import Card, read_plan, reopen_card
from vmsandbox.session.folder import SessionFolder
from vmsandbox.session.freezing import BY_NETWORK, freeze_guest
from vmsandbox.session.info import SessionInfo
from vmsandbox.session.networking import CARD_DEADLINE
from vmsandbox.spec import NetworkMode

_UNPLUG_SECONDS = 10.0


@contextmanager
def without_card(host: Host, folder: SessionFolder, info: SessionInfo) -> Iterator[None]:
    """The guest has no card meanwhile. One of another network mode never has.

    Raises:
        GuestError: it does not let its card go, or did not set it up again.
        HostError, RefusedError: it cannot be given back its card, or not guarded as it was.
    """
    if info.network != NetworkMode.FILTERED.value:
        yield
        return
    try:
        if _has_card(folder, info):
            unplug(host, info.uuid, read_plan(folder), _UNPLUG_SECONDS)
        failpoint("card.unplugged")
        yield
    finally:
        plug_again(folder, info)


def plug_again(folder: SessionFolder, info: SessionInfo, *, instead_of: SessionInfo | None = None) -> bool:
    """Give a guest its session's card, if it should have one and has not, and let it set it up (again).

    Returns whether it was plugged in.

    Args:
        instead_of: the guest that had it, whose process has ended.

    Raises:
        HostError, GuestError: it cannot be plugged in or set up.
        RefusedError: it is not guarded as it should be. The guest is frozen then.
    """
    has_card = _has_card(folder, info) if info.network == NetworkMode.FILTERED.value else None
    if has_card is None:
        return False
    card = reopen_card(folder, info, Programs())
    if not has_card:
        _plug_in(folder, info, card, instead_of)
    with closing(ControlPort(folder.sockets(info) / "control")) as control:
        control.request("card", deadline=CARD_DEADLINE, **card.settings())
    return not has_card


def _plug_in(folder: SessionFolder, info: SessionInfo, card: Card, instead_of: SessionInfo | None) -> None:
    try:
        with closing(Host.open()) as host:
            if instead_of is not None:
                # libvirt takes the filter off the tap when it notices a guest's end. That must not be ours, later.
                host.destroy(instead_of.uuid)
            before = host.live_xml(info.uuid)
            plug_in(host, info.uuid, card.plan)
            check_plugged_in(before, host.live_xml(info.uuid), card.plan)
        card.verify()
    except RefusedError as error:
        with suppress(VmsandboxError):  # the watch does it as well, and again
            freeze_guest(folder, info, by=BY_NETWORK, reason=error.brief)
        raise
    failpoint("card.plugged")


def _has_card(folder: SessionFolder, info: SessionInfo) -> bool | None:
    """None: the guest is gone."""
    try:
        return holds_tap(folder.qemu_pid(info))
    except (OSError, ValueError):
        return None
