#!/usr/bin/env python3
"""How long until a guest is of use: our sessions beside references, in one run on one machine.

(a) floor   plain qemu-system-x86_64 (q35 and microvm) with the same kernel, accelerator, processor, memory and a
            tiny initramfs that prints a line: until the line
(b) cold    the same image booted with cloud-init, and a stock image (Debian's own initramfs, services and
            cloud-init configuration): until the first command's output over SSH
(c) ready   `vmsandbox session --empty -- echo ready`, from nothing, the whole process: until that output
(d) exec    `vmsandbox exec` on a running guest (whole process), and a command on an open connection
(e) whole   `vmsandbox session PROJECT -- true`, until the process has ended

Besides: six of (c) at once, beside six of (a) at once on the same processors, and the memory of idle forks. Bars are
ratios; seconds differ from machine to machine.
The rounds are interleaved, so that a slow minute of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid as uuids
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vmsandbox.guest.control import ControlPort, connect_unix
from vmsandbox.guest.ssh import GuestShell
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import fill_sparse, new_sparse
from vmsandbox.hypervisor.kvm import prove_kvm
from vmsandbox.hypervisor.launch import Machine, choose_user, create_overlay, give, own_folder
from vmsandbox.hypervisor.template import ImageFiles
from vmsandbox.image.cpio import CpioEntry, cpio_archive
from vmsandbox.image.store import ImageStore
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout, resource_folder
from vmsandbox.process import Programs
from vmsandbox.render.domain import KERNEL_CMDLINE, DiskImage, DomainPlan, render_domain
from vmsandbox.render.seed import render_seed
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.opening.plan import choose_accelerator, find_or_build
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.upkeep.identity import give_identity
from vmsandbox.spec import WORKER, Accelerator, GuestShape

BOOT_DEADLINE = 300
Samples = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of everything but (b)")
    parser.add_argument("--cold-rounds", type=int, default=10, help="measurements of (b); each takes a minute")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--project", type=Path, default=Path(__file__).resolve().parent.parent)
    options = parser.parse_args()
    bench = Bench(options.project)
    samples: Samples = {}
    memory: dict[str, float] = {}
    try:
        bench.prepare()
        memory = bench.memory()
        for number in range(max(options.rounds, options.cold_rounds)):
            print(f"round {number + 1}", file=sys.stderr)
            measures = bench.quick() if number < options.rounds else {}
            if number < options.cold_rounds:
                measures |= bench.cold()
            for name, measure in measures.items():
                samples.setdefault(name, []).append(measure())
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    finally:
        bench.close()
    report(samples, memory, bench, options.json)
    return 0


class Bench:
    """The things that are measured. Everything that is made is removed by `close`."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.layout = Layout.from_environment()
        self.programs = Programs()
        self.host = Host.open()
        self.shape = GuestShape(choose_accelerator(prove_kvm(self.layout, self.programs), False))
        self.machine = Machine.of(self.host, self.shape)
        self.work = Path(tempfile.mkdtemp(prefix="vmsandbox-bench-", dir="/var/tmp"))
        self.work.chmod(0o711)
        self.running: Sandbox | None = None
        self.hung_floors = 0

    def prepare(self) -> None:
        store = ImageStore(self.layout)
        self.images = {
            name: find_or_build(name, self.layout, store, self.programs, Monitor()) for name in ("base", "stock")
        }
        self.floor_initrd = self.work / "floor.cpio"
        self.floor_initrd.write_bytes(self._floor_archive())
        # One session first: the template is made here and is no part of (c).
        self.running = Sandbox.open(request=SessionRequest(name=f"bench-{os.getpid()}"))
        self.running.shell().run(["true"])

    def close(self) -> None:
        if self.running is not None:
            self.running.close()
        shutil.rmtree(self.work, ignore_errors=True)
        self.host.close()

    def quick(self) -> dict[str, Callable[[], float]]:
        return {
            "a floor q35": lambda: self.floor("q35"),
            "a floor microvm": lambda: self.floor("microvm"),
            "c ready": self.ready,
            "six at once": self.six,
            "six floors": self.six_floors,
            "d exec": self.exec_,
            "d command": self.command,
            "e whole": self.whole,
        }

    def cold(self) -> dict[str, Callable[[], float]]:
        return {"b cold": lambda: self.cold_boot("base"), "b cold stock": lambda: self.cold_boot("stock")}

    # -- (a) -----------------------------------------------------------------------------------------------

    def _floor_archive(self) -> bytes:
        program = self.work / "init"
        source = Path(__file__).with_name("floor_init.S")
        self.programs.run(["gcc", "-nostdlib", "-static", "-o", program, source])
        return cpio_archive(
            [CpioEntry.folder("dev"), CpioEntry.console(), CpioEntry.file("init", program.read_bytes(), 0o755)]
        )

    def floor(self, machine: str) -> float:
        """Seconds from starting QEMU to the line that the initramfs prints."""
        kvm = self.shape.accelerator is Accelerator.KVM
        argv = [
            "qemu-system-x86_64", "-accel", self.shape.accelerator.value, "-machine", machine,
            "-cpu", "host" if kvm else "Westmere,-cx16", "-m", str(self.shape.memory_mib),
            "-smp", str(self.shape.vcpus), "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", str(self.images["base"].kernel), "-initrd", str(self.floor_initrd),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
        ]  # fmt: skip
        for _ in range(5):
            seconds = _until(argv, b"FLOOR-READY", deadline=20)
            if seconds is not None:
                return seconds
            self.hung_floors += 1  # microvm under emulation hangs now and then before its first line
        raise SystemExit(f"plain QEMU with -machine {machine} did not start in five attempts")

    def six_floors(self) -> float:
        """Seconds until the last of six plain QEMUs (q35) that start at once has printed its line."""
        began = time.monotonic()
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(self.floor, ["q35"] * 6))
        return time.monotonic() - began

    # -- (b) -----------------------------------------------------------------------------------------------

    def cold_boot(self, name: str) -> float:
        """Seconds from nothing to the output of a command over SSH, with cloud-init and no template."""
        image = self.images[name]
        uuid = str(uuids.uuid4())
        folder, run = self.work / uuid, self.layout.run / f"b-{uuid[:8]}"
        user = choose_user(self.host, self.shape)
        seed = render_seed(resource_folder("cloudinit"), self.shape)
        root = image.root if name == "base" else self._root_with_seed(image.root, seed)
        files = ImageFiles(name, image.digest, root, image.kernel, image.initrd)
        plan = self._cold_plan(uuid, folder, run, files, user)
        began = time.monotonic()
        try:
            own_folder(folder, user)
            own_folder(run, user)
            initrd = image.initrd.read_bytes()
            if name == "base":
                entries = [CpioEntry.folder("seed", 0o700)]
                entries += [CpioEntry.file(f"seed/{key}", data, 0o600) for key, data in seed.items()]
                initrd += bytes(-len(initrd) % 512) + cpio_archive(entries)
            plan.initrd.write_bytes(initrd)
            create_overlay(self.programs, plan.disk_chain[0].path, root, "raw")
            new_sparse(plan.ram, self.shape.memory_mib << 20)
            for path in (plan.initrd, plan.disk_chain[0].path, plan.ram):
                give(path, user)
            self.host.create(render_domain(plan), paused=False)
            control = ControlPort(plan.control_socket)
            control.connect(10)
            control.request("hello", deadline=BOOT_DEADLINE)
            keys, _machine_id = give_identity(control, "cold", BOOT_DEADLINE)
            shell = GuestShell.connect(
                connect_unix(plan.ssh_socket(0), 5),
                user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=60,
            )  # fmt: skip
            status, output, _errors = shell.run(["echo", "ready"])
            seconds = time.monotonic() - began
            if (status, output) != (0, b"ready\n"):
                raise SystemExit(f"the cold guest answered {status} {output!r}")
            shell.close()
            return seconds
        finally:
            self.host.destroy(uuid)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)

    def _root_with_seed(self, root: Path, seed: dict[str, bytes]) -> Path:
        """A copy of the stock root file system with the seed where NoCloud looks for it. Not timed."""
        copy = self.work / "stock.ext4"
        if copy.exists():
            return copy
        new_sparse(copy, root.stat().st_size)
        fill_sparse(root, copy)
        nocloud = "/var/lib/cloud/seed/nocloud"
        lines = ["mkdir /var/lib/cloud", "mkdir /var/lib/cloud/seed", f"mkdir {nocloud}", f"cd {nocloud}"]
        for key, data in seed.items():
            (self.work / key).write_bytes(data)
            lines.append(f"write {self.work / key} {key}")
        self.programs.run(["debugfs", "-w", "-f", "-", copy], stdin="\n".join(lines).encode())
        copy.chmod(0o444)
        return copy

    def _cold_plan(
        self, uuid: str, folder: Path, run: Path, image: ImageFiles, user: tuple[int, int] | None
    ) -> DomainPlan:
        return DomainPlan(
            name=f"vmsandbox-bench-{uuid[:8]}", uuid=uuid, genid=str(uuids.uuid4()), shape=self.shape,
            machine=self.machine.type, emulator=self.machine.emulator, kernel=image.kernel,
            initrd=folder / "initrd",
            disk_chain=(DiskImage(folder / "disk.qcow2", "qcow2"), DiskImage(image.root, "raw")),
            run_folder=run, ram=folder / "ram", ram_share=True, ram_readonly=False, incoming=False,
            session_id=f"bench:{uuid}", home=self.work, run_as=user, other_cmdline=KERNEL_CMDLINE,
        )  # fmt: skip

    # -- (c), (d), (e) -------------------------------------------------------------------------------------

    def _ours(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "vmsandbox", *words]

    def ready(self) -> float:
        seconds = _until(self._ours("session", "--empty", "--", "echo", "ready"), b"ready", deadline=120)
        if seconds is None:
            raise SystemExit("a session did not answer")
        return seconds

    def exec_(self) -> float:
        assert self.running is not None
        return _whole(self._ours("exec", self.running.name, "--", "true"))

    def command(self) -> float:
        assert self.running is not None
        began = time.monotonic()
        self.running.shell().run(["true"])
        return time.monotonic() - began

    def whole(self) -> float:
        return _whole(self._ours("session", str(self.project), "--", "true"))

    def six(self) -> float:
        """Seconds until the last of six sessions that start at once has answered."""
        began = time.monotonic()
        argv = self._ours("session", "--empty", "--", "sh", "-c", "echo ready; exec cat")
        children = [
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in range(6)
        ]
        answers = []
        for child in children:
            assert child.stdout is not None
            answers.append(child.stdout.readline())
        seconds = time.monotonic() - began
        for child in children:
            child.communicate()
        if answers != [b"ready\n"] * 6:
            raise SystemExit(f"not all six answered: {answers}")
        return seconds

    def memory(self) -> dict[str, float]:
        """Proportional memory (PSS, MiB) of one of six idle forks, and how it splits (mean of the six)."""
        sandboxes = []
        try:
            for _ in range(6):
                sandbox = Sandbox.open(request=SessionRequest())
                sandboxes.append(sandbox)
                sandbox.shell().run(["true"])
                sandbox.disconnect()
            time.sleep(5)
            each = [_memory_of(one.folder.qemu_pid(one.info)) for one in sandboxes]
        finally:
            for sandbox in sandboxes:
                sandbox.close()
        return {key: round(statistics.mean(one[key] for one in each), 1) for key in each[0]}


def _memory_of(pid: int) -> dict[str, float]:
    """PSS in MiB of a QEMU process by what it is for, from /proc/PID/smaps (proc(5))."""
    split = {"total": 0.0, "guest memory, shared": 0.0, "guest memory, own": 0.0, "translated code and heap": 0.0,
             "QEMU and libraries": 0.0}  # fmt: skip
    name, anonymous = "", 0.0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
        elif words[0] == "Pss:":
            pss = int(words[1]) / 1024
        elif words[0] == "Anonymous:":
            anonymous = int(words[1]) / 1024
            split["total"] += pss
            if name.startswith("/memfd:vmsandbox") or name.endswith("/ram"):
                split["guest memory, own"] += anonymous
                split["guest memory, shared"] += pss - anonymous
            elif name.startswith("/"):
                split["QEMU and libraries"] += pss
            else:
                split["translated code and heap"] += pss
    return split


def _until(argv: list[str], word: bytes, deadline: float) -> float | None:
    """Seconds from starting a program to a line of its stdout that contains `word`; None if it never comes."""
    began = time.monotonic()
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    killer = threading.Timer(deadline, child.kill)
    killer.start()
    seconds = None
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if word in line:
                seconds = time.monotonic() - began
                break
    finally:
        if argv[0].startswith("qemu"):
            child.kill()
        child.wait()
        killer.cancel()
    return seconds


def _whole(argv: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120)
    return time.monotonic() - began


def report(samples: Samples, memory: dict[str, float], bench: Bench, target: Path | None) -> None:
    rows = {}
    for name, values in samples.items():
        low, _median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows[name] = {"n": len(values), "median": statistics.median(values), "q1": low, "q3": high}
    floor = rows["a floor q35"]["median"]
    version = ".".join(map(str, bench.machine.qemu_version))
    kernel = bench.images["base"].facts.kernel_version
    print(f"accelerator {bench.shape.accelerator}, QEMU {version}, kernel {kernel}, ", end="")
    print(f"{os.cpu_count()} processors, guests of {bench.shape.memory_mib} MiB")
    print(f"{'':16} {'n':>3} {'median':>8} {'q1':>8} {'q3':>8}  × floor")
    for name, row in rows.items():
        print(
            f"{name:16} {row['n']:3} {row['median']:8.3f} {row['q1']:8.3f} {row['q3']:8.3f}"
            f"  {row['median'] / floor:7.2f}"
        )
    ready = rows["c ready"]["median"]
    ratios = {"ready / floor q35": ready / floor}
    if "six at once" in rows:
        ratios["six at once / ready"] = rows["six at once"]["median"] / ready
        ratios["six floors at once / floor q35"] = rows["six floors"]["median"] / floor
    for cold in ("b cold", "b cold stock"):
        if cold in rows:
            ratios[f"{cold} / ready"] = rows[cold]["median"] / ready
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    print("PSS of one of six idle forks, MiB: " + ", ".join(f"{key} {value:.1f}" for key, value in memory.items()))
    if bench.hung_floors:
        print(f"(plain QEMU hung {bench.hung_floors} times and was started again; not counted)")
    if target:
        target.write_text(
            json.dumps({"samples": samples, "rows": rows, "ratios": ratios, "memory_mib": memory}, indent=1)
        )


if __name__ == "__main__":
    sys.exit(main())
