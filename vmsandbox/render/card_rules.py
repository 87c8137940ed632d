"""Our own nftables rules around the network card of one session: tables of the families `bridge` and `inet`.

libvirt's filter on the card's tap says the same; these hold even if that were gone, and they guard what it cannot:
the bridge's address against everybody but this guest, and the host's own tables against being filled by it.

Pure: the same `CardPlan` gives the same text.
"""

from __future__ import annotations

import json
from typing import Any

from vmsandbox.render.network import DNS_PORT, CardPlan

BEFORE_LIBVIRT = -350  # priority in the bridge family; libvirt's ebtables rules have -300
RAW = -300  # before connection tracking

Rule = list[dict[str, Any]]


def rule_tables(plan: CardPlan) -> dict[str, dict[str, tuple[dict[str, Any], list[Rule]]]]:
    """Our nftables rules: family → chain → (its base, its rules), as libnftables-json(5) writes them.

    This is both what is loaded and what must be read back, so it is written the way that `nft -j list` prints it.
    """
    return {"bridge": _bridge_table(plan), "inet": _inet_table(plan)}


def render_rules(plan: CardPlan) -> str:
    """The rules for `nft -j -f -`: one transaction that replaces both tables."""
    commands: list[dict[str, Any]] = []
    for family, chains in rule_tables(plan).items():
        table = {"family": family, "name": plan.table}
        # Added first: one that is not there cannot be deleted.
        commands += [{"add": {"table": table}}, {"delete": {"table": table}}, {"add": {"table": table}}]
        place = {"family": family, "table": plan.table}
        for chain, (base, rules) in chains.items():
            commands.append({"add": {"chain": {**place, "name": chain, **base}}})
            commands += [{"add": {"rule": {**place, "chain": chain, "expr": rule}}} for rule in rules]
    return '{"nftables": [\n' + ",\n".join(json.dumps(command) for command in commands) + "\n]}\n"


def _bridge_table(plan: CardPlan) -> dict[str, tuple[dict[str, Any], list[Rule]]]:
    """Frames between the tap and the bridge. Frames of other bridges' ports are accepted by the first rule."""
    arp_kinds = {"set": ["reply", "request"]}
    whole = _equal({"&": [_field("ip", "frag-off"), 0x3FFF]}, 0)  # a fragment has no port to go by
    from_guest = [
        [_not(_meta("iifname"), plan.tap), _ACCEPT],
        [_not(_field("ether", "saddr"), plan.mac), _COUNTER, _DROP],
        # As it stands in the frame: a VLAN's tag hides the protocol that the rules below would see.
        [_not(_field("ether", "type"), {"set": ["ip", "arp"]}), _COUNTER, _DROP],
        [
            _equal(_field("arp", "operation"), arp_kinds),
            _equal(_field("arp", "saddr ether"), plan.mac),
            _equal(_field("arp", "saddr ip"), plan.guest_address),
            _equal(_field("arp", "daddr ip"), plan.host_address),
            _ACCEPT,
        ],
        [_not(_field("ether", "daddr"), plan.bridge_mac), _COUNTER, _DROP],
        *([*_between(plan.guest_address, plan.host_address), whole, port, _ACCEPT] for port in _ports(plan, "dport")),
        [_COUNTER, _DROP],
    ]
    to_guest = [
        [_not(_meta("oifname"), plan.tap), _ACCEPT],
        [_not(_field("ether", "type"), {"set": ["ip", "arp"]}), _COUNTER, _DROP],
        [
            _equal(_field("arp", "operation"), arp_kinds),
            _equal(_field("arp", "saddr ip"), plan.host_address),
            _equal(_field("arp", "daddr ip"), plan.guest_address),
            _ACCEPT,
        ],
        *([*_between(plan.host_address, plan.guest_address), port, _ACCEPT] for port in _ports(plan, "sport")),
        [_COUNTER, _DROP],
    ]
    through = [[_equal(_meta(side), plan.tap), _COUNTER, _DROP] for side in ("iifname", "oifname")]
    return {
        "from_guest": (_base("prerouting", BEFORE_LIBVIRT), from_guest),
        "through": (_base("forward", BEFORE_LIBVIRT), through),
        "to_guest": (_base("postrouting", BEFORE_LIBVIRT), to_guest),
    }


def _inet_table(plan: CardPlan) -> dict[str, tuple[dict[str, Any], list[Rule]]]:
    """Packets between the bridge and the host. The broker's address answers on this bridge alone."""
    connecting = _equal({"&": [_field("tcp", "flags"), ["syn", "ack"]]}, "syn")
    to_broker = _between(plan.guest_address, plan.host_address)
    tcp, udp = _ports(plan, "dport")
    bound = _equal({"socket": {"key": "wildcard"}}, 0)
    before = [
        # A guest that opens connections without end fills no table of the host's.
        [_equal(_meta("iifname"), plan.bridge), _NOTRACK],
        # Others on this host or its network do not get to the broker, nor to the secrets that it puts in.
        [_not(_meta("iifname"), plan.bridge), _equal(_field("ip", "daddr"), plan.host_address), _COUNTER, _DROP],
    ]
    incoming = [
        [_equal(_meta("iifname"), plan.tap), _COUNTER, _DROP],
        [_not(_meta("iifname"), plan.bridge), _ACCEPT],
        # To sockets that are bound to this address: a program of the host that listens on all of them is not reached
        # through it, even when the broker is gone. (What follows a connection's first packet has no such socket yet.)
        [*to_broker, tcp, connecting, bound, _ACCEPT],
        [*to_broker, tcp, connecting, _COUNTER, {"reject": {"type": "tcp reset"}}],
        [*to_broker, tcp, _ACCEPT],
        [*to_broker, udp, bound, _ACCEPT],
        [_COUNTER, _DROP],
    ]
    outgoing = [
        # The kernel greets its IPv6 neighbours on a new tap by itself, around the bridge.
        [_equal(_meta("oifname"), plan.tap), _COUNTER, _DROP],
        [_not(_meta("oifname"), plan.bridge), _ACCEPT],
        [_NOTRACK],
        [connecting, _COUNTER, _DROP],
        *([*_between(plan.host_address, plan.guest_address), port, _ACCEPT] for port in _ports(plan, "sport")),
        [_COUNTER, _DROP],
    ]
    through = [
        [_equal(_meta(side), name), _COUNTER, _DROP]
        for name in (plan.bridge, plan.tap)
        for side in ("iifname", "oifname")
    ]
    return {
        "before": (_base("prerouting", RAW), before),
        "incoming": (_base("input", 0), incoming),
        "through": (_base("forward", 0), through),
        "outgoing": (_base("output", RAW), outgoing),
    }


_ACCEPT: dict[str, Any] = {"accept": None}
_DROP: dict[str, Any] = {"drop": None}
_NOTRACK: dict[str, Any] = {"notrack": None}
_COUNTER: dict[str, Any] = {"counter": None}


def _base(hook: str, priority: int) -> dict[str, Any]:
    return {"type": "filter", "hook": hook, "prio": priority, "policy": "accept"}


def _meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def _field(protocol: str, field: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": field}}


def _equal(left: Any, right: Any) -> dict[str, Any]:
    return {"match": {"op": "==", "left": left, "right": right}}


def _not(left: Any, right: Any) -> dict[str, Any]:
    return {"match": {"op": "!=", "left": left, "right": right}}


def _between(source: str, destination: str) -> list[dict[str, Any]]:
    return [_equal(_field("ip", "saddr"), source), _equal(_field("ip", "daddr"), destination)]


def _ports(plan: CardPlan, side: str) -> list[dict[str, Any]]:
    """One match for the TCP ports and one for UDP's."""
    return [_equal(_field("tcp", side), {"set": sorted(plan.tcp_ports)}), _equal(_field("udp", side), DNS_PORT)]
