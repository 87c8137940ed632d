"""Plugs a card into a running guest, and takes it out again.

Taking it out needs the guest, which has to let go. A guest that does not keeps its card, and its rules with it.
"""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from pathlib import Path

from vmsandbox.errors import GuestError, RefusedError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.livexml import card_differences
from vmsandbox.render.network import CardPlan, render_interface

_TUN = Path("/dev/net/tun")
_LOOK = 0.01  # seconds between two looks at the tap


def plug_in(host: Host, uuid: str, plan: CardPlan) -> None:
    """Give a running guest its card; libvirt puts its filter on the tap first. Raises HostError."""
    host.attach(uuid, render_interface(plan))


def unplug(host: Host, uuid: str, plan: CardPlan, deadline: float) -> None:
    """Take a running guest's card away; its tap is gone then.

    Raises:
        GuestError: the guest did not let it go in `deadline` seconds.
        HostError: libvirt or QEMU refused.
    """
    until = time.monotonic() + deadline
    host.detach(uuid, render_interface(plan))
    while Path("/sys/class/net", plan.tap).exists():
        if time.monotonic() > until:
            raise GuestError(
                "the guest does not let go of its network card",
                details=f"asked {deadline:g} seconds ago; it goes on, with the card or without",
                resolution="look at what its kernel says: `vmsandbox logs NAME`",
            )
        time.sleep(_LOOK)


def holds_tap(pid: int) -> bool:
    """Whether a QEMU process can send or take frames: it has a tap open, whatever name that has by now.

    libvirt hands the tap over when bridge, rules and filter are in place, and takes them away when it was closed.
    Raises OSError if the process is gone or another user's.
    """
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if descriptor.readlink() == _TUN:
                return True
        except FileNotFoundError:
            continue  # closed meanwhile
    return False


def check_plugged_in(before: str, after: str, plan: CardPlan) -> None:
    """Refuse a guest that got anything else than this card since its live XML was `before`.

    Raises:
        RefusedError: it says what.
    """
    tree = ET.fromstring(after)  # noqa: S314 - written by libvirt on this host
    devices = tree.find("devices")
    interfaces = [] if devices is None else devices.findall("interface")
    differences = list(card_differences(interfaces, plan))
    if _plain(tree) != _plain(ET.fromstring(before)):  # noqa: S314
        differences.append("more than its network card has changed")
    if differences:
        raise RefusedError(
            f"the running guest is not what was asked for: {differences[0]}",
            details="\n".join(differences),
            resolution="look for another tool that changes guests; the guest must not be used",
        )


def _plain(domain: ET.Element) -> str:
    """All but the cards, and what changes by itself: which ports the guest has open, where its balloon is."""
    for target in domain.iterfind("devices/channel/target"):
        target.attrib.pop("state", None)
    for place, tag in (("devices", "interface"), (".", "currentMemory")):
        for parent in domain.findall(place):
            for element in parent.findall(tag):
                parent.remove(element)
    return ET.canonicalize(ET.tostring(domain, encoding="unicode"), strip_text=True, rewrite_prefixes=True)
