"""A filtered card is never part of a snapshot: the guest's is taken out before, and the guest that comes gets one.

Its address and its tap belong to one bridge of this host, and its state to one device of QEMU's. A connection that is
open meanwhile goes on: the card comes back with the address that it had.

    live/<name>/card.out      the card is out, or about to be: until it is back, and guarded, somebody has to see to it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from vmsandbox.errors import VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.plugging import check_plugged_in, holds_tap, plug_in, unplug
from vmsandbox.process import Programs
from vmsandbox.session.network.filtered import Card, read_plan, reopen_card
from vmsandbox.session.network.networking import CARD_DEADLINE
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.freezing import BY_NETWORK, freeze_guest, is_frozen
from vmsandbox.spec import NetworkMode

MARK = "card.out"
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
    card_will_be_out(folder, info)
    try:
        if _has_card(folder, info):
            unplug(host, info.uuid, read_plan(folder), _UNPLUG_SECONDS)
        failpoint("card.unplugged")
        yield
    finally:
        give_card_back(folder, info)


def card_will_be_out(folder: SessionFolder, info: SessionInfo) -> None:
    """Write it down. Raises OSError."""
    if info.network == NetworkMode.FILTERED.value:
        (folder.path / MARK).touch()


def free_tap(info: SessionInfo) -> None:
    """Wait until libvirt has noticed the end of a guest, whose process is gone. Raises HostError.

    It takes its filter off the tap then. That must not be the next guest's, later.
    """
    if info.network == NetworkMode.FILTERED.value:
        with closing(Host.open()) as host:
            host.destroy(info.uuid)


def give_card_back(folder: SessionFolder, info: SessionInfo) -> bool:
    """Plug a card that is out in again, and let the guest set it up; whether one was. Not for a frozen guest.

    Raises:
        HostError: it cannot be plugged in; it is still out, and written down as such.
        RefusedError: it is not guarded as it should be: it is out, or the guest is frozen.
        GuestError: the guest did not set it up. That is its own affair: it has it.
    """
    mark = folder.path / MARK
    has_card = _has_card(folder, info) if mark.exists() and not is_frozen(folder) else None
    if has_card is None:
        return False
    card = reopen_card(folder, info, Programs())
    failpoint("card.returning")
    if not has_card:
        card.verify_without_tap()
    try:
        if not has_card:
            _plug_in(info, card)
        card.verify()
    except VmsandboxError as error:
        if _has_card(folder, info):  # nobody knows what it can reach
            with suppress(VmsandboxError):
                freeze_guest(folder, info, by=BY_NETWORK, reason=error.brief)
        error.resolution = error.resolution or "`vmsandbox gc` tries to give the card back again"
        raise
    failpoint("card.plugged")
    mark.unlink(missing_ok=True)
    with closing(ControlPort(folder.sockets(info) / "control")) as control:
        control.request("card", deadline=CARD_DEADLINE, **card.settings())
    return not has_card


def _plug_in(info: SessionInfo, card: Card) -> None:
    with closing(Host.open()) as host:
        before = host.live_xml(info.uuid)
        plug_in(host, info.uuid, card.plan)
        check_plugged_in(before, host.live_xml(info.uuid), card.plan)


def _has_card(folder: SessionFolder, info: SessionInfo) -> bool | None:
    """None: the guest is gone."""
    try:
        return holds_tap(folder.qemu_pid(info))
    except (OSError, ValueError):
        return None
