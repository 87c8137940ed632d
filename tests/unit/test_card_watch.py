"""The watch on a card, in a network name space of its own: each way to take its guards away is noticed within two
seconds (libvirt's part of them alone: five), and what has nothing to do with it is not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = ("nft", "ebtables", "ip", "unshare")
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, NEEDED)), reason=f"needs root and {', '.join(NEEDED)}"
)
UNIT = Path(__file__).parent

WORLD = r"""
import json, subprocess, sys, time
sys.path[:0] = sys.argv[1:3]
from test_render_network import PLAN
from vmsandbox.hypervisor.cardwatch import CardWatch
from vmsandbox.hypervisor.inforce import problems, read_in_force
from vmsandbox.process import Programs
from vmsandbox.render.card_rules import render_rules

tap, bridge, tables = PLAN.tap, PLAN.bridge, PLAN.table
I, O = f"libvirt-I-{tap}", f"libvirt-O-{tap}"
def run(*words, **options):
    subprocess.run(words, check=True, capture_output=True, **options)
def ebtables(line):
    run("ebtables", "-t", "nat", *line.split())
def build():
    run("nft", "flush", "ruleset")
    for link in (tap, bridge, "another"):
        subprocess.run(["ip", "link", "del", link], capture_output=True)
    run("nft", "-j", "-f", "-", input=render_rules(PLAN).encode())
    run("ip", "link", "add", bridge, "address", PLAN.bridge_mac, "type", "bridge", "stp_state", "0")
    run("ip", "tuntap", "add", tap, "mode", "tap")
    run("sh", "-c", f"[ ! -e /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/{bridge}/disable_ipv6")
    run("ip", "link", "set", tap, "master", bridge)
    run("ip", "link", "set", tap, "type", "bridge_slave", "isolated", "on")
    # what libvirt makes of the filter
    for chain in (I, O):
        ebtables(f"-N {chain}")
    ebtables(f"-A PREROUTING -i {tap} -j {I}")
    ebtables(f"-A POSTROUTING -o {tap} -j {O}")
    ebtables(f"-A {I} -s ! {PLAN.mac} -j DROP")
    for chain, side in ((I, "d"), (O, "s")):
        for protocol, port in (("tcp", 53), ("tcp", 80), ("tcp", 443), ("tcp", 3128), ("udp", 53)):
            ebtables(f"-A {chain} -p IPv4 --ip-{side}{'st' if side == 'd' else 'rc'} {PLAN.host_address} "
                     f"--ip-proto {protocol} --ip-{side}port {port} -j ACCEPT")
        for kind in ("Request", "Reply"):
            ebtables(f"-A {chain} -p ARP --arp-op {kind} --arp-ip-src {PLAN.guest_address} -j ACCEPT")
        ebtables(f"-A {chain} -j DROP")
CHANGES = {
    "our table": lambda: run("nft", "delete", "table", "inet", tables),
    "our other table": lambda: run("nft", "delete", "table", "bridge", tables),
    "a reloaded firewall": lambda: run("nft", "flush", "ruleset"),
    "a rule of ours": lambda: run("nft", "flush", "chain", "inet", tables, "through"),
    "a rule before ours": lambda: run("nft", "insert", "rule", "bridge", tables, "from_guest", "accept"),
    "libvirt's chain": lambda: ebtables(f"-F {I}"),
    "libvirt's jump": lambda: ebtables(f"-D POSTROUTING -o {tap} -j {O}"),
    "libvirt's rules, weakened": lambda: ebtables(f"-I {O} 1 -p IPv4 -j ACCEPT"),
    "libvirt's rules, another": lambda: ebtables(f"-I {O} 1 -p IPv4 -j DROP"),
    "the tap elsewhere": lambda: run("ip", "link", "set", tap, "nomaster"),
    "the isolation": lambda: run("ip", "link", "set", tap, "type", "bridge_slave", "isolated", "off"),
    "another port": lambda: run("ip", "link", "add", "another", "master", bridge, "type", "veth"),
    "the bridge": lambda: run("ip", "link", "del", bridge),
    "spanning tree": lambda: run("ip", "link", "set", bridge, "type", "bridge", "stp_state", "1"),
}
HARMLESS = {
    "another table": lambda: run("nft", "add", "table", "inet", "others"),
    "another guest's jump": lambda: ebtables("-A PREROUTING -i vmtother -j DROP"),
    "another link": lambda: run("ip", "link", "add", "another", "type", "veth"),
    "many changes": lambda: [run("nft", "add", "table", "inet", f"others{number}") for number in range(30)],
}
found = {}
def watched(change, alive=True, patience=2.0, away=lambda: False):
    build()
    first = read_in_force(PLAN, Programs())
    assert problems(first, PLAN) == [], problems(first, PLAN)
    gone = []
    watch = CardWatch(PLAN, first, Programs(), lambda: alive, away, gone.append)
    time.sleep(0.1)
    began = time.monotonic()
    change()
    while not gone and time.monotonic() - began < patience:
        time.sleep(0.01)
    took = time.monotonic() - began
    watch.close()
    return [round(took, 2), gone]
for name, change in CHANGES.items():
    found[name] = watched(change, patience=5.0 if name.startswith("libvirt") else 2.0)
def libvirtd_restarts():
    ebtables(f"-D PREROUTING -i {tap} -j {I}")
    time.sleep(1)
    ebtables(f"-A PREROUTING -i {tap} -j {I}")
HARMLESS["libvirt, at work on its filter"] = libvirtd_restarts
for name, change in HARMLESS.items():
    found["harmless: " + name] = watched(change, patience=3.5 if "libvirt" in name else 0.8)
away = [True]
found["harmless: the card is away"] = watched(CHANGES["the tap elsewhere"], patience=1.5, away=lambda: True)
def taken_out_and_back(isolated):
    # as libvirt does it; `away`: what the descriptors of QEMU say at that moment
    def change():
        away[0] = True
        run("ip", "link", "set", tap, "nomaster")
        time.sleep(1.2)
        run("ip", "link", "set", tap, "master", bridge)
        time.sleep(0.4)
        if isolated:
            run("ip", "link", "set", tap, "type", "bridge_slave", "isolated", "on")
        away[0] = False
    return change
away[0] = False
for isolated in (True, False):
    name = "harmless: the card comes back" if isolated else "the card comes back open"
    found[name] = watched(taken_out_and_back(isolated), patience=3.5, away=lambda: away[0])
found["the guest has ended"] = watched(CHANGES["the tap elsewhere"], alive=False, patience=0.8)
print(json.dumps(found))
"""


def test_every_change_that_matters_is_noticed_and_no_other() -> None:
    script = 'mount -t sysfs sysfs /sys && exec "$@"'
    words = ["unshare", "-n", "-m", "sh", "-c", script, "sh", sys.executable, "-c", WORLD, UNIT, UNIT.parents[1]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if "not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("no name spaces here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    harmless = {name for name in found if name.startswith("harmless") or name == "the guest has ended"}
    assert {name for name in harmless if found[name][1]} == set()
    assert {name for name in found.keys() - harmless if len(found[name][1]) != 1} == set(), found
    assert len(found) == 14 + 1 + 8
