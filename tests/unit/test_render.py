"""What is rendered, compared with golden files: a change of the domain or the seed is seen in review."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vmsandbox.errors import HostError
from vmsandbox.paths import resource_folder
from vmsandbox.render.domain import DiskImage, DomainPlan, render_domain
from vmsandbox.render.seed import render_seed
from vmsandbox.spec import Accelerator, GuestLimits, GuestShape

Golden = Callable[[str, str], None]
HOME = Path("/var/lib/vmsandbox")

FORK = DomainPlan(
    name="vmsandbox-demo-1a2b3c",
    uuid="11111111-2222-4333-8444-555555555555",
    genid="66666666-7777-4888-9999-aaaaaaaaaaaa",
    shape=GuestShape(Accelerator.TCG, vcpus=2, memory_mib=512, ssh_ports=2),
    machine="pc-q35-7.2",
    emulator="/usr/bin/qemu-system-x86_64",
    kernel=HOME / "images/base/0123456789abcdef/vmlinuz",
    initrd=HOME / "templates/key/initrd",
    disk_chain=(
        DiskImage(HOME / "live/demo/vm/disk.qcow2", "qcow2"),
        DiskImage(HOME / "templates/key/disk.qcow2", "qcow2"),
        DiskImage(HOME / "images/base/0123456789abcdef/root.ext4", "raw"),
    ),
    run_folder=Path("/run/vmsandbox/demo"),
    ram=Path("/proc/4242/fd/7"),
    ram_share=False,
    ram_readonly=False,
    incoming=True,
    session_id="20260102-150405-demo-1a2b3c",
    home=HOME / "live",
    run_as=(0x70000001, 64055),
)
VARIANTS = {
    "fork-sealed": FORK,
    "fork-copied": dataclasses.replace(FORK, ram=HOME / "live/demo/vm/ram", run_as=None),
    "fork-readonly": dataclasses.replace(FORK, ram=HOME / "templates/key/ram", ram_readonly=True),
    "fork-kvm": dataclasses.replace(FORK, shape=dataclasses.replace(FORK.shape, accelerator=Accelerator.KVM)),
    "fork-limited": dataclasses.replace(
        FORK,
        shape=dataclasses.replace(FORK.shape, balloon=True),
        limits=GuestLimits(disk_bytes=1 << 30, write_rate=50 << 20, memory_reserved_mib=256),
    ),
    "template": dataclasses.replace(
        FORK,
        name="vmsandbox-template-11111111",
        disk_chain=FORK.disk_chain[1:],
        ram=HOME / "templates/.making-1/ram",
        ram_share=True,
        incoming=False,
        session_id="template:.making-1",
        home=HOME / "templates",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_domain(golden: Golden, name: str) -> None:
    golden(f"domain-{name}.xml", render_domain(VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_domain_has_a_way_out(name: str) -> None:
    """Beside the golden files: they could be written anew without anybody looking."""
    devices = ET.fromstring(render_domain(VARIANTS[name])).find("devices")
    assert devices is not None
    kinds = {element.tag for element in devices}
    assert kinds == {"emulator", "disk", "controller", "serial", "channel", "memballoon"}
    for source in devices.iter("source"):
        assert set(source.attrib) <= {"file", "mode", "path"}
    assert all(element.get("type") in ("raw", "qcow2") for element in devices.iter("format"))


def test_a_fork_and_its_template_have_the_same_devices() -> None:
    """QEMU's state fits only the same devices in the same order."""

    def devices(plan: DomainPlan) -> list[tuple[str, str | None]]:
        tree = ET.fromstring(render_domain(plan)).find("devices")
        assert tree is not None
        return [(element.tag, element.get("type")) for element in tree]

    assert devices(VARIANTS["template"]) == devices(VARIANTS["fork-sealed"])


def test_hostile_names_are_data() -> None:
    name = "</name><devices><interface type='user'/></devices>&\"'"
    path = Path("/x,id=evil,share=on/<&>'\"/ram")
    plan = dataclasses.replace(FORK, name=name, ram=path, run_folder=path)
    tree = ET.fromstring(render_domain(plan))
    assert tree.findtext("name") == name
    assert list(tree.iter("interface")) == []
    sources = [element.get("path") for element in tree.iter("source") if element.get("path")]
    assert all(source.startswith(str(path)) for source in sources if source)
    # QEMU's option syntax: a comma in a value is written twice, or it would begin an option of the path's choice.
    backend = plan.qemu_args[1]
    assert "mem-path=/x,,id=evil,,share=on/" in backend


def test_seed(golden: Golden) -> None:
    seed = render_seed(resource_folder("cloudinit"), FORK.shape)
    assert set(seed) == {"user-data", "meta-data"}
    golden("seed-user-data.yaml", seed["user-data"].decode())
    golden("seed-meta-data.json", seed["meta-data"].decode())


def test_the_seed_makes_a_worker_without_powers() -> None:
    seed = render_seed(resource_folder("cloudinit"), FORK.shape)
    assert seed["user-data"].startswith(b"#cloud-config\n")
    data = yaml.safe_load(seed["user-data"])
    (user,) = data["users"]
    assert user["name"] == "claude-worker"
    assert "sudo" not in user and "groups" not in user and "doas" not in user
    assert user["hashed_passwd"] in ("*", "!", "!*")
    assert "ssh_authorized_keys" not in user, "keys belong to sessions, never to a template"
    assert data["disable_root"] is True and data["ssh_pwauth"] is False
    assert not [file for file in data["write_files"] if "PRIVATE KEY" in file["content"]]
    assert json.loads(seed["meta-data"])["instance-id"]


def test_as_many_ssh_ports_as_the_shape_has() -> None:
    for ports in (1, 6, 28):
        seed = render_seed(resource_folder("cloudinit"), dataclasses.replace(FORK.shape, ssh_ports=ports))
        files = {file["path"]: file["content"] for file in yaml.safe_load(seed["user-data"])["write_files"]}
        target = files["/etc/systemd/system/vmsandbox.target"]
        assert target.count("Wants=vmsandbox-ssh@") == ports
        assert f"vmsandbox-ssh@{ports - 1}.service" in target


def test_a_damaged_installation_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="damaged"):
        render_seed(tmp_path, FORK.shape)
    (tmp_path / "user-data.yaml").write_text("{ not yaml")
    (tmp_path / "files.yaml").write_text("[]")
    with pytest.raises(HostError, match="damaged"):
        render_seed(tmp_path, FORK.shape)
