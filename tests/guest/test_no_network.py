"""Guarantee 1: no network card means no network card, in the live XML and in the guest."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from harness import Cli, Guest

from vmsandbox.errors import RefusedError
from vmsandbox.hypervisor.connection import Host, default_uri
from vmsandbox.hypervisor.fork import DOMAIN_PREFIX
from vmsandbox.hypervisor.livexml import ExpectedDevices, check_live_xml
from vmsandbox.render.domain import DiskImage
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.opening import inspection
from vmsandbox.session.sandbox import Sandbox

CONNECT = """
import socket, sys, time
for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "10.0.2.2"),
                        (socket.AF_INET, "169.254.169.254")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        began = time.monotonic()
        with socket.socket(family, kind) as sock:
            sock.settimeout(5)
            try:
                sock.connect((address, 80))
                print(address, "REACHED")
            except OSError as error:
                print(address, error.strerror, "slow" if time.monotonic() - began > 2 else "at once")
"""


def live(guest: Guest) -> str:
    host = Host.open()
    try:
        return host.live_xml(guest.info.uuid)
    finally:
        host.close()


def test_the_live_xml_has_no_interface_and_no_way_to_the_host(guest: Guest) -> None:
    devices = ET.fromstring(live(guest)).find("devices")
    assert devices is not None
    assert len(devices.findall("disk")) == 1
    for kind in ("interface", "filesystem", "hostdev", "redirdev", "smartcard", "shmem", "vsock", "graphics", "tpm"):
        assert devices.findall(kind) == [], kind


def test_the_guest_has_only_a_loopback(guest: Guest) -> None:
    assert guest.sh("ls /sys/class/net") == "lo"
    assert [line.split()[0] for line in guest.sh("ip -br link").splitlines()] == ["lo"]
    assert guest.sh("ip route; ip -6 route show table main") == ""
    assert guest.sh("grep -l 0x02.... /sys/bus/pci/devices/*/class", status=None) == "", "a PCI network card"


def test_nothing_is_reached_and_the_answer_comes_at_once(guest: Guest) -> None:
    lines = guest.run("python3", "-c", CONNECT).stdout.decode().splitlines()
    assert len(lines) == 8
    assert all("unreachable" in line and line.endswith("at once") for line in lines), lines


def test_names_are_not_resolved(guest: Guest) -> None:
    guest.run("timeout", "5", "getent", "hosts", "example.com", status=2)


HOTPLUGGED = {
    "interface": "<interface type='user'><model type='virtio'/></interface>",
    "rng": "<rng model='virtio'><backend model='random'>/dev/random</backend></rng>",
}


@pytest.mark.parametrize("device", ["interface", "rng"])
def test_a_device_that_another_tool_plugs_in_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Plugged in by virsh while the guest is still paused, as a hook of libvirt's could do it."""
    done = []

    def plug_first(live_xml: str, expected: ExpectedDevices) -> None:
        check_live_xml(live_xml, expected)
        subprocess.run(
            ["virsh", "-c", default_uri(), "attach-device", expected.uuid, "/dev/stdin", "--live"],
            input=HOTPLUGGED[device].encode(), check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        done.append(device)
        host = Host.open()
        try:
            check_live_xml(host.live_xml(expected.uuid), expected)
        finally:
            host.close()

    monkeypatch.setattr(inspection, "check_live_xml", plug_first)
    with pytest.raises(RefusedError) as refused:
        Sandbox.open(request=SessionRequest(name="plugged", allow_emulation=True), layout=cli.layout)
    assert done == [device]
    assert device in refused.value.brief + refused.value.details
    assert refused.value.exit_code == 126


def test_the_check_accepts_exactly_this_guest(guest: Guest) -> None:
    """The same live XML with one wrong expectation is refused: the check looks at what runs."""
    info, folder, layout = guest.info, guest.folder, guest.cli.layout
    tree = ET.fromstring(live(guest))
    template, image = layout.templates / info.template, layout.images / info.image / info.image_digest[:16]
    expected = {
        "accelerator": _accelerator(tree),
        "uuid": info.uuid,
        "machine": tree.find("os/type").get("machine"),  # type: ignore[union-attr]
        "emulator": tree.findtext("devices/emulator"),
        "kernel": tree.findtext("os/kernel"),
        "initrd": template / "initrd",
        "cmdline": tree.findtext("os/cmdline"),
        "disk_chain": (
            DiskImage(folder.vm(info) / "disk.qcow2", "qcow2"),
            DiskImage(template / "disk.qcow2", "qcow2"),
            DiskImage(next(image.glob("root*")), "raw"),
        ),
        "channels": {
            "org.vmsandbox.ask": folder.run / "ask",
            "org.vmsandbox.bulk": folder.run / "bulk",
            "org.vmsandbox.control": folder.run / "control",
            **{f"org.vmsandbox.ssh.{number}": folder.run / f"ssh.{number}" for number in range(info.ssh_ports)},
        },
        "serial": ("unix", folder.run / "console"),
        "qemu_args": tuple(
            arg.get("value", "") for arg in tree.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")
        ),
    }
    check_live_xml(live(guest), ExpectedDevices(**expected))  # type: ignore[arg-type]
    for name, wrong in (
        ("uuid", "0" * 36),
        ("channels", {}),
        ("qemu_args", ()),
        ("disk_chain", expected["disk_chain"][:2]),
    ):  # type: ignore[index]
        with pytest.raises(RefusedError):
            check_live_xml(live(guest), ExpectedDevices(**{**expected, name: wrong}))  # type: ignore[arg-type]


def _accelerator(tree: ET.Element) -> object:
    from vmsandbox.spec import Accelerator

    return Accelerator.KVM if tree.get("type") == "kvm" else Accelerator.TCG


def test_qemu_has_no_network_on_its_command_line(guest: Guest) -> None:
    command = Path(f"/proc/{guest.qemu}/cmdline").read_bytes().split(b"\0")
    assert DOMAIN_PREFIX.encode() in b" ".join(command) and sys.platform == "linux"
    assert not [word for word in command if b"netdev" in word or b"-nic" in word or b"virtio-net" in word]
    # QEMU makes a default card unless it is told not to.
    assert b"-nodefaults" in command
