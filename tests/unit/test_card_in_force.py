"""What is read back from the kernel: every way in which a card's guards can be gone or changed is noticed.

data/card_ruleset.json is what `nft -j list ruleset` said on Debian 12 with libvirt 9.0 while a guest had its card.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_livexml import EXPECTED, LIVE, refusal
from test_render_network import PLAN

from vmsandbox.hypervisor.inforce import InForce, problems, read_in_force, read_links, ruleset_of
from vmsandbox.hypervisor.livexml import check_live_xml
from vmsandbox.process import Finished, Programs

DATA = Path(__file__).parent / "data"
LISTED: list[dict[str, Any]] = json.loads((DATA / "card_ruleset.json").read_text())["nftables"]
LINKS = {
    "ports of the bridge": PLAN.tap,
    "bridge of the tap": PLAN.bridge,
    "isolated": "1",
    "spanning tree": "0",
    "address of the bridge": PLAN.bridge_mac,
    "IPv6 off": "1",
}
CARD = (DATA / "live_card.xml").read_text()


def wrong(listed: list[dict[str, Any]], links: dict[str, str] | None = None) -> list[str]:
    return problems(InForce(ruleset_of(PLAN, listed), links or LINKS), PLAN)


def in_chain(entry: dict[str, Any], chain: str, family: str) -> bool:
    rule = entry.get("rule", {})
    return bool(rule.get("chain") == chain and rule.get("family") == family)


def test_what_the_kernel_said_is_what_was_asked_for() -> None:
    assert wrong(LISTED) == []


def test_a_newer_nft_says_the_same_in_other_words() -> None:
    """nft 1.1.3 (Debian 13) about our rules, loaded by the same."""
    newer = json.loads((DATA / "card_rules_nft_1_1.json").read_text())["nftables"]
    assert json.dumps(newer) != json.dumps([entry for entry in LISTED if PLAN.table in json.dumps(entry)])
    libvirts = [entry for entry in LISTED if PLAN.table not in json.dumps(entry)]
    assert wrong([*newer, *libvirts]) == []


def test_counters_and_other_rules_do_not_matter() -> None:
    listed = copy.deepcopy(LISTED)
    for entry in listed:
        for part in entry.get("rule", {}).get("expr", []):
            if part.get("counter"):
                part["counter"]["packets"] = 99
    other = json.loads(json.dumps(LISTED).replace(PLAN.tap, "vmtother00000").replace(PLAN.table, "other"))
    assert wrong([*other, *listed]) == []
    assert ruleset_of(PLAN, [*other, *listed])["bridge nat"] == ruleset_of(PLAN, LISTED)["bridge nat"]


OURS = [
    index for index, entry in enumerate(LISTED) for value in entry.values()
    if PLAN.table in (value.get("table"), value.get("name"))
]  # fmt: skip


@pytest.mark.parametrize("index", OURS)
def test_each_rule_and_chain_of_ours_is_missed(index: int) -> None:
    if "table" not in LISTED[index]:  # a table without its chains is not listed by name
        assert wrong(LISTED[:index] + LISTED[index + 1 :]) != []


@pytest.mark.parametrize("index", OURS)
def test_a_rule_that_another_tool_adds_is_noticed(index: int) -> None:
    added = copy.deepcopy(LISTED[index])
    if "rule" in added:
        added["rule"]["expr"] = [{"accept": None}]
        assert wrong([*LISTED[:index], added, *LISTED[index:]]) != []


def test_our_rules_in_another_order_are_noticed() -> None:
    rules = [index for index, entry in enumerate(LISTED) if in_chain(entry, "incoming", "inet")]
    for first, second in pairwise(rules):
        listed = copy.deepcopy(LISTED)
        listed[first], listed[second] = listed[second], listed[first]
        assert wrong(listed) != []


def test_a_chain_that_hangs_elsewhere_is_noticed() -> None:
    for key, value in (("prio", 400), ("hook", "output"), ("policy", "drop")):
        listed = copy.deepcopy(LISTED)
        base = next(entry["chain"] for entry in listed if entry.get("chain", {}).get("name") == "from_guest")
        base[key] = value
        assert wrong(listed) != [], key


def test_an_empty_ruleset_and_a_gone_table() -> None:
    assert len(wrong([])) == 4
    without = [entry for entry in LISTED for value in entry.values() if value.get("family") != "bridge"]
    assert any(f"bridge {PLAN.table} is not there" in problem for problem in wrong(without))
    assert any("libvirt's filter is not in force" in problem for problem in wrong(without))


def _libvirts(change: Callable[[list[Any]], None], chain: str = f"libvirt-I-{PLAN.tap}") -> list[str]:
    """The problems after a change of libvirt's chain, as the list of its expressions."""
    expressions = [entry["rule"]["expr"] for entry in LISTED if in_chain(entry, chain, "bridge")]
    assert expressions
    fresh = copy.deepcopy(expressions)
    change(fresh)
    rest = [entry for entry in LISTED if not in_chain(entry, chain, "bridge")]
    place = {"family": "bridge", "table": "nat", "chain": chain}
    return wrong([*rest, *({"rule": {**place, "expr": expression}} for expression in fresh)])


def test_every_weakening_of_libvirts_filter_is_noticed() -> None:
    assert _libvirts(lambda rules: None) == []
    to_guest = f"libvirt-O-{PLAN.tap}"
    assert _libvirts(lambda rules: None, to_guest) == []
    counter, drop, accept = {"counter": {"packets": 0, "bytes": 0}}, {"drop": None}, {"accept": None}
    for chain in (f"libvirt-I-{PLAN.tap}", to_guest):
        assert _libvirts(lambda rules: rules.clear(), chain) != []
        assert _libvirts(lambda rules: rules.remove([counter, drop]), chain) != []
        assert _libvirts(lambda rules: rules.insert(1, [counter, accept]), chain) != []
        assert _libvirts(lambda rules: rules.insert(1, [counter, {"return": None}]), chain) != []
        assert _libvirts(lambda rules: rules.insert(1, [counter, {"jump": {"target": "x"}}]), chain) != []
        assert _libvirts(lambda rules: rules.insert(1, rules[1]), chain) != []
    assert _libvirts(lambda rules: rules.pop(0)) != [], "the guest's own address"
    for hook in ("PREROUTING", "POSTROUTING"):
        assert _libvirts(lambda rules: rules.clear(), hook) != []
        assert _libvirts(lambda rules: rules.insert(0, rules[0]), hook) != []
        assert _libvirts(lambda rules: rules[0].__setitem__(-1, accept), hook) != []


@pytest.mark.parametrize("name", LINKS)
def test_a_bridge_or_tap_that_was_changed(name: str) -> None:
    for value in ("unknown", "", f"{LINKS[name]} eth0", "0" if name in ("isolated", "IPv6 off") else "2"):
        if name != "IPv6 off" or value == "0":  # unknown: a kernel without IPv6
            assert wrong(LISTED, LINKS | {name: value}) != [], value


def test_links_are_read_from_sys(tmp_path: Path) -> None:
    files = {
        f"sys/class/net/{PLAN.tap}/brport/isolated": "1\n",
        f"sys/class/net/{PLAN.bridge}/bridge/stp_state": "0\n",
        f"sys/class/net/{PLAN.bridge}/address": f"{PLAN.bridge_mac}\n",
        f"sys/class/net/{PLAN.bridge}/brif/{PLAN.tap}/x": "",
        f"proc/sys/net/ipv6/conf/{PLAN.bridge}/disable_ipv6": "1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / f"sys/class/net/{PLAN.tap}/master").symlink_to(f"../{PLAN.bridge}")
    assert read_links(PLAN, tmp_path) == LINKS
    assert "unknown" in read_links(PLAN, tmp_path / "nowhere").values()


def test_the_kernel_is_asked_with_nft(tmp_path: Path) -> None:
    class Told(Programs):
        def run(self, argv: Any, **options: Any) -> Finished:
            assert argv == ["nft", "-j", "list", "ruleset"]
            return Finished(tuple(argv), 0, json.dumps({"nftables": LISTED}).encode(), b"")

    seen = read_in_force(PLAN, Told(), tmp_path)
    assert problems(InForce(seen.tables, LINKS), PLAN) == []
    assert len(problems(seen, PLAN)) == 5, "no bridge and no tap there"


def with_card(card: str = CARD) -> str:
    tree = ET.fromstring(LIVE)
    tree.find("devices").append(ET.fromstring(card))  # type: ignore[union-attr]
    return ET.tostring(tree, encoding="unicode")


def test_the_live_xml_may_have_this_card_and_no_other() -> None:
    expected = dataclasses.replace(EXPECTED, card=PLAN)
    check_live_xml(with_card(), expected)
    assert "number of network cards: 0" in refusal(LIVE, expected).brief
    assert "foreign device: <interface" in refusal(with_card()).brief, "without a card there is none"
    tree = ET.fromstring(with_card())
    tree.find("devices").append(ET.fromstring(CARD))  # type: ignore[union-attr]
    assert "number of network cards: 2" in refusal(ET.tostring(tree, encoding="unicode"), expected).brief


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PLAN.mac, "52:54:00:00:00:01"),
        (PLAN.bridge, "br0"),
        (f'dev="{PLAN.tap}"', 'dev="vnet0"'),
        ('isolated="yes"', 'isolated="no"'),
        (f'filter="{PLAN.name}"', 'filter="clean-traffic"'),
        ('value="10.213.7.2"', 'value="0.0.0.0"'),
        ('<driver name="qemu" />', '<driver name="vhost" />'),
        ('type="bridge"', 'type="user"'),
        ("<driver", "<backend vhost='/dev/vhost-net'/><driver"),
        ('<rom enabled="no" />', '<rom file="/tmp/rom" />'),
        ("<driver", "<bandwidth><inbound average='1'/></bandwidth><driver"),
        ('<port isolated="yes" />', ""),
        ('name="net0"', 'name="net1"'),
    ],
)
def test_a_card_that_is_not_as_asked_for_is_refused(old: str, new: str) -> None:
    assert old in CARD
    error = refusal(with_card(CARD.replace(old, new)), dataclasses.replace(EXPECTED, card=PLAN))
    assert "network card" in error.brief
