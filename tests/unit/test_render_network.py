"""The filtered card as it is rendered: golden files, and what must hold whatever they say."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_render import FORK, VARIANTS

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.inforce import InForce, problems, ruleset_of
from vmsandbox.hypervisor.network import choose_addresses
from vmsandbox.render.card_rules import render_rules
from vmsandbox.render.domain import CARD_BUS, render_domain
from vmsandbox.render.network import (
    CardPlan,
    bridge_of,
    name_prefix,
    render_filter,
    render_interface,
    render_network,
    tap_of,
)

Golden = Callable[[str, str], None]
PLAN = CardPlan("20260102-150405-demo-1a2b3c", Path("/var/lib/vmsandbox/live"), "10.213.7.1", "10.213.7.2")
Network = ipaddress.IPv4Network


@pytest.mark.parametrize("render", [render_network, render_filter, render_interface], ids=lambda f: f.__name__[7:])
def test_what_libvirt_is_told(golden: Golden, render: Callable[[CardPlan], str]) -> None:
    golden(f"card-{render.__name__[7:]}.xml", render(PLAN))


def test_what_the_kernel_is_told(golden: Golden) -> None:
    golden("card-rules.json", render_rules(PLAN))


def test_only_a_guest_with_a_card_has_a_slot_for_one() -> None:
    shape = dataclasses.replace(FORK.shape, card=True)
    for name in ("template", "fork-sealed"):
        plain = render_domain(VARIANTS[name])
        text = render_domain(dataclasses.replace(VARIANTS[name], shape=shape))
        more = [line for line in text.splitlines() if line not in plain.splitlines()]
        assert more == [f'    <controller type="pci" index="{CARD_BUS}" model="pcie-root-port" />']
        assert "<interface" not in text


def test_the_network_leads_nowhere() -> None:
    network = ET.fromstring(render_network(PLAN))
    kinds = [element.tag for element in network.iter()]
    assert not {"forward", "dhcp", "route", "portForward", "domain"} & set(kinds)
    assert kinds.count("ip") == 1 and network.find("ip").get("family") in (None, "ipv4")  # type: ignore[union-attr]
    assert network.find("dns").get("enable") == "no"  # type: ignore[union-attr]


def test_everything_that_the_filter_accepts_names_both_ends() -> None:
    rules = ET.fromstring(render_filter(PLAN)).findall("rule")
    accepted = [rule for rule in rules if rule.get("action") == "accept"]
    assert len(accepted) == 2 * (4 + 1 + 2)
    for rule in accepted:
        values = set(rule[0].attrib.values())
        assert {"$IP", "$BROKER"} <= values and (rule.get("direction") == "in" or "$MAC" in values)
    assert [rule[0].tag for rule in rules if rule.get("action") == "drop"] == ["mac", "ipv6", "mac"]
    last = max(rules, key=lambda rule: int(rule.get("priority", "")))
    assert (last.get("action"), last.get("direction"), last[0].attrib) == ("drop", "inout", {})


def test_names_fit_and_are_each_sessions_own() -> None:
    others = [
        dataclasses.replace(PLAN, session_id="20260102-150405-demo-1a2b3d"),
        dataclasses.replace(PLAN, home=Path("/other/live")),
    ]
    for other in others:
        for name in ("name", "table", "bridge", "tap", "mac", "bridge_mac"):
            assert getattr(other, name) != getattr(PLAN, name), name
    for interface in (PLAN.bridge, PLAN.tap):
        assert len(interface) <= 15  # IFNAMSIZ
        assert not interface.startswith("vnet")  # libvirt would choose another name
    assert (bridge_of(PLAN.name), tap_of(PLAN.name)) == (PLAN.bridge, PLAN.tap)
    assert PLAN.name.startswith(name_prefix(PLAN.home))
    assert PLAN.mac != PLAN.bridge_mac and int(PLAN.mac[:2], 16) & 3 == 2, "locally administered, no group address"


def test_addresses_that_the_host_routes_are_not_taken() -> None:
    host, guest = choose_addresses("one", [])
    network = Network(f"{host}/30", strict=False)
    assert [host, guest] == [str(address) for address in network.hosts()]
    assert choose_addresses("one", [Network("192.0.2.0/24")]) == (host, guest)
    assert choose_addresses("two", []) != (host, guest)
    assert choose_addresses("one", [Network(f"{guest}/32")]) != (host, guest)
    everything = [Network("10.0.0.0/8"), Network("172.16.0.0/12")]
    assert choose_addresses("one", everything)[0].startswith("192.168.")
    with pytest.raises(HostError, match="no private network"):
        choose_addresses("one", [*everything, Network("192.168.0.0/16"), Network("100.0.0.0/8")])


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nft") is None, reason="loads rules into a name space of its own")
def test_the_kernel_gives_back_what_it_was_given(tmp_path: Path) -> None:
    """In a fresh network name space; twice, because loading replaces what is there."""
    rules = tmp_path / "rules.json"
    rules.write_text(render_rules(PLAN))
    script = 'nft -j -f "$1" && nft -j -f "$1" && nft -j list ruleset'
    done = subprocess.run(["unshare", "-n", "sh", "-c", script, "sh", rules], capture_output=True, timeout=60)
    if b"Operation not permitted" in done.stderr:
        pytest.skip("no network name spaces here")
    assert done.returncode == 0, done.stderr
    seen = InForce(ruleset_of(PLAN, json.loads(done.stdout)["nftables"]), {})
    assert [problem for problem in problems(seen, PLAN) if "our table" in problem] == []
    assert len(seen.tables) == 2
    other = dataclasses.replace(PLAN, tcp_ports=(53, 80, 443))
    assert [problem for problem in problems(seen, other) if "our table" in problem] != []


def rule_texts() -> list[dict[str, Any]]:
    """Every rule that is loaded."""
    commands = json.loads(render_rules(PLAN))["nftables"]
    return [command["add"]["rule"] for command in commands if "rule" in command.get("add", {})]


def test_every_chain_ends_for_this_guest_in_a_drop() -> None:
    last: dict[tuple[str, str], Any] = {}
    for rule in rule_texts():
        last[rule["family"], rule["chain"]] = rule["expr"]
    for place, expression in last.items():
        assert expression[-1] == {"drop": None}, place
    assert len(last) == 7


def test_what_is_accepted_names_both_addresses_or_is_somebody_elses() -> None:
    for rule in rule_texts():
        if rule["expr"][-1] != {"accept": None}:
            continue
        text = json.dumps(rule["expr"])
        others = text.count('"!="') == 1 and ("iifname" in text or "oifname" in text) and len(rule["expr"]) == 2
        ours = PLAN.host_address in text and PLAN.guest_address in text
        assert others or ours, text
