"""Compares the live domain XML of a guest with an allow-list of devices.

Without it a hook, another tool or a changed default could give the guest a network card, a folder of the host
or an argument of QEMU's that nobody asked for, and every promise about isolation would rest on what was
requested instead of what runs. Whatever is not known here is refused, by name: an element, a value, a path.

The XML is libvirt's own `virsh dumpxml` of the running domain (https://libvirt.org/formatdomain.html).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from vmsandbox.errors import RefusedError
from vmsandbox.hypervisor.expected import ChainFile, ExpectedDevices
from vmsandbox.render.domain import UNUSED_CAPABILITY
from vmsandbox.render.network import CardPlan, render_interface
from vmsandbox.spec import Accelerator, GuestLimits

__all__ = ["ExpectedDevices", "card_differences", "check_live_xml"]

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_DOMAIN_TYPE = {Accelerator.KVM: "kvm", Accelerator.TCG: "qemu"}

# Elements that say nothing about devices or files. A security label may be of any kind: whether it confines
# anything is read from the process (isolation.py), not from what is written here.
_HARMLESS = {
    "name", "uuid", "genid", "metadata", "memory", "currentMemory", "vcpu", "resource", "cpu", "clock",
    "on_poweroff", "on_reboot", "on_crash", "seclabel",
}  # fmt: skip
_FEATURES = {"acpi", "apic", "pae", "vmport", "tcg"}  # tcg: the size of the cache of translated code
_SYSTEM = {"type", "kernel", "initrd", "cmdline", "boot"}
_CONTROLLERS = {
    ("pci", "pcie-root"),
    ("pci", "pcie-root-port"),
    ("virtio-serial", None),
    ("sata", None),  # q35 has one; a disk on it would be refused
    ("usb", "none"),
}


def check_live_xml(live_xml: str, expected: ExpectedDevices) -> None:
    """Refuse a guest that has anything but what is expected, or lacks some of it.

    Raises:
        RefusedError: `brief` names the first difference, `details` has all of them.
    """
    try:
        domain = ET.fromstring(live_xml)  # noqa: S314 - written by libvirt on this host
    except ET.ParseError as error:
        raise RefusedError("the guest's live XML cannot be read", details=str(error)) from error
    differences = list(_domain(domain, expected))
    if differences:
        raise RefusedError(
            f"the running guest is not what was asked for: {differences[0]}",
            details="\n".join(differences),
            resolution="look for a libvirt hook (/etc/libvirt/hooks) or another tool that changes guests; "
            "the guest must not be used",
        )


def _domain(domain: ET.Element, expected: ExpectedDevices) -> Iterator[str]:
    yield from _differs("domain type", domain.get("type"), _DOMAIN_TYPE[expected.accelerator])
    yield from _differs("uuid", domain.findtext("uuid"), expected.uuid)
    yield from _exactly_one(domain, "os", "devices")
    for element in domain:
        if element.tag == "os":
            yield from _system(element, expected)
        elif element.tag == "features":
            yield from _only(element, _FEATURES)
        elif element.tag == "devices":
            yield from _devices(element, expected)
        elif element.tag == f"{_QEMU}capabilities":
            for one in element:
                if one.tag != f"{_QEMU}del" or dict(one.attrib) != {"capability": UNUSED_CAPABILITY}:
                    yield f"qemu:capabilities has more than what was asked for: {_shown(one)}"
        elif element.tag not in _HARMLESS and element.tag != f"{_QEMU}commandline":
            yield f"unknown element: {_shown(element)}"
    yield from _command_line(domain, expected)


def _command_line(domain: ET.Element, expected: ExpectedDevices) -> Iterator[str]:
    args = []
    for commandline in domain.findall(f"{_QEMU}commandline"):
        for element in commandline:
            if element.tag == f"{_QEMU}arg":
                args.append(element.get("value", ""))
            else:
                yield f"qemu:commandline has more than arguments: {_shown(element)}"
    yield from _differs("qemu:commandline", args, list(expected.qemu_args))


def _system(system: ET.Element, expected: ExpectedDevices) -> Iterator[str]:
    yield from _only(system, _SYSTEM)
    yield from _attributes(system)
    yield from _exactly_one(system, "type", "kernel", "initrd", "cmdline")
    for kind in system.findall("type"):
        yield from _attributes(kind, arch="x86_64", machine=expected.machine)
        yield from _differs("os/type", kind.text, "hvm")
    for tag, value in (
        ("kernel", str(expected.kernel)),
        ("initrd", str(expected.initrd)),
        ("cmdline", expected.cmdline),
    ):
        yield from _differs(f"os/{tag}", system.findtext(tag), value)
    for boot in system.findall("boot"):
        yield from _attributes(boot, dev="hd")


def _devices(devices: ET.Element, expected: ExpectedDevices) -> Iterator[str]:
    yield from _differs("emulator", [e.text for e in devices.findall("emulator")], [expected.emulator])
    disks = devices.findall("disk")
    yield from _differs("number of disks", len(disks), 1)
    for disk in disks:
        yield from _disk(disk, expected.disk_chain)
        yield from _disk_limits(disk, expected.limits)
    yield from _channels(devices.findall("channel"), expected)
    yield from _serial(devices, expected)
    rngs = devices.findall("rng")
    yield from _differs("number of rng devices", len(rngs), 1 if expected.rng else 0)
    for rng in rngs:
        yield from _rng(rng)
    known = {"emulator", "disk", "channel", "serial", "console", "rng"}
    if expected.card is not None:
        known.add("interface")
        yield from card_differences(devices.findall("interface"), expected.card)
    for element in devices:
        if element.tag not in known:
            yield from _implied(element, expected.balloon)


def card_differences(interfaces: list[ET.Element], plan: CardPlan) -> Iterator[str]:
    """One card, and nothing about it that was not asked for but the name that libvirt gives to devices."""
    yield from _differs("number of network cards", len(interfaces), 1)
    wanted = _facts(ET.fromstring(render_interface(plan)))  # noqa: S314 - our own
    for interface in interfaces:
        found = _facts(interface) - {("interface/alias", (("name", "net0"),), "")}
        for path, attributes, _ in sorted(found ^ wanted):
            word = "foreign" if (path, attributes, _) in found else "missing"
            yield f"{word} in the network card: {path} {dict(attributes)}"


def _facts(element: ET.Element, above: str = "") -> set[tuple[str, tuple[tuple[str, str], ...], str]]:
    """Every element below, as (path, attributes, text)."""
    path = f"{above}{element.tag}"
    facts = {(path, tuple(sorted(element.attrib.items())), (element.text or "").strip())}
    for child in element:
        facts |= _facts(child, f"{path}/")
    return facts


def _implied(element: ET.Element, balloon: bool) -> Iterator[str]:
    """Devices that libvirt adds to every q35 machine by itself, and nothing else."""
    kind, model = element.get("type"), element.get("model")
    allowed = {
        "controller": (kind, model) in _CONTROLLERS,
        "memballoon": model == ("virtio" if balloon else "none"),
        "input": element.get("bus") == "ps2" and kind in ("mouse", "keyboard"),
        "audio": kind == "none",
        # libvirt >= 9.1 shows the one of q35's chipset; the action "dump" would write a file on the host.
        "watchdog": model == "itco" and element.get("action") in ("reset", "poweroff", "none"),
    }.get(element.tag, False)
    if not allowed:
        yield f"foreign device: {_shown(element)}"
    elif any(child.tag == "source" for child in element):
        yield f"a device with a source on the host: {_shown(element)}"


def _disk(disk: ET.Element, chain: Sequence[ChainFile]) -> Iterator[str]:
    yield from _attributes(disk, type="file", device="disk")
    yield from _only(disk, {"driver", "source", "backingStore", "target", "iotune", "alias", "address"})
    yield from _exactly_one(disk, "driver", "source", "target")
    for target in disk.findall("target"):
        yield from _differs("disk's bus", target.get("bus"), "virtio")
    found: list[tuple[str | None, str | None]] = []
    formats = [driver.get("type") for driver in disk.findall("driver")]
    layer: ET.Element | None = disk
    while layer is not None:
        for source in layer.findall("source"):
            yield from _only(source, {"seclabel", "slices"} if layer is disk else {"seclabel"})
            yield from _only_attributes(source, {"file", "index"})
            found.append((source.get("file"), formats[0] if formats else None))
        layer = layer.find("backingStore")
        if layer is None or len(layer) == 0:
            break  # an empty <backingStore/> ends the chain
        yield from _differs("kind of backing file", layer.get("type"), "file")
        yield from _only(layer, {"format", "source", "backingStore"})
        yield from _exactly_one(layer, "format", "source")
        formats = [element.get("type") for element in layer.findall("format")]
    yield from _differs("disk's files", found, [(str(file.path), file.format) for file in chain])


def _disk_limits(disk: ET.Element, limits: GuestLimits) -> Iterator[str]:
    slices = [dict(part.attrib) for part in disk.findall("source/slices/*")]
    wanted = [{"type": "storage", "offset": "0", "size": str(limits.disk_bytes)}] if limits.disk_bytes else []
    yield from _differs("part of the disk's file that may be used", slices, wanted)
    if limits.disk_bytes:
        policies = [driver.get("error_policy") for driver in disk.findall("driver")]
        yield from _differs("disk's error policy", policies, ["report"])
    rates = [(rate.tag, rate.text) for rate in disk.findall("iotune/*")]
    wanted_rates = [("write_bytes_sec", str(limits.write_rate))] if limits.write_rate else []
    yield from _differs("rates of the disk", rates, wanted_rates)


def _channels(channels: list[ET.Element], expected: ExpectedDevices) -> Iterator[str]:
    wanted = {name: str(path) for name, path in expected.channels.items()}
    for channel in channels:
        yield from _attributes(channel, type="unix")
        yield from _only(channel, {"source", "target", "alias", "address"})
        yield from _exactly_one(channel, "source", "target")
        target, source = channel.find("target"), channel.find("source")
        if target is None or source is None:
            continue
        name = target.get("name", "")
        yield from _differs(f"kind of channel {name!r}", target.get("type"), "virtio")
        yield from _only(source, set())
        if name not in wanted:
            yield f"foreign channel: {_shown(channel)}"
        else:
            yield from _attributes(source, mode="bind", path=wanted.pop(name))
    for name in wanted:
        yield f"channel {name!r} is missing"


def _serial(devices: ET.Element, expected: ExpectedDevices) -> Iterator[str]:
    serials, consoles = devices.findall("serial"), devices.findall("console")
    yield from _differs("number of serial ports", len(serials), 1 if expected.serial else 0)
    if len(consoles) > len(serials):  # libvirt shows the serial port a second time, as the console
        yield f"foreign console: {_shown(consoles[-1])}"
    if expected.serial is None:
        return
    kind, path = expected.serial
    for element in (*serials, *consoles):
        yield from _differs(f"kind of {element.tag}", element.get("type"), kind)
        yield from _only(element, {"source", "target", "alias", "address"})
        target = element.find("target")
        kinds = {"serial": ("isa-serial", None), "console": ("serial",)}[element.tag]
        if target is not None and target.get("type") not in kinds:
            yield f"foreign {element.tag}: {_shown(element)}"
        for source in element.findall("source"):
            yield from _only(source, set())
            if kind == "pty":
                yield from _only_attributes(source, {"path"})
                continue
            yield from _differs(f"path of {element.tag}", source.get("path"), str(path))
            yield from _only_attributes(source, {"path", "mode"} if kind == "unix" else {"path", "append"})
            yield from _differs(f"mode of {element.tag}", source.get("mode"), "bind" if kind == "unix" else None)
        yield from _differs(f"sources of {element.tag}", len(element.findall("source")), 1)


def _rng(rng: ET.Element) -> Iterator[str]:
    yield from _attributes(rng, model="virtio")
    yield from _only(rng, {"backend", "rate", "alias", "address"})
    backends = [(backend.get("model"), backend.text) for backend in rng.findall("backend")]
    yield from _differs("rng's source", backends, [("random", "/dev/urandom")])


def _differs(what: str, found: object, wanted: object) -> Iterator[str]:
    if found != wanted:
        yield f"{what}: {found!r} instead of {wanted!r}"


def _only(element: ET.Element, tags: set[str]) -> Iterator[str]:
    for child in element:
        if child.tag not in tags:
            yield f"unknown element in {element.tag}: {_shown(child)}"


def _only_attributes(element: ET.Element, names: set[str]) -> Iterator[str]:
    for name in sorted(set(element.keys()) - names):
        yield f"unknown attribute {name!r}: {_shown(element)}"


def _attributes(element: ET.Element, **wanted: str) -> Iterator[str]:
    """Exactly these attributes with these values."""
    yield from _differs(f"attributes of {element.tag}", dict(element.attrib), wanted)


def _exactly_one(element: ET.Element, *tags: str) -> Iterator[str]:
    for tag in tags:
        yield from _differs(f"number of {tag!r} in {element.tag}", len(element.findall(tag)), 1)


def _shown(element: ET.Element) -> str:
    text = " ".join(ET.tostring(element, encoding="unicode").split())
    return text if len(text) <= 200 else text[:200] + "…"
