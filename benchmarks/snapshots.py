#!/usr/bin/env python3
"""How long a snapshot, a rollback and a fork from a snapshot take, beside libvirt's own, in one run on one machine.

ours      snapshot   `vmsandbox snapshot N TAG`, the whole process; and how long the guest stood still for it
          rollback   `vmsandbox rollback N TAG`, the whole process: until a login worked and the old guest is gone
          running    the same, until the guest of before runs again: what libvirt's revert is measured to
          from       `vmsandbox start --from N:TAG`, the whole process: until a login worked
          fork       `vmsandbox start --empty`, the same for a guest from a template
libvirt   snapshot, revert    an internal snapshot with memory of the same image as an ordinary domain, and back
          save, restore       `virsh save` and `virsh restore` of it

libvirt's are measured until the command ends: the guest runs then, and nothing is asked of it. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid as uuids
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import libvirt

from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.kvm import prove_kvm
from vmsandbox.hypervisor.launch import Machine, choose_user, create_overlay, give, own_folder
from vmsandbox.image.cpio import CpioEntry, cpio_archive
from vmsandbox.image.store import ImageStore
from vmsandbox.paths import Layout, resource_folder
from vmsandbox.process import Programs
from vmsandbox.render.domain import QEMU_NS, DiskImage, DomainPlan, render_domain
from vmsandbox.render.seed import render_seed
from vmsandbox.session.opening.plan import choose_accelerator
from vmsandbox.spec import GuestShape

PROGRAM = [sys.executable, "-m", "vmsandbox"]
Samples = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    samples: Samples = {}
    bench = Bench()
    try:
        bench.prepare()
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, measure in bench.measures(number).items():
                samples.setdefault(name, []).append(measure())
            samples.setdefault("running", []).append(bench.running)
            samples.setdefault("pause", []).append(bench.pause)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    finally:
        bench.close()
    report(samples, options.json)
    return 0


class Bench:
    """One session of ours, and one ordinary domain of the same image."""

    def __init__(self) -> None:
        self.layout = Layout.from_environment()
        self.programs = Programs()
        self.host = Host.open()
        self.asking = libvirt.open(None)
        self.name = f"bench-{os.getpid()}"
        self.reference = Reference(self.layout, self.programs, self.host)
        self.pause = self.running = 0.0

    def prepare(self) -> None:
        _timed(*PROGRAM, "start", "--empty", "--name", self.name)
        self.reference.boot()

    def measures(self, number: int) -> dict[str, Callable[[], float]]:
        reference, saved = self.reference.uuid, self.reference.folder / "saved"
        tag = f"t{number}"
        return {
            "snapshot": lambda: self._snapshot(tag),
            "rollback": lambda: self._rollback(tag),
            "from": lambda: self._fork("--from", f"{self.name}:{tag}"),
            "fork": lambda: self._fork("--empty"),
            "libvirt snapshot": lambda: _timed("virsh", "-q", "snapshot-create-as", reference, tag),
            "libvirt revert": lambda: _timed("virsh", "-q", "snapshot-revert", reference, tag),
            "libvirt save": lambda: _timed("virsh", "-q", "save", reference, saved),
            "libvirt restore": lambda: _timed("virsh", "-q", "restore", saved),
        }

    def close(self) -> None:
        subprocess.run([*PROGRAM, "stop", self.name], capture_output=True, check=False)
        self.reference.close()
        self.asking.close()
        self.host.close()

    def _snapshot(self, tag: str) -> float:
        began = time.monotonic()
        said = subprocess.run(
            [*PROGRAM, "snapshot", self.name, tag, "--json"], check=True, stdout=subprocess.PIPE, timeout=300
        )
        seconds = time.monotonic() - began
        self.pause = float(json.loads(said.stdout)["pause"])
        return seconds

    def _rollback(self, tag: str) -> float:
        """Sets `running`: libvirt is asked every few milliseconds which of the session's guests run."""
        before = self._guests_that_run()
        began = time.monotonic()
        with subprocess.Popen([*PROGRAM, "rollback", self.name, tag], stdin=subprocess.DEVNULL) as process:
            while process.poll() is None and not self._guests_that_run() - before:
                time.sleep(0.005)
            self.running = time.monotonic() - began
            assert process.wait(300) == 0
        return time.monotonic() - began

    def _guests_that_run(self) -> set[str]:
        running = libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING
        return {one.UUIDString() for one in self.asking.listAllDomains(running) if self.name in one.name()}

    def _fork(self, *words: str) -> float:
        name = f"{self.name}-fork"
        try:
            return _timed(*PROGRAM, "start", *words, "--no-snapshot", "--name", name)
        finally:
            subprocess.run([*PROGRAM, "stop", name], capture_output=True, check=True)


class Reference:
    """The same image and machine, as an ordinary domain of libvirt's with memory of its own."""

    def __init__(self, layout: Layout, programs: Programs, host: Host) -> None:
        self.host, self.programs = host, programs
        self.shape = GuestShape(choose_accelerator(prove_kvm(layout, programs), allow_emulation=False))
        self.image = ImageStore(layout).find("base")
        self.uuid = str(uuids.uuid4())
        self.folder = layout.live.parent / f"bench-{self.uuid[:8]}"
        self.run = layout.run / f"bench-{self.uuid[:8]}"

    def boot(self) -> None:
        user = choose_user(self.host, self.shape)
        for folder in (self.folder, self.run):
            own_folder(folder, user)
        seed = render_seed(resource_folder("cloudinit"), self.shape)
        entries = [CpioEntry.folder("seed", 0o700)]
        entries += [CpioEntry.file(f"seed/{name}", content, 0o600) for name, content in seed.items()]
        initrd, disk = self.folder / "initrd", self.folder / "disk.qcow2"
        plain = self.image.initrd.read_bytes()
        initrd.write_bytes(plain + bytes(-len(plain) % 512) + cpio_archive(entries))
        create_overlay(self.programs, disk, self.image.root, "raw")
        for path in (initrd, disk):
            give(path, user)
        machine = Machine.of(self.host, self.shape)
        plan = DomainPlan(
            name=self.folder.name, uuid=self.uuid, genid=self.uuid, shape=self.shape, machine=machine.type,
            emulator=machine.emulator, kernel=self.image.kernel, initrd=initrd,
            disk_chain=(DiskImage(disk, "qcow2"), DiskImage(self.image.root, "raw")), run_folder=self.run,
            ram=self.folder / "unused", ram_share=False, ram_readonly=False, incoming=False, session_id="bench",
            home=self.folder, run_as=user,
        )  # fmt: skip
        domain = ET.fromstring(render_domain(plan))
        for own in domain.findall(f"{{{QEMU_NS}}}commandline"):
            domain.remove(own)  # memory from a file of ours
        self.host.create(ET.tostring(domain, encoding="unicode"), paused=False)
        port = ControlPort(plan.control_socket)
        port.connect(10)
        port.request("hello", deadline=400)
        port.close()

    def close(self) -> None:
        self.host.destroy(self.uuid)
        for folder in (self.folder, self.run):
            shutil.rmtree(folder, ignore_errors=True)


def _timed(*argv: str | Path) -> float:
    began = time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=300)
    return time.monotonic() - began


def report(samples: Samples, target: Path | None) -> None:
    """A table, and the ratios that have a bar."""
    print(f"{'':18} {'median':>9} {'quartiles':>19}   n")
    middle = {name: statistics.median(values) for name, values in samples.items()}
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        print(f"{name:18} {middle[name]:9.3f} {low:9.3f}–{high:9.3f} {len(values):3}")
    ratios = {
        "rollback / fork": (middle["rollback"] / middle["fork"], "at most 1.0"),
        "libvirt revert / running": (middle["libvirt revert"] / middle["running"], "at least 5"),
        "libvirt revert / rollback": (middle["libvirt revert"] / middle["rollback"], "no bar: ours has logged in"),
        "libvirt restore / running": (middle["libvirt restore"] / middle["running"], "no bar"),
        "libvirt snapshot / snapshot": (middle["libvirt snapshot"] / middle["snapshot"], "no bar"),
        "pause, seconds": (middle["pause"], "at most 0.150"),
    }
    for name, (value, bar) in ratios.items():
        print(f"{name:28} {value:7.3f}   bar: {bar}")
    if target is not None:
        target.write_text(json.dumps({"samples": samples, "ratios": {name: one[0] for name, one in ratios.items()}}))


if __name__ == "__main__":
    sys.exit(main())
