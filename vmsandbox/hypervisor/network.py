"""Makes and removes the network of one session, through libvirt and nft.

Order is safety: our own rules name the bridge and the tap before either exists, so there is no moment at which the
card is there and they are not; and they go last. Whatever is here is found again by its name alone, which is made
from the session's id and the folder of its installation.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from vmsandbox.errors import HostError, RefusedError, VmsandboxError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.isolation import SYSTEM_URI
from vmsandbox.process import Programs
from vmsandbox.render.card_rules import render_rules
from vmsandbox.render.network import (
    PREFIX_BITS,
    CardPlan,
    bridge_of,
    name_prefix,
    render_filter,
    render_network,
    table_of,
    tap_of,
)

Network = ipaddress.IPv4Network

# Where the two addresses of a card are taken from; the later ones for hosts that route all of the first.
_POOLS = tuple(map(Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")))
_TRIES = 64  # in each pool
_A_ROUTE_TO_EVERYTHING = 7  # bits: a default route, or the halves and quarters that VPNs make of one
_NFT = ("nft", "-j", "-f", "-")
_FAMILIES = ("bridge", "inet")


def refuse_where_impossible(uri: str) -> None:
    """Refuse `--net filtered` where guests are not root's: nobody else may make bridges, taps and rules.

    Raises:
        RefusedError: it says why.
    """
    if uri == SYSTEM_URI and os.geteuid() == 0:
        return
    who = "vmsandbox does not run as root" if os.geteuid() != 0 else f"guests are run by {uri}"
    raise RefusedError(
        "a filtered network card needs root and libvirt's qemu:///system",
        details=f"{who}: only root may make a bridge, a tap and the rules around them",
        resolution="use --net proxy, which needs neither, or run vmsandbox as root",
    )


def refuse_without_dnsmasq(programs: Programs) -> None:
    """Refuse where libvirtd could not be restarted any more while the guest runs.

    A libvirtd that finds a network with an address at its start, and no dnsmasq, crashes (seen with 9.0.0: a null
    pointer where it looks for the dnsmasq of the network, which ours never has). systemd would start it again and
    again, and no guest of this host could be stopped by it.

    Raises:
        RefusedError: there is none.
    """
    if programs.find("dnsmasq") is None:
        raise RefusedError(
            "a filtered network card needs dnsmasq to be installed: without, libvirtd crashes when it is restarted",
            details="it is never started; libvirtd asks where it is",
            resolution="apt-get install --no-install-recommends dnsmasq-base; or use --net proxy",
        )


def routed_networks(programs: Programs) -> list[Network]:
    """Every IPv4 network that this host routes or has an address in, but default routes. Raises HostError."""
    said = programs.run(["ip", "-j", "-4", "route", "show", "table", "all"], timeout=10).text
    networks = []
    for route in json.loads(said or "[]"):
        if route["dst"] != "default":
            network = Network(route["dst"], strict=False)
            if network.prefixlen > _A_ROUTE_TO_EVERYTHING:
                networks.append(network)
    return networks


def choose_addresses(seed: str, taken: Iterable[Network]) -> tuple[str, str]:
    """The bridge's and the guest's address: a network of two hosts that overlaps nothing that is `taken`.

    Args:
        seed: sessions with different ones look in different places.

    Raises:
        HostError: there is none.
    """
    routed = list(taken)
    dice = random.Random(seed)  # noqa: S311 - spreads, keeps no secret
    for pool in _POOLS:
        for _ in range(_TRIES):
            offset = dice.randrange(pool.num_addresses >> (32 - PREFIX_BITS)) << (32 - PREFIX_BITS)
            network = Network((int(pool.network_address) + offset, PREFIX_BITS))
            if not any(network.overlaps(other) for other in routed):
                host, guest = network.hosts()
                return str(host), str(guest)
    raise HostError(
        "there is no private network that this host does not route already",
        details=", ".join(map(str, routed))[:1000],
        resolution="use --net proxy, which needs no address",
    )


def make_network(host: Host, plan: CardPlan, programs: Programs) -> None:
    """Load our rules, then make the bridge and libvirt's filter. The caller removes what a failure leaves.

    Raises:
        HostError: nft or libvirt refused.
    """
    programs.run(_NFT, stdin=render_rules(plan).encode(), timeout=20)
    host.define_filter(render_filter(plan))
    host.create_network(render_network(plan))


def remove_network(host: Host, name: str, programs: Programs) -> list[str]:
    """Remove bridge, filter and rules of this name, as far as they are there; returns what is left, in words.

    The guest must be gone: the rules go last, and only if the bridge did.
    """
    left: list[str] = []
    _attempt(left, "network", lambda: host.remove_network(name))
    _attempt(left, "network filter", lambda: host.remove_filter(name, tap_of(name)))
    if not left:
        _attempt(left, "bridge", lambda: _remove_lost_bridge(host, name, programs))
    for interface in (bridge_of(name), tap_of(name)):
        if Path("/sys/class/net", interface).exists():
            left.append(f"interface {interface}: it is still there")
    if not left:
        _attempt(left, "rules", lambda: _remove_tables(table_of(name), programs))
    return left


def stray_names(host: Host, home: Path, programs: Programs) -> set[str]:
    """The names of all networks of one installation of which a network, a filter or a table of rules is there."""
    prefix = name_prefix(home)
    names = {name for name in host.network_names() if name.startswith(prefix)}
    tables = {name.replace("_", "-") for _, name in _tables(programs) if name.startswith(table_of(prefix))}
    return {name for name in names | tables if re.fullmatch(r"[0-9a-f]{10}", name.removeprefix(prefix))}


def _remove_lost_bridge(host: Host, name: str, programs: Programs) -> None:
    """A libvirtd that was killed between making the bridge and writing it down knows nothing of it afterwards."""
    bridge = bridge_of(name)
    if Path("/sys/class/net", bridge, "bridge").exists() and name not in host.network_names():
        programs.run(["ip", "link", "delete", "dev", bridge, "type", "bridge"], timeout=20)


def _remove_tables(table: str, programs: Programs) -> None:
    there = [family for family, name in _tables(programs) if name == table]
    if there:
        commands = [{"delete": {"table": {"family": family, "name": table}}} for family in there]
        programs.run(_NFT, stdin=json.dumps({"nftables": commands}).encode(), timeout=20)


def _tables(programs: Programs) -> list[tuple[str, str]]:
    """(family, name) of every table in the families that we use."""
    listed = json.loads(programs.run(["nft", "-j", "list", "tables"], timeout=20).text)["nftables"]
    found = [(entry["table"]["family"], entry["table"]["name"]) for entry in listed if "table" in entry]
    return [(family, name) for family, name in found if family in _FAMILIES]


def _attempt(left: list[str], what: str, step: Callable[[], object]) -> None:
    try:
        step()
    except VmsandboxError as error:
        left.append(f"{what}: {error.brief} {error.details}".rstrip())
