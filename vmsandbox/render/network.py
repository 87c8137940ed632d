"""What libvirt is told about the network card of one session (`--net filtered`): network, filter, interface.

The filter lets the guest talk to the broker's ports on the bridge's address and to nothing else, and drops what the
host would say to the guest by itself. Without it a card would be a way to everything that the host routes. The rules
of our own beside it (`card_rules`) are whole by themselves.

Pure: the same `CardPlan` gives the same text, and golden files in tests/golden show it. Names are made from the
session's id and the folder of its installation alone, so that whoever knows those two can find and remove it all.
"""

from __future__ import annotations

import hashlib
import uuid as uuids
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.render.domain import CARD_BUS, METADATA_NS

PREFIX_BITS = 30  # of the network: the bridge's address, the guest's, and nobody else
DNS_PORT = 53
PROXY_PORT = 3128
BROKER_TCP_PORTS = (DNS_PORT, 80, 443, PROXY_PORT)


@dataclass(frozen=True)
class CardPlan:
    """One session's card, bridge and rules.

    session_id     of the session
    home           folder of the live sessions of its installation
    host_address   of the bridge: the broker's
    guest_address  the only one that the guest may use
    tcp_ports      on the bridge's address that the guest may reach, besides UDP port 53
    """

    session_id: str
    home: Path
    host_address: str
    guest_address: str
    tcp_ports: tuple[int, ...] = BROKER_TCP_PORTS

    @property
    def name(self) -> str:
        """Of the libvirt network and of the nwfilter."""
        return f"{name_prefix(self.home)}{_digest(str(self.home), self.session_id)[:10]}"

    @property
    def table(self) -> str:
        """Of both nftables tables."""
        return table_of(self.name)

    @property
    def bridge(self) -> str:
        """The bridge's interface (15 characters at most)."""
        return bridge_of(self.name)

    @property
    def tap(self) -> str:
        """The host's end of the card."""
        return tap_of(self.name)

    @property
    def mac(self) -> str:
        """The guest's."""
        return _mac("card", str(self.home), self.session_id)

    @property
    def bridge_mac(self) -> str:
        """The bridge's."""
        return _mac("bridge", str(self.home), self.session_id)


def name_prefix(home: Path) -> str:
    """What the names of all networks and filters of one installation begin with."""
    return f"vmsandbox-{_digest(str(home))[:8]}-"


def table_of(name: str) -> str:
    """The nftables tables that belong to a network of ours."""
    return name.replace("-", "_")


def bridge_of(name: str) -> str:
    """The bridge of a network of ours."""
    return f"vmb{name.rpartition('-')[2]}"


def tap_of(name: str) -> str:
    """The tap on the bridge of a network of ours."""
    return f"vmt{name.rpartition('-')[2]}"


def render_network(plan: CardPlan) -> str:
    """The isolated network (https://libvirt.org/formatnetwork.html): no forwarding, no DHCP, no DNS, no IPv6."""
    ET.register_namespace("vmsandbox", METADATA_NS)
    network = ET.Element("network")
    _text(network, "name", plan.name)
    _text(network, "uuid", _uuid("network", plan))
    metadata = ET.SubElement(network, "metadata")
    ET.SubElement(metadata, f"{{{METADATA_NS}}}session", {"id": plan.session_id, "home": str(plan.home)})
    ET.SubElement(network, "bridge", {"name": plan.bridge, "stp": "off", "delay": "0"})
    ET.SubElement(network, "mac", {"address": plan.bridge_mac})
    ET.SubElement(network, "dns", {"enable": "no"})
    ET.SubElement(network, "ip", {"address": plan.host_address, "prefix": str(PREFIX_BITS)})
    return _document(network)


def render_filter(plan: CardPlan) -> str:
    """libvirt's filter for the card (https://libvirt.org/formatnwfilter.html). `out` is what the guest sends.

    Only rules of the link layer (mac, ip, arp, ipv6): those need no br_netfilter and no connection tracking.
    """
    top = ET.Element("filter", {"name": plan.name, "chain": "root"})
    _text(top, "uuid", _uuid("filter", plan))
    _filter_rule(top, "drop", "out", 100, "mac", match="no", srcmacaddr="$MAC")
    from_guest = {"srcmacaddr": "$MAC", "srcipaddr": "$IP", "dstipaddr": "$BROKER"}
    to_guest = {"srcipaddr": "$BROKER", "dstipaddr": "$IP"}
    for protocol, ports in (("tcp", plan.tcp_ports), ("udp", (DNS_PORT,))):
        for port in ports:
            _filter_rule(top, "accept", "out", 200, "ip", **from_guest, protocol=protocol, dstportstart=str(port))
            _filter_rule(top, "accept", "in", 200, "ip", **to_guest, protocol=protocol, srcportstart=str(port))
    for opcode in ("Request", "Reply"):
        ours = {"arpsrcmacaddr": "$MAC", "arpsrcipaddr": "$IP", "arpdstipaddr": "$BROKER"}
        _filter_rule(top, "accept", "out", 300, "arp", opcode=opcode, **ours)
        _filter_rule(top, "accept", "in", 300, "arp", opcode=opcode, arpsrcipaddr="$BROKER", arpdstipaddr="$IP")
    _filter_rule(top, "drop", "inout", 900, "ipv6")
    _filter_rule(top, "drop", "inout", 1000, "mac")
    return _document(top)


def render_interface(plan: CardPlan) -> str:
    """The card (https://libvirt.org/formatdomain.html#network-interfaces), to be plugged into the empty slot.

    Its packets go through QEMU and not through vhost in the host's kernel: what a hostile guest feeds them to is a
    confined process.
    """
    interface = ET.Element("interface", {"type": "bridge"})
    ET.SubElement(interface, "mac", {"address": plan.mac})
    ET.SubElement(interface, "source", {"bridge": plan.bridge})
    ET.SubElement(interface, "port", {"isolated": "yes"})
    ET.SubElement(interface, "target", {"dev": plan.tap})
    ET.SubElement(interface, "model", {"type": "virtio"})
    ET.SubElement(interface, "driver", {"name": "qemu"})
    reference = ET.SubElement(interface, "filterref", {"filter": plan.name})
    for name, value in filter_parameters(plan).items():
        ET.SubElement(reference, "parameter", {"name": name, "value": value})
    ET.SubElement(interface, "rom", {"enabled": "no"})
    place = {"domain": "0x0000", "bus": f"0x{CARD_BUS:02x}", "slot": "0x00", "function": "0x0"}
    ET.SubElement(interface, "address", {"type": "pci", **place})
    return _document(interface)


def filter_parameters(plan: CardPlan) -> dict[str, str]:
    """What the filter's variables stand for."""
    return {"BROKER": plan.host_address, "IP": plan.guest_address, "MAC": plan.mac}


def _filter_rule(parent: ET.Element, action: str, direction: str, priority: int, layer: str, **match: str) -> None:
    rule = ET.SubElement(parent, "rule", {"action": action, "direction": direction, "priority": str(priority)})
    ET.SubElement(rule, layer, match)


def _uuid(kind: str, plan: CardPlan) -> str:
    return str(uuids.uuid5(uuids.NAMESPACE_URL, f"{METADATA_NS}#{kind}:{plan.home}:{plan.session_id}"))


def _mac(kind: str, *parts: str) -> str:
    """An address of the range that KVM's guests have (52:54:00)."""
    digits = _digest(kind, *parts)
    return f"52:54:00:{digits[0:2]}:{digits[2:4]}:{digits[4:6]}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text


def _document(top: ET.Element) -> str:
    ET.indent(top)
    return ET.tostring(top, encoding="unicode") + "\n"
