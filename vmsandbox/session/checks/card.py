"""What the network card of `--net filtered` needs: the kernel, nft, ebtables, and a firewall that lets the broker hear.

Without this check a session would end in nft's words about an expression, or run with a broker that its guest cannot
reach because the host's own firewall drops what it does not know.
"""

from __future__ import annotations

import json
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.render.card_rules import render_rules
from vmsandbox.render.network import CardPlan
from vmsandbox.session.checks import CheckResult, Examined, Status, install_line

TITLE = "filtered network card"
# A name, and where the kernel shows it (devices, then modules).
_FEATURES = {
    "tun": ("/dev/net/tun", "/sys/module/tun"),
    "bridge": ("/sys/module/bridge",),
    "nf_tables": ("/sys/module/nf_tables",),
}
_PROGRAMS = {
    "nft": "nftables",
    "ebtables": "ebtables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "dnsmasq": "dnsmasq-base",  # never started; see `hypervisor.network.refuse_without_dnsmasq`
}
_LET_IN = "iptables -I INPUT -i 'vmb+' -j ACCEPT"
_EXAMPLE = CardPlan("doctor", Path("/doctor"), "192.0.2.1", "192.0.2.2")


def check_card(host: Examined) -> CheckResult:
    """Only `--net filtered` needs this, so it never fails."""
    missing = [name for name, places in _FEATURES.items() if not _has_feature(host, name, places)]
    packages = tuple(package for program, package in _PROGRAMS.items() if host.programs.find(program) is None)
    if missing or packages:
        found = "not found: " + ", ".join([*(f"kernel feature {name}" for name in missing), *packages])
        lines = [f"sudo modprobe {name}" for name in missing] + ([install_line(packages)] if packages else [])
        fix = (lambda: _load(host, missing)) if missing and host.is_root else None
        return CheckResult("filtered-card", TITLE, Status.WARN, found, "\n".join(lines), packages, fix=fix)
    if not (host.is_root and host.is_system):
        found = "the host has what it needs; it is for root with qemu:///system only (others: --net proxy)"
        return CheckResult("filtered-card", TITLE, Status.OK, found)
    for found, remedy in (_wrong_ebtables(host), _rules_do_not_load(host), _firewall_in_the_way(host)):
        if found:
            return CheckResult("filtered-card", TITLE, Status.WARN, found, remedy)
    return CheckResult("filtered-card", TITLE, Status.OK, "tun, bridge, nf_tables, nft, ebtables; our rules load")


def _wrong_ebtables(host: Examined) -> tuple[str, str]:
    """libvirt's filter is read back through nf_tables; what the legacy ebtables writes is not seen there."""
    said = host.programs.run(["ebtables", "--version"], timeout=10, check=False).text
    if "legacy" not in said:
        return "", ""
    return (
        f"ebtables is the legacy one ({said.strip()}): libvirt's filter could not be read back",
        "sudo update-alternatives --set ebtables /usr/sbin/ebtables-nft",
    )


def _rules_do_not_load(host: Examined) -> tuple[str, str]:
    """Loaded for real, into a network name space that ends with the program."""
    try:
        host.programs.run(["unshare", "-n", "nft", "-j", "-f", "-"], stdin=render_rules(_EXAMPLE).encode(), timeout=20)
    except HostError as error:
        return (
            f"the kernel does not take our rules: {error.details or error.brief}",
            "a kernel with nft_reject_inet, nft_socket and nf_conntrack (built in or as modules): Debian's have them",
        )
    return "", ""


def _firewall_in_the_way(host: Examined) -> tuple[str, str]:
    """A chain at the host's input that drops by default also drops what a guest says to its broker."""
    try:
        listed = json.loads(host.programs.run(["nft", "-j", "list", "ruleset"], timeout=20).text)["nftables"]
    except (HostError, ValueError, KeyError, TypeError):
        return "", ""
    text = json.dumps(listed)
    chains = [entry["chain"] for entry in listed if entry.get("chain", {}).get("hook") == "input"]
    dropping = [chain for chain in chains if chain.get("policy") == "drop" and chain["family"] in ("inet", "ip")]
    if not dropping or '"vmb*"' in text:
        return "", ""
    names = ", ".join(f"{chain['family']} {chain['table']} {chain['name']}" for chain in dropping)
    return (
        f"the host's firewall drops what it does not know ({names}): a filtered guest would not reach its broker",
        f"let it in on the guests' bridges, where our own rules say what may pass, for example: sudo {_LET_IN}",
    )


def _load(host: Examined, modules: list[str]) -> str:
    for name in modules:
        host.programs.run(["modprobe", name], timeout=20)
    return f"loaded {', '.join(modules)}"


def _has_feature(host: Examined, name: str, places: tuple[str, ...]) -> bool:
    """Active now, built in, or a module that the kernel loads when it is first used."""
    if any(host.path(place).exists() for place in places):
        return True
    if name == "nf_tables" and host.is_root and host.programs.find("nft"):
        # Built into the kernel it shows nowhere in /sys, but it answers.
        return host.programs.run(["nft", "list", "tables"], timeout=10, check=False).status == 0
    modules = Path("/lib/modules", host.kernel)
    listed = (host.read(modules / "modules.builtin") or "") + (host.read(modules / "modules.dep") or "")
    return f"/{name}.ko" in listed
