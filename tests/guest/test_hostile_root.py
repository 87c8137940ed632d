"""The guest's root does its worst: image, template and the next session are as if it had not been there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import words_of
from netted import reaching
from rooted import RootedGuest

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import sha256_of


@pytest.fixture(scope="module")
def hostile(make_rooted: Callable[[], RootedGuest]) -> RootedGuest:
    """The guest that is attacked from; what breaks it comes last."""
    return make_rooted()


def test_no_tool_of_the_host_guesses_a_format(hostile: RootedGuest) -> None:
    """Each file of the disk's chain is named with its format, so a header that the guest wrote means nothing."""
    words = words_of(Path(f"/proc/{hostile.qemu}/cmdline"))
    nodes = [json.loads(word) for word in words if word.startswith('{"') and '"driver"' in word and "node-name" in word]
    formats = {node["node-name"]: node for node in nodes}
    top = [node for node in nodes if node["node-name"].endswith("-format")]
    # the session's, the tailored template's, its base's, the image
    assert sorted(node["driver"] for node in top) == ["qcow2", "qcow2", "qcow2", "raw"]
    for node in top:
        if node["driver"] == "raw" or "backing" in node:
            continue
        raise AssertionError(f"QEMU would look for its own backing file: {node}")
    assert formats


def test_the_process_that_runs_it_has_no_rights(hostile: RootedGuest) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{hostile.qemu}/status").read_text().splitlines() if ":\t" in line
    )
    assert "0" not in status["Uid"].split(), "QEMU runs as root"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    sandbox = words_of(Path(f"/proc/{hostile.qemu}/cmdline"))
    assert any("elevateprivileges=deny" in word and "spawn=deny" in word for word in sandbox)
    # What it may write is its own: nothing that another session reads.
    for entry in os.scandir(f"/proc/{hostile.qemu}/fd"):
        target = os.readlink(entry.path)
        if target.startswith(str(hostile.cli.home)) and _writable(hostile.qemu, entry.name):
            assert target.startswith((str(hostile.folder.path), str(hostile.folder.run))), target


def test_root_cannot_bring_a_network_card_up_or_reach_the_host(hostile: RootedGuest) -> None:
    hostile.root(
        "ip link add dummy0 type dummy && ip addr add 10.0.2.15/24 dev dummy0 && ip link set dummy0 up", check=False
    )
    assert hostile.root(reaching("10.0.2.2/22", "192.168.122.1/22", "169.254.169.254/22")) == ""
    vsock = "import socket; s = socket.socket(socket.AF_VSOCK); s.settimeout(3); s.connect((2, 22))"
    hostile.root(f'! python3 -c "{vsock}" 2>/dev/null')


def test_root_cannot_flood_the_host_through_its_console(hostile: RootedGuest) -> None:
    before = _size(hostile.folder.path) + _size(hostile.folder.run)
    resident = _resident(hostile.qemu)
    hostile.root(
        "timeout 3 sh -c 'cat /dev/zero > /dev/ttyS0 & cat /dev/urandom > /dev/hvc0 2>/dev/null & wait'; true",
        check=False,
    )
    assert _size(hostile.folder.path) + _size(hostile.folder.run) - before < 64 << 20
    assert _resident(hostile.qemu) - resident < 300 << 10, "KiB"
    assert hostile.root("echo answers") == "answers"


def changed_files(guest: RootedGuest) -> list[str]:
    """Files that its sessions share and that are not, byte for byte, what their template's manifest says."""
    found, key = [], guest.info.template
    while key:
        folder = guest.cli.layout.templates / key
        manifest = json.loads((folder / "manifest.json").read_text())
        found += [f"{key}/{name}" for name, digest in manifest["digests"].items() if sha256_of(folder / name) != digest]
        key = manifest.get("base")
    return found


def test_root_writes_all_over_and_the_next_fork_is_clean(
    hostile: RootedGuest, make_rooted: Callable[[], RootedGuest]
) -> None:
    guest = hostile
    assert guest.root("id -u") == "0", "or the test shows nothing"
    guest.root("echo marked-by-root > /etc/marked; sync; echo 3 > /proc/sys/vm/drop_caches")
    # Memory: fill nearly all of it with a pattern, so that pages of the template are overwritten.
    guest.root("mkdir -p /mnt/m; mount -t tmpfs -o size=90% m /mnt/m; yes HOSTILE | head -c 150M > /mnt/m/fill; true")
    # Balloon: QEMU would blank what a guest gives back. There is none unless a policy asks for it.
    host = Host.open()
    try:
        with pytest.raises(HostError):
            host.qmp(guest.info.uuid, "balloon", {"value": 200 << 20})
    finally:
        host.close()
    # Disk: a qcow2 header that names a file of the host, over the file system's start, then everything else.
    header = "514649fb00000003000000000000002000000000000b" + "00" * 10 + "2f6574632f736861646f77"
    guest.root(f"python3 -c \"open('/dev/vda','r+b').write(bytes.fromhex('{header}'))\"")
    guest.root("dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=24 conv=notrunc,fsync 2>&1", check=False)
    assert changed_files(guest) == []
    fresh = make_rooted()
    assert fresh.info.template == guest.info.template
    assert fresh.root("cat /etc/marked 2>&1; true").endswith("No such file or directory")
    assert fresh.root("head -c 4 /dev/vda | od -An -tx1; grep -c HOSTILE /proc/mounts; true") == "00 00 00 00\n0"
    # The old one is stopped and looked for, with its disk full of lies: nothing on the host probes it.
    guest.stop()
    assert not guest.folder.path.exists()
    fresh.cli("image", "verify", fresh.info.image)
    fresh.stop()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def _writable(pid: int, descriptor: str) -> bool:
    flags = int(Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0], 8)
    return flags & os.O_ACCMODE != os.O_RDONLY
