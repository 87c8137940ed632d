"""A guest's libvirt domain XML, built as data.

Pure: the same `DomainPlan` gives the same text, and golden files in tests/golden show it. Templates and forks come
from the same function, because QEMU's migration stream only fits a machine with the same devices in the same order.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.spec import NO_LIMITS, Accelerator, GuestLimits, GuestShape

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
METADATA_NS = "https://vmsandbox.dev/xmlns/session/1"
TB_CACHE_MIB = 56
UNUSED_CAPABILITY = "cpu-unavailable-features"
DISK_TARGET = "vda"
CONTROL_CHANNEL = "org.vmsandbox.control"
CARD_BUS = 4  # the disk, the ports and the balloon have 1 to 3
SSH_CHANNEL = "org.vmsandbox.ssh."
BULK_CHANNEL = "org.vmsandbox.bulk"
ASK_CHANNEL = "org.vmsandbox.ask"

# quiet: a serial line under emulation costs seconds. The rest spares work that a throwaway guest has no use for.
KERNEL_CMDLINE = (
    "console=ttyS0 quiet panic=-1 root=/dev/vda rw net.ifnames=0 audit=0 "
    "systemd.show_status=0 systemd.log_level=warning rd.udev.log_level=3 mitigations=off"
)
# QEMU's emulator finds translated code by its virtual address too: where each start of a program shuffles addresses,
# it translates loader and C library again, which makes that four times as slow. KVM guests keep the shuffling.
_EMULATED_CMDLINE = f"{KERNEL_CMDLINE} norandmaps"


@dataclass(frozen=True)
class DiskImage:
    """One file of a disk's chain: its path and format, named so that no tool ever probes it."""

    path: Path
    format: str


@dataclass(frozen=True)
class DomainPlan:
    """Everything that a domain's XML says.

    disk_chain   the disk's files, the writable one first, then what backs it
    ram          file behind the guest's memory; `ram_share` on: the guest's writes go to it (a template being
                 made); off: writes stay private to the process (a fork)
    ram_readonly open it read-only (QEMU 8.2 and newer can)
    incoming     wait for a device state instead of booting
    home         folder of the live sessions that this guest belongs to
    run_as       (uid, gid) of the QEMU process, where libvirt may choose; None leaves it to libvirt
    other_cmdline   the kernel's command line, if not the usual one
    limits       of the writable disk; a template has none
    """

    name: str
    uuid: str
    genid: str
    shape: GuestShape
    machine: str
    emulator: str
    kernel: Path
    initrd: Path
    disk_chain: tuple[DiskImage, ...]
    run_folder: Path
    ram: Path
    ram_share: bool
    ram_readonly: bool
    incoming: bool
    session_id: str
    home: Path
    run_as: tuple[int, int] | None = None
    other_cmdline: str | None = None
    limits: GuestLimits = NO_LIMITS

    @property
    def cmdline(self) -> str:
        """The kernel's command line."""
        usual = KERNEL_CMDLINE if self.shape.accelerator is Accelerator.KVM else _EMULATED_CMDLINE
        return self.other_cmdline or usual

    @property
    def control_socket(self) -> Path:
        """Host end of the port on which the guest's control program listens."""
        return self.run_folder / "control"

    def ssh_socket(self, port: int) -> Path:
        """Host end of SSH port number `port`."""
        return self.run_folder / f"ssh.{port}"

    @property
    def bulk_socket(self) -> Path:
        """Host end of the port through which a project goes in (`vmsandbox.guest.bulk`)."""
        return self.run_folder / "bulk"

    @property
    def ask_socket(self) -> Path:
        """Host end of the port on which the guest asks a person about a command (`vmsandbox.guest.ask`)."""
        return self.run_folder / "ask"

    @property
    def console_socket(self) -> Path:
        """Host end of the serial console."""
        return self.run_folder / "console"

    @property
    def channels(self) -> dict[str, Path]:
        """Every virtio-serial port: its name in the guest and its socket on the host."""
        ports = {f"{SSH_CHANNEL}{number}": self.ssh_socket(number) for number in range(self.shape.ssh_ports)}
        more = {BULK_CHANNEL: self.bulk_socket, ASK_CHANNEL: self.ask_socket}
        return {CONTROL_CHANNEL: self.control_socket, **ports, **more}

    @property
    def qemu_args(self) -> tuple[str, ...]:
        """The arguments that libvirt has no XML for: memory in a file of ours, and waiting for a state.

        A comma in a path is doubled, as QEMU's option syntax wants it.
        """
        path = str(self.ram).replace(",", ",,")
        backend = f"memory-backend-file,id=vmram,mem-path={path},size={self.shape.memory_mib}M"
        backend += f",share={'on' if self.ram_share else 'off'}"
        if self.ram_readonly:
            backend += ",readonly=on,rom=off"
        args = ("-object", backend, "-machine", "memory-backend=vmram")
        return (*args, "-incoming", "defer") if self.incoming else args


def render_domain(plan: DomainPlan) -> str:
    """The domain XML of a plan (https://libvirt.org/formatdomain.html), indented."""
    ET.register_namespace("qemu", QEMU_NS)
    ET.register_namespace("vmsandbox", METADATA_NS)
    kvm = plan.shape.accelerator is Accelerator.KVM
    domain = ET.Element("domain", {"type": "kvm" if kvm else "qemu"})
    _text(domain, "name", plan.name)
    _text(domain, "uuid", plan.uuid)
    _text(domain, "genid", plan.genid)
    metadata = ET.SubElement(domain, "metadata")
    # home: another installation's `gc` on this host leaves this guest alone
    ET.SubElement(metadata, f"{{{METADATA_NS}}}session", {"id": plan.session_id, "home": str(plan.home)})
    _text(domain, "memory", str(plan.shape.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(plan.shape.vcpus))
    system = ET.SubElement(domain, "os")
    _text(system, "type", "hvm", arch="x86_64", machine=plan.machine)
    _text(system, "kernel", str(plan.kernel))
    _text(system, "initrd", str(plan.initrd))
    _text(system, "cmdline", plan.cmdline)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if not kvm:
        # Translated code takes 70 MiB after one login otherwise, and grows to QEMU's default of a gigabyte.
        _text(ET.SubElement(features, "tcg"), "tb-cache", str(TB_CACHE_MIB), unit="MiB")
    _cpu(domain, kvm)
    ET.SubElement(domain, "clock", {"offset": "utc"})
    for occasion in ("on_poweroff", "on_reboot", "on_crash"):
        _text(domain, occasion, "destroy")
    _devices(domain, plan)
    if plan.run_as is not None:
        # relabel no, on purpose: libvirt would give the shared image, kernel and initramfs to the QEMU user, who
        # could then write them. What QEMU may write is given to it by us.
        label = ET.SubElement(domain, "seclabel", {"type": "static", "model": "dac", "relabel": "no"})
        _text(label, "label", f"+{plan.run_as[0]}:+{plan.run_as[1]}")
    commandline = ET.SubElement(domain, f"{{{QEMU_NS}}}commandline")
    for argument in plan.qemu_args:
        ET.SubElement(commandline, f"{{{QEMU_NS}}}arg", {"value": argument})
    # libvirt would ask for every property of the processor, one by one (some 400), and QEMU reads what it is asked
    # byte by byte: a fifth of a second. Without this capability it asks once for all feature words.
    capabilities = ET.SubElement(domain, f"{{{QEMU_NS}}}capabilities")
    ET.SubElement(capabilities, f"{{{QEMU_NS}}}del", {"capability": UNUSED_CAPABILITY})
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def _cpu(domain: ET.Element, kvm: bool) -> None:
    if kvm:
        cpu = ET.SubElement(domain, "cpu", {"mode": "host-passthrough", "check": "none", "migratable": "on"})
        switched = {"vmx": "disable", "svm": "disable"}  # no guests in the guest: a smaller surface
    else:
        # Not `maximum`: the C library would choose AVX code, which emulation runs slowest. x86-64-v2 and AES.
        cpu = ET.SubElement(domain, "cpu", {"mode": "custom", "match": "exact", "check": "none"})
        _text(cpu, "model", "Westmere", fallback="forbid")
        # cx16: QEMU 7.2's emulation of an interrupted cmpxchg16b corrupts RFLAGS, and Linux 6.12 panics.
        switched = {"cx16": "disable", "rdrand": "require", "vmx": "disable"}
    for name, policy in switched.items():
        ET.SubElement(cpu, "feature", {"policy": policy, "name": name})


def _devices(domain: ET.Element, plan: DomainPlan) -> None:
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", plan.emulator)
    _disk(devices, plan.disk_chain, plan.limits)
    ET.SubElement(devices, "controller", {"type": "usb", "model": "none"})
    ports = str(len(plan.channels) + 1)
    ET.SubElement(devices, "controller", {"type": "virtio-serial", "index": "0", "ports": ports})
    if plan.shape.card:
        # The slot that a fork's card is plugged into: libvirt gives q35 as many as there are devices, none to spare.
        ET.SubElement(devices, "controller", {"type": "pci", "index": str(CARD_BUS), "model": "pcie-root-port"})
    # A socket that nobody reads drops what the guest writes: a flood on the console fills no disk.
    serial = ET.SubElement(devices, "serial", {"type": "unix"})
    ET.SubElement(serial, "source", {"mode": "bind", "path": str(plan.console_socket)})
    ET.SubElement(serial, "target", {"port": "0"})
    for number, (name, socket) in enumerate(plan.channels.items(), start=1):
        channel = ET.SubElement(devices, "channel", {"type": "unix"})
        ET.SubElement(channel, "source", {"mode": "bind", "path": str(socket)})
        ET.SubElement(channel, "target", {"type": "virtio", "name": name})
        address = {"type": "virtio-serial", "controller": "0", "bus": "0", "port": str(number)}
        ET.SubElement(channel, "address", address)
    if plan.shape.balloon:
        # autodeflate: a guest that runs out of memory takes back what was taken from it, up to all of its own.
        balloon = {"model": "virtio", "autodeflate": "on", "freePageReporting": "on"}
        ET.SubElement(devices, "memballoon", balloon)
    else:
        # Not there, on purpose: it can give nothing back of memory that forks share, and a hostile guest could make
        # QEMU write a line into its log for each page that it tries.
        ET.SubElement(devices, "memballoon", {"model": "none"})


def _disk(devices: ET.Element, chain: tuple[DiskImage, ...], limits: GuestLimits) -> None:
    top, *backing = chain
    disk = ET.SubElement(devices, "disk", {"type": "file", "device": "disk"})
    # unsafe: a throwaway disk needs no flushes; a template's is flushed once, when it is frozen.
    driver = {"name": "qemu", "type": top.format, "cache": "unsafe", "discard": "unmap"}
    if limits.disk_bytes is not None:
        driver["error_policy"] = "report"  # to the guest, which goes on with what it has; by default it would stop
    ET.SubElement(disk, "driver", driver)
    source = _source(disk, top.path)
    if limits.disk_bytes is not None:
        # QEMU sees no more of the file than this: what would be written beyond it is an error of the guest's disk.
        slices = ET.SubElement(source, "slices")
        ET.SubElement(slices, "slice", {"type": "storage", "offset": "0", "size": str(limits.disk_bytes)})
    parent = disk
    for image in backing:
        parent = ET.SubElement(parent, "backingStore", {"type": "file"})
        ET.SubElement(parent, "format", {"type": image.format})
        _source(parent, image.path)
    ET.SubElement(parent, "backingStore")  # ends the chain: nothing is probed
    ET.SubElement(disk, "target", {"dev": DISK_TARGET, "bus": "virtio"})
    if limits.write_rate is not None:
        _text(ET.SubElement(disk, "iotune"), "write_bytes_sec", str(limits.write_rate))


def _source(parent: ET.Element, path: Path) -> ET.Element:
    return ET.SubElement(parent, "source", {"file": str(path)})


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element
