"""The allow-list of devices, against the live XML that libvirt 9.0 gave for a guest of ours."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vmsandbox.errors import RefusedError
from vmsandbox.hypervisor.livexml import ExpectedDevices, check_live_xml
from vmsandbox.spec import Accelerator, GuestLimits

LIVE = (Path(__file__).parent / "data" / "live_q35.xml").read_text()
DATA, RUN = Path("/var/lib/vmsandbox"), Path("/run/vmsandbox/sample")


@dataclass(frozen=True)
class File:
    path: Path
    format: str


EXPECTED = ExpectedDevices(
    accelerator=Accelerator.TCG,
    uuid="4d1f6f0e-5d0c-4f6b-9a7e-3c1f7f1b2a11",
    machine="pc-q35-7.2",
    emulator="/usr/bin/qemu-system-x86_64",
    kernel=DATA / "images/base/kernel",
    initrd=DATA / "live/sample/initrd",
    cmdline="console=ttyS0 root=/dev/vda",
    disk_chain=(File(DATA / "live/sample/disk.qcow2", "qcow2"), File(DATA / "images/base/root.ext4", "raw")),
    channels={
        "org.vmsandbox.control": RUN / "control",
        "org.vmsandbox.ssh.0": RUN / "ssh.0",
        "org.vmsandbox.ssh.1": RUN / "ssh.1",
    },
    serial=("unix", RUN / "console"),
    qemu_args=(
        "-object", f"memory-backend-file,id=vmram,mem-path={DATA}/live/sample/ram,size=64M,share=on",
        "-machine", "memory-backend=vmram",
    ),
    balloon=True,
)  # fmt: skip

QEMU = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"


def added(parent: str, xml: str) -> str:
    """The live XML with one more element in `parent` ("." is the domain)."""
    tree = ET.fromstring(LIVE)
    place = tree.find(parent)
    assert place is not None
    place.append(ET.fromstring(xml))
    return ET.tostring(tree, encoding="unicode")


def changed(path: str, change: Callable[[ET.Element], None]) -> str:
    """The live XML with the element at `path` changed."""
    tree = ET.fromstring(LIVE)
    element = tree.find(path)
    assert element is not None
    change(element)
    return ET.tostring(tree, encoding="unicode")


def removed(parent: str, tag: str) -> str:
    """The live XML without the first `tag` in `parent`."""
    return changed(parent, lambda element: element.remove(element.find(tag)))  # type: ignore[arg-type]


def refusal(xml: str, expected: ExpectedDevices = EXPECTED) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        check_live_xml(xml, expected)
    return caught.value


def test_what_libvirt_made_of_our_own_xml_passes() -> None:
    check_live_xml(LIVE, EXPECTED)


@pytest.mark.parametrize(
    "xml",
    [
        "<interface type='network'><source network='default'/></interface>",
        "<interface type='user'><model type='virtio'/></interface>",
        "<hostdev mode='subsystem' type='pci' managed='yes'/>",
        "<filesystem type='mount'><source dir='/'/><target dir='host'/></filesystem>",
        "<redirdev bus='usb' type='spicevmc'/>",
        "<graphics type='vnc' port='5900'/>",
        "<video><model type='virtio'/></video>",
        "<sound model='ich9'/>",
        "<audio id='2' type='file'/>",
        "<shmem name='share'/>",
        "<tpm model='tpm-crb'><backend type='emulator'/></tpm>",
        "<vsock model='virtio'><cid auto='no' address='3'/></vsock>",
        "<smartcard mode='host'/>",
        "<parallel type='dev'><source path='/dev/parport0'/></parallel>",
        "<panic model='pvpanic'/>",
        "<iommu model='intel'/>",
        "<memory model='nvdimm'><source><path>/etc/shadow</path></source></memory>",
        "<watchdog model='itco' action='dump'/>",
        "<watchdog model='i6300esb' action='reset'/>",
        "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event0'/></input>",
        "<input type='tablet' bus='usb'/>",
        "<controller type='usb' model='qemu-xhci'/>",
        "<controller type='scsi' model='virtio-scsi'/>",
        "<controller type='pci' model='pcie-to-pci-bridge'/>",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        "<disk type='file' device='disk'><source file='/etc/shadow'/><target bus='virtio'/></disk>",
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>",
        "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>",
        "<channel type='unix'><source mode='bind' path='/x'/><target type='virtio' name='other'/></channel>",
        "<serial type='tcp'><source mode='bind' host='0.0.0.0' service='1'/></serial>",
        "<console type='pty'><target type='virtio'/></console>",
        "<somethingnew/>",
    ],
)
def test_a_foreign_device_is_refused_and_named(xml: str) -> None:
    error = refusal(added("devices", xml))
    tag = xml[1:].split("/")[0].split(" ")[0].rstrip(">")
    assert tag in error.details
    assert error.exit_code == 126


@pytest.mark.parametrize(
    ("parent", "xml"),
    [
        (".", "<launchSecurity type='sev'/>"),
        (".", "<memoryBacking><access mode='shared'/></memoryBacking>"),
        (".", "<devices/>"),
        (".", f"<qemu:override {QEMU}><qemu:device alias='x'/></qemu:override>"),
        (".", f"<qemu:capabilities {QEMU}><qemu:add capability='x'/></qemu:capabilities>"),
        (".", f"<qemu:commandline {QEMU}><qemu:arg value='-snapshot'/></qemu:commandline>"),
        (".", f"<qemu:capabilities {QEMU}><qemu:add capability='cpu-unavailable-features'/></qemu:capabilities>"),
        (".", f"<qemu:capabilities {QEMU}><qemu:del capability='sandbox'/></qemu:capabilities>"),
        (".", f"<qemu:commandline {QEMU}><qemu:env name='LD_PRELOAD' value='/x'/></qemu:commandline>"),
        ("os", "<loader type='pflash'>/x</loader>"),
        ("os", "<acpi><table type='slic'>/etc/shadow</table></acpi>"),
        ("features", "<hyperv/>"),
        ("devices/disk", "<mirror type='file'><source file='/x'/></mirror>"),
        ("devices/disk", "<shareable/>"),
        ("devices/disk/source", "<encryption format='luks'/>"),
        ("devices/channel", "<log file='/etc/cron.d/x'/>"),
        ("devices/channel/source", "<reconnect enabled='yes'/>"),
        ("devices/serial", "<log file='/x'/>"),
        ("devices/memballoon", "<source/>"),
    ],
)
def test_an_unknown_element_anywhere_is_refused(parent: str, xml: str) -> None:
    refusal(added(parent, xml))


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        (".", "type", "kvm"),
        ("os/type", "machine", "pc-i440fx-7.2"),
        ("os/boot", "dev", "network"),
        ("devices/disk", "device", "lun"),
        ("devices/disk", "type", "block"),
        ("devices/disk/driver", "type", "raw"),
        ("devices/disk/source", "file", "/etc/shadow"),
        ("devices/disk/source", "startupPolicy", "optional"),
        ("devices/disk/target", "bus", "sata"),
        ("devices/disk/backingStore", "type", "network"),
        ("devices/disk/backingStore/format", "type", "qcow2"),
        ("devices/disk/backingStore/source", "file", "/etc/shadow"),
        ("devices/channel/source", "path", "/run/other"),
        ("devices/channel/source", "mode", "connect"),
        ("devices/channel/target", "type", "guestfwd"),
        ("devices/channel/target", "name", "org.qemu.guest_agent.0"),
        ("devices/serial", "type", "pty"),
        ("devices/serial/source", "path", "/run/other"),
        ("devices/serial/source", "mode", "connect"),
        ("devices/console/source", "path", "/run/other"),
        ("devices/console/target", "type", "virtio"),
        ("devices/memballoon", "model", "xen"),
    ],
)
def test_a_changed_attribute_is_refused(path: str, attribute: str, value: str) -> None:
    refusal(changed(path, lambda element: element.set(attribute, value)))


@pytest.mark.parametrize("path", ["uuid", "os/type", "os/kernel", "os/initrd", "os/cmdline", "devices/emulator"])
def test_a_changed_text_is_refused(path: str) -> None:
    refusal(changed(path, lambda element: setattr(element, "text", "/other")))


@pytest.mark.parametrize(
    ("parent", "tag"),
    [
        (".", "os"),
        (".", "devices"),
        ("os", "kernel"),
        ("devices", "disk"),
        ("devices", "serial"),
        ("devices", "channel"),
        ("devices/disk", "driver"),
        ("devices/disk", "backingStore"),
        ("devices/channel", "source"),
        ("devices/serial", "source"),
        (".", "{http://libvirt.org/schemas/domain/qemu/1.0}commandline"),
    ],
)
def test_something_missing_is_refused(parent: str, tag: str) -> None:
    refusal(removed(parent, tag))


def test_another_order_of_qemus_arguments_is_refused() -> None:
    refusal(LIVE, replace(EXPECTED, qemu_args=(*EXPECTED.qemu_args[2:], *EXPECTED.qemu_args[:2])))


def test_a_longer_chain_of_files_is_refused() -> None:
    refusal(LIVE, replace(EXPECTED, disk_chain=EXPECTED.disk_chain[:1]))


def test_what_newer_libvirt_and_hosts_with_apparmor_add_passes() -> None:
    check_live_xml(added("devices", "<watchdog model='itco' action='reset'/>"), EXPECTED)
    label = "<seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-x</label></seclabel>"
    check_live_xml(added(".", label), EXPECTED)


def test_a_generator_is_only_allowed_from_urandom() -> None:
    expected = replace(EXPECTED, rng=True)
    rng = "<rng model='virtio'><backend model='random'>{}</backend></rng>"
    check_live_xml(added("devices", rng.format("/dev/urandom")), expected)
    refusal(added("devices", rng.format("/etc/shadow")), expected)
    refusal(LIVE, expected)


def test_xml_that_cannot_be_read_is_refused() -> None:
    refusal(LIVE[:-20])


def test_all_differences_are_listed() -> None:
    xml = added("devices", "<sound model='ich9'/>").replace("/var/lib/vmsandbox/images/base/kernel", "/k")
    details = refusal(xml).details
    assert "sound" in details
    assert "'/k'" in details


def test_a_balloon_that_nobody_asked_for_is_refused() -> None:
    assert "memballoon" in refusal(LIVE, replace(EXPECTED, balloon=False)).details
    none = changed("devices/memballoon", lambda element: element.set("model", "none"))
    check_live_xml(none, replace(EXPECTED, balloon=False))
    assert "memballoon" in refusal(none).details


SLICES = "<slices><slice type='storage' offset='0' size='{}'/></slices>"
TUNED = "<iotune><write_bytes_sec>{}</write_bytes_sec>{}</iotune>"


def limited_disk(size: int | None, rate: int | None, more: str = "", policy: str | None = "report") -> str:
    def change(disk: ET.Element) -> None:
        source, driver = disk.find("source"), disk.find("driver")
        assert source is not None and driver is not None
        if size is not None:
            source.append(ET.fromstring(SLICES.format(size)))
        if policy is not None:
            driver.set("error_policy", policy)
        if rate is not None:
            disk.append(ET.fromstring(TUNED.format(rate, more)))

    return changed("devices/disk", change)


def test_the_limits_of_the_disk_are_exactly_those_asked_for() -> None:
    wanted = replace(EXPECTED, limits=GuestLimits(disk_bytes=1 << 30, write_rate=5_000_000))
    check_live_xml(limited_disk(1 << 30, 5_000_000), wanted)
    for xml, what in (
        (LIVE, "part of the disk's file"),
        (limited_disk(1 << 31, 5_000_000), "part of the disk's file"),
        (limited_disk(1 << 30, None), "rates of the disk"),
        (limited_disk(1 << 30, 6_000_000), "rates of the disk"),
        (limited_disk(1 << 30, 5_000_000, "<write_bytes_sec_max>9</write_bytes_sec_max>"), "rates of the disk"),
        (limited_disk(1 << 30, 5_000_000, policy=None), "error policy"),
    ):
        assert what in refusal(xml, wanted).details
    assert "part of the disk's file" in refusal(limited_disk(1 << 30, None)).details, "nobody asked for it"
    backing = changed("devices/disk/backingStore/source", lambda e: e.append(ET.fromstring(SLICES.format(1))))
    assert "slices" in refusal(backing).details
