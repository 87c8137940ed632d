"""The doctor's check of the filtered card, on folders that look like hosts and on the host that runs the tests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmsandbox.errors import HostError, RefusedError
from vmsandbox.hypervisor.network import refuse_without_dnsmasq
from vmsandbox.paths import Layout
from vmsandbox.process import Finished, Programs
from vmsandbox.session.checks import Examined, Status
from vmsandbox.session.checks.card import check_card
from vmsandbox.session.network.filtered import open_card

SYSTEM = "qemu:///system"


class Told(Programs):
    """Programs that say what they are told to, by their first words; those in `missing` are not installed."""

    def __init__(self, missing: Sequence[str] = (), **said: str) -> None:
        self.missing, self.said, self.ran = missing, said, []

    def find(self, name: str) -> str | None:
        return None if name in self.missing else f"/usr/sbin/{name}"

    def run(self, argv: Any, **_options: Any) -> Finished:
        self.ran.append(list(argv))
        words = "_".join(argv).replace("-", "")
        found = next((text for name, text in self.said.items() if words.startswith(name)), "")
        if found == "fails":
            raise HostError(f"{argv[0]} failed", details="No such file or directory")
        return Finished(tuple(argv), 0, found.encode(), b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("sys/module/tun", "sys/module/bridge", "sys/module/nf_tables"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def examined(root: Path, programs: Programs, uid: int = 0, uri: str = SYSTEM) -> Examined:
    layout = Layout(**{field.name: root / field.name for field in fields(Layout)})
    return Examined(layout, programs, uri, uid=uid, root=root, kernel="6.1.0")


def test_a_host_with_all_of_it(root: Path) -> None:
    programs = Told()
    assert check_card(examined(root, programs)).status is Status.OK
    assert ["unshare", "-n", "nft", "-j", "-f", "-"] in programs.ran, "the rules are loaded, and not here"


def test_without_dnsmasq_there_is_no_card(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_card(examined(root, Told(missing=["dnsmasq"]))).packages == ("dnsmasq-base",)
    with pytest.raises(RefusedError, match="libvirtd crashes") as refused:
        refuse_without_dnsmasq(Told(missing=["dnsmasq"]))
    assert "dnsmasq-base" in refused.value.resolution
    refuse_without_dnsmasq(Told())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    host: Any = SimpleNamespace(uri=SYSTEM)
    nothing: Any = None
    with pytest.raises(RefusedError, match="libvirtd crashes"):
        open_card(nothing, nothing, Told(missing=["dnsmasq"]), host)


def test_others_than_root_are_told_that_it_is_not_for_them(root: Path) -> None:
    for uid, uri in ((1000, SYSTEM), (0, "qemu:///session")):
        check = check_card(examined(root, Told(), uid, uri))
        assert check.status is Status.OK and "root" in check.found


def test_what_is_missing_is_named_and_loaded(root: Path) -> None:
    (root / "sys/module/bridge").rmdir()
    programs = Told(["ip", "ebtables"])
    check = check_card(examined(root, programs))
    assert check.status is Status.WARN and check.packages == ("ebtables", "iproute2")
    assert "sudo modprobe bridge" in check.remedy and check.fix is not None
    assert check.fix() == "loaded bridge" and ["modprobe", "bridge"] in programs.ran
    assert check_card(examined(root, programs, uid=1000)).fix is None


def test_the_legacy_ebtables_is_refused(root: Path) -> None:
    check = check_card(examined(root, Told(ebtables="ebtables v2.0.11 (legacy) (December 2011)")))
    assert check.status is Status.WARN and "ebtables-nft" in check.remedy
    assert check_card(examined(root, Told(ebtables="ebtables 1.8.9 (nf_tables)"))).status is Status.OK


def test_a_kernel_that_does_not_take_the_rules(root: Path) -> None:
    check = check_card(examined(root, Told(unshare="fails")))
    assert check.status is Status.WARN and "No such file" in check.found and "nft_socket" in check.remedy


def test_a_firewall_that_drops_by_default(root: Path) -> None:
    chain = {"family": "ip", "table": "filter", "name": "INPUT", "hook": "input", "policy": "drop"}
    check = check_card(examined(root, Told(nft_j_list=json.dumps({"nftables": [{"chain": chain}]}))))
    assert check.status is Status.WARN and "ip filter INPUT" in check.found and "vmb+" in check.remedy
    let_in = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "vmb*"}}
    rule = {"rule": {"family": "ip", "table": "filter", "chain": "INPUT", "expr": [let_in, {"accept": None}]}}
    listed = json.dumps({"nftables": [{"chain": chain}, rule]})
    assert check_card(examined(root, Told(nft_j_list=listed))).status is Status.OK
    listed = json.dumps({"nftables": [{"chain": {**chain, "policy": "accept"}}]})
    assert check_card(examined(root, Told(nft_j_list=listed))).status is Status.OK


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nft") is None, reason="needs root and nft")
def test_on_this_host_it_says_something_and_leaves_nothing() -> None:
    programs = Programs()
    before = programs.run(["nft", "list", "tables"]).text
    check = check_card(Examined(Layout.from_environment({"VMSANDBOX_HOME": "/tmp/h"}), programs, SYSTEM))
    assert check.found
    assert "vmsandbox_" not in set(programs.run(["nft", "list", "tables"]).text.split()) - set(before.split())
