"""Proof that KVM runs a guest on this host.

Without it a session on a host whose /dev/kvm merely opens would start a guest that spins forever, and a
report would call it isolated. There are such hosts (nested ones above all): the device opens, KVM_CREATE_VM
succeeds, libvirt offers the domain type, and the first SSE instruction ends in "KVM internal error". So a
guest of ours is run: kvm_probe.S says what it does. That takes a few hundred milliseconds, and the answer is
kept until the host boots anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.spec import Accelerator

EMULATOR = "qemu-system-x86_64"
KVM_DEVICE = Path("/dev/kvm")
PROBE_CODE = Path(__file__).with_name("kvm_probe.bin")
PROBE_DEADLINE = 3.0  # seconds; a KVM that works needs about 0.2
PROBE_PASSED = 85  # isa-debug-exit: 2 * 0x2a + 1

_ROM_SIZE = 0x10000
_RESET_VECTOR = 0xFFF0
_JUMP_TO_START = b"\xe9\x0d\x00"  # jmp rel16: 0xfff3 + 0x000d wraps to 0
_FAILURE_HOLDS = 3600.0  # seconds: a failure may have been a busy host or a setting since changed
# libvirt's `host-passthrough` becomes this; a CPU that QEMU cannot set up must fail here, not in a session.
_CPU = {Accelerator.KVM: "host,migratable=on", Accelerator.TCG: "max"}
_MEANING = {
    0: "the test guest crashed (triple fault)",
    87: "the test guest computed a wrong result",
    89: "the test guest met an exception that should not happen",
    91: "the processor that KVM offers has no 64-bit mode",
}


@dataclass(frozen=True)
class KvmProof:
    """Whether KVM ran the test guest here.

    reason: why (not), for people. seconds: what the run took when it was made. cached: not run just now.
    """

    works: bool
    reason: str
    seconds: float
    cached: bool


def prove_kvm(layout: Layout, programs: Programs, *, fresh: bool = False, device: Path = KVM_DEVICE) -> KvmProof:
    """Run the test guest under KVM, or repeat what an earlier run of it showed.

    An answer holds for one host boot, kernel, QEMU program, user and state of the device; a failure for an
    hour at most. `fresh` runs it in any case. A host that lacks something is an answer, not an error.
    """
    if obstacle := _obstacle(programs, device):
        return KvmProof(False, obstacle, 0.0, False)
    key = _cache_key(programs, device)
    kept = layout.cache / "kvm-proof.json"
    if not fresh and (known := _read_kept(kept, key)):
        return known
    proof = run_probe(programs, Accelerator.KVM)
    _keep(kept, key, proof)
    return proof


def run_probe(programs: Programs, accelerator: Accelerator, deadline: float = PROBE_DEADLINE) -> KvmProof:
    """Run the test guest once. QEMU is gone when this returns, whatever the guest did.

    Args:
        accelerator: KVM; TCG shows that the test guest itself is right.
        deadline: seconds until QEMU is killed.
    """
    started = time.monotonic()

    def took() -> float:
        return round(time.monotonic() - started, 3)

    with tempfile.TemporaryDirectory(prefix="vmsandbox-kvm-") as folder:
        rom = Path(folder, "rom")
        rom.write_bytes(probe_rom())
        argv = (
            EMULATOR, "-accel", str(accelerator), "-cpu", _CPU[accelerator], "-machine", "q35", "-m", "16",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-bios", rom,
            "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
        )  # fmt: skip
        try:
            # Its own folder, so that a QEMU that aborts leaves its core file nowhere else.
            ended = programs.run(argv, timeout=deadline, check=False, cwd=Path(folder), on_line=_stop_at_kvm_error)
        except _KvmInternalError as error:
            return KvmProof(False, f"the test guest did not run: {error}", took(), False)
        except HostError as error:
            return KvmProof(False, f"the test guest did not run: {error.brief}", took(), False)
    if ended.status == PROBE_PASSED:
        return KvmProof(True, "the test guest ran", took(), False)
    said = next(iter(ended.last_words.splitlines()), "")
    meaning = _MEANING.get(ended.status) or f"QEMU ended with status {ended.status}"
    return KvmProof(False, f"{meaning}: {said}" if said else meaning, took(), False)


def probe_rom() -> bytes:
    """The test guest as a 64 KiB ROM: the code at its beginning, the reset vector leads there."""
    code = PROBE_CODE.read_bytes()
    if len(code) > _RESET_VECTOR:
        raise ValueError("the test guest does not fit below the reset vector")
    return (code.ljust(_RESET_VECTOR, b"\xf4") + _JUMP_TO_START).ljust(_ROM_SIZE, b"\xf4")


class _KvmInternalError(Exception):
    """QEMU reported that KVM gave up; it would now wait forever."""


def _stop_at_kvm_error(line: str) -> None:
    if "KVM internal error" in line:
        raise _KvmInternalError(line.strip())


def _obstacle(programs: Programs, device: Path) -> str | None:
    """What makes a run pointless, in words for people."""
    if platform.machine() != "x86_64":
        return f"this host's processor is {platform.machine()}; the guests are x86_64"
    if programs.find(EMULATOR) is None:
        return f"{EMULATOR} is not installed"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return (
            f"{device} does not exist: the kernel module (kvm_intel, kvm_amd) is not loaded, virtualization "
            "is off in the firmware, or this is a virtual machine without nested virtualization"
        )
    except PermissionError as error:
        return f"{device} may not be opened ({error.strerror}): is this user in the group that owns it (kvm)?"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


def _cache_key(programs: Programs, device: Path) -> str:
    """A digest of all that the answer depends on. QEMU's file stands for its version: asking costs 50 ms."""
    emulator = Path(programs.find(EMULATOR) or EMULATOR).stat()
    node = device.stat()
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if Path("/sys/module", name).exists()]
    facts = [
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        platform.release(),
        modules,
        [emulator.st_dev, emulator.st_ino, emulator.st_size, emulator.st_mtime_ns],
        [node.st_dev, node.st_ino, node.st_mode, node.st_uid, node.st_gid, node.st_rdev],
        [os.geteuid(), os.getegid(), sorted(os.getgroups())],
        hashlib.sha256(PROBE_CODE.read_bytes()).hexdigest(),
        list(_CPU.values()),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_kept(kept: Path, key: str) -> KvmProof | None:
    try:
        fd = os.open(kept, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_uid != os.geteuid():
                return None  # another user's word is no proof
            data = json.loads(file.read(65536))
        age = time.time() - float(data["time"])
        works = data["works"] is True
        if data["key"] != key or not (works or 0 <= age < _FAILURE_HOLDS):
            return None
        return KvmProof(works, str(data["reason"]), float(data["seconds"]), True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(kept: Path, key: str, proof: KvmProof) -> None:
    """Write the answer for the next session. A cache that cannot be written costs time, nothing else."""
    data = {**asdict(proof), "key": key, "time": time.time()}
    del data["cached"]
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, prefix=".kvm-proof-", delete=False) as file:
            json.dump(data, file)
        Path(file.name).replace(kept)
    except OSError:
        return
