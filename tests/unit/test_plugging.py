"""What may change in a guest's live XML while its card is plugged in: the card."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vmsandbox.errors import RefusedError
from vmsandbox.hypervisor.plugging import check_plugged_in
from vmsandbox.render.network import CardPlan, render_interface

PLAN = CardPlan("20261123-000000-a-000000", Path("/home"), "192.0.2.1", "192.0.2.2")
CHANNEL = '<channel type="unix"><target type="virtio" name="ssh.0" state="{}"/></channel>'
CARD = render_interface(PLAN)


def domain(*devices: str, memory: int = 512, more: str = "") -> str:
    return f"<domain><currentMemory>{memory}</currentMemory>{more}<devices>{''.join(devices)}</devices></domain>"


def test_the_card_and_what_changes_by_itself_may_change() -> None:
    before = domain(CHANNEL.format("connected"))
    check_plugged_in(before, domain(CHANNEL.format("disconnected"), CARD, memory=400), PLAN)
    named = ET.fromstring(CARD)
    ET.SubElement(named, "alias", {"name": "net0"})
    after = domain(CHANNEL.format("connected"), ET.tostring(named, "unicode"))
    check_plugged_in(domain(CHANNEL.format("connected"), CARD), after, PLAN)


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (domain(), "number of network cards: 0"),
        (domain(CARD, CARD), "number of network cards: 2"),
        (domain(CARD.replace("192.0.2.2", "192.0.2.9")), "network card"),
        (domain(CARD, "<hostdev/>"), "more than its network card"),
        (domain(CARD, more="<os/>"), "more than its network card"),
    ],
)
def test_anything_else_may_not(after: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        check_plugged_in(domain(), after, PLAN)
