"""How isolated a running guest is, worked out from the guest that runs.

Without it a report would repeat what was asked for. Here the grade comes from libvirt's live XML, from QEMU's
own command line and from /proc of the QEMU process: what cannot be read counts as missing, so the grade is
never better than the evidence. `judge` is pure; `assess` reads and judges.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.kvm import KvmProof
from vmsandbox.spec import Grade

SYSTEM_URI = "qemu:///system"
SELINUX_ENFORCE = Path("/sys/fs/selinux/enforce")

# The machine types for which QEMU gives security support together with KVM are the versioned ones of
# distributions and upstream; q35 is the one that we render.
_COVERED_MACHINE = re.compile(r"pc-q35-[A-Za-z0-9.+_-]+")
_NEEDED_FOR_SEPARATED = ("process", "kvm_proven", "kvm_used")


@dataclass(frozen=True)
class Check:
    """One thing that the grade rests on, and what was seen."""

    ok: bool
    evidence: str


@dataclass(frozen=True)
class Isolation:
    """The grade of one running guest, and each check by its stable name."""

    grade: Grade
    checks: dict[str, Check]

    @property
    def missing(self) -> tuple[str, ...]:
        """Why the grade is not better, for people."""
        return tuple(f"{name}: {check.evidence}" for name, check in self.checks.items() if not check.ok)


@dataclass(frozen=True)
class ProcessFacts:
    """What /proc says of a QEMU process. None: it could not be read.

    cmdline   its arguments
    threads   /proc/PID/task/*/status of every thread, as key → value
    label     AppArmor's or SELinux's name for it
    selinux_enforcing  whether the host's SELinux refuses what its policy does not allow
    """

    pid: int
    cmdline: tuple[str, ...] | None = None
    threads: tuple[Mapping[str, str], ...] | None = None
    label: str | None = None
    selinux_enforcing: bool = False


def assess(
    live_xml: str,
    qemu_pid: int,
    *,
    uri: str,
    kvm: KvmProof,
    proc: Path = Path("/proc"),
    selinux_enforce: Path = SELINUX_ENFORCE,
) -> Isolation:
    """Grade a running guest.

    Args:
        live_xml: libvirt's XML of the domain as it runs.
        qemu_pid: its process (`read_pid_file`).
        uri: the libvirt connection that runs it.
        kvm: the proof made on this host.
    """
    return judge(live_xml, read_process(qemu_pid, proc, selinux_enforce), uri, kvm)


def judge(live_xml: str, process: ProcessFacts, uri: str, kvm: KvmProof) -> Isolation:
    """The grade that the evidence gives. Pure."""
    try:
        domain = ET.fromstring(live_xml)  # noqa: S314 - written by libvirt on this host
    except ET.ParseError as error:
        raise HostError("the guest's live XML cannot be read", details=str(error)) from error
    checks = {
        "process": _is_the_guest(domain, process),
        "kvm_proven": Check(kvm.works, kvm.reason),
        "kvm_used": _kvm_used(domain, process),
        "machine": _machine(domain, process),
        "system_libvirt": Check(uri == SYSTEM_URI, uri),
        "not_root": _not_root(process),
        "no_capabilities": _in_every_thread(process, ("CapEff", "CapPrm"), lambda value: int(value, 16) == 0),
        "seccomp": _in_every_thread(process, ("Seccomp",), lambda value: value == "2"),
        "no_new_privileges": _in_every_thread(process, ("NoNewPrivs",), lambda value: value == "1"),
        "confined": _confined(domain, process),
    }
    if not checks["process"].ok:
        stranger = "not known to be the guest's process"
        for name in ("not_root", "no_capabilities", "seccomp", "no_new_privileges", "confined"):
            checks[name] = Check(False, f"{stranger}: {checks[name].evidence}")
    if not all(checks[name].ok for name in _NEEDED_FOR_SEPARATED):
        return Isolation(Grade.EMULATED, checks)
    whole = all(check.ok for check in checks.values())
    return Isolation(Grade.ISOLATED if whole else Grade.SEPARATED, checks)


def pid_file(uri: str, name: str, environ: Mapping[str, str] | None = None) -> Path:
    """Where libvirt's QEMU driver writes the process id of a running domain."""
    if uri == SYSTEM_URI:
        return Path("/run/libvirt/qemu", f"{name}.pid")
    env = os.environ if environ is None else environ
    run = env.get("XDG_RUNTIME_DIR") or env.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(run, "libvirt/qemu/run", f"{name}.pid")


def read_pid_file(path: Path) -> int:
    """The process id in a pid file. Raises HostError if there is none."""
    try:
        pid = int(path.read_text())
    except (OSError, ValueError) as error:
        raise HostError("the guest's process is not known", details=f"{path}: {error}") from error
    if pid <= 1:
        raise HostError("the guest's process is not known", details=f"{path} says {pid}")
    return pid


def read_process(pid: int, proc: Path = Path("/proc"), selinux_enforce: Path = SELINUX_ENFORCE) -> ProcessFacts:
    """What /proc says of a process; never raises. All of one process, even if the number is reused."""
    try:
        folder = os.open(proc / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ProcessFacts(pid)
    try:
        raw = _read_at(folder, "cmdline")
        label = _read_at(folder, "attr/apparmor/current") or _read_at(folder, "attr/current")
        return ProcessFacts(
            pid,
            cmdline=tuple(raw.rstrip("\0").split("\0")) if raw else None,
            threads=_threads(folder),
            label=label.rstrip("\0\n") if label else None,
            selinux_enforcing=_content(selinux_enforce) == "1",
        )
    finally:
        os.close(folder)


def _threads(folder: int) -> tuple[Mapping[str, str], ...] | None:
    try:
        tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        texts = [_read_at(tasks, f"{number}/status") for number in os.listdir(tasks)]  # noqa: PTH208
    except OSError:
        return None
    finally:
        os.close(tasks)
    # A thread may end while the list is read; the main thread is there as long as the process is.
    parsed = tuple(_parse_status(text) for text in texts if text)
    return parsed or None


def _parse_status(text: str) -> Mapping[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _read_at(folder: int, name: str) -> str | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(fd, "rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return None


def _content(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _is_the_guest(domain: ET.Element, process: ProcessFacts) -> Check:
    if process.cmdline is None:
        return Check(False, f"the command line of process {process.pid} cannot be read")
    uuid = domain.findtext("uuid") or "?"
    if _options(process.cmdline, "-uuid") != [uuid]:
        return Check(False, f"process {process.pid} does not run domain {uuid}")
    return Check(True, f"process {process.pid} runs domain {uuid}")


def _kvm_used(domain: ET.Element, process: ProcessFacts) -> Check:
    accelerators = _options(process.cmdline or (), "-accel")
    kind = domain.get("type")
    evidence = f"domain type {kind}, QEMU's -accel {' '.join(accelerators) or 'unknown'}"
    # Exactly one: QEMU takes the first of several that works, and TCG always works.
    used = len(accelerators) == 1 and accelerators[0].split(",")[0] == "kvm"
    return Check(kind == "kvm" and used, evidence)


def _machine(domain: ET.Element, process: ProcessFacts) -> Check:
    kind = domain.find("os/type")
    declared = kind.get("machine", "") if kind is not None else ""
    running = [option.split(",")[0] for option in _options(process.cmdline or (), "-machine")]
    covered = _COVERED_MACHINE.fullmatch(declared) is not None and running[:1] == [declared]
    return Check(covered, f"{declared or 'unknown'}, QEMU runs {running[0] if running else 'unknown'}")


def _options(cmdline: Sequence[str], option: str) -> list[str]:
    """The values that a command line gives to an option (QEMU takes one dash or two)."""
    names = (option, f"-{option}")
    return [value for name, value in pairwise(cmdline) if name in names]


def _not_root(process: ProcessFacts) -> Check:
    """Real, effective, saved and file system user id (proc(5): `Uid`)."""
    return _in_every_thread(process, ("Uid",), lambda value: len(value.split()) == 4 and "0" not in value.split())


def _in_every_thread(process: ProcessFacts, keys: Sequence[str], good: Callable[[str], bool]) -> Check:
    if not process.threads:
        return Check(False, f"the status of process {process.pid} cannot be read")
    seen: dict[str, bool] = {}
    for status in process.threads:
        for key in keys:
            value = status.get(key)
            shown = f"{key} {' '.join(value.split()) if value else 'unknown'}"
            seen[shown] = value is not None and good(value)
    bad = [shown for shown, ok in seen.items() if not ok]
    return Check(not bad, ", ".join(bad or seen))


def _confined(domain: ET.Element, process: ProcessFacts) -> Check:
    """A profile of this guest's own: libvirt's daemon has one too, which allows nearly everything."""
    label = process.label
    if not label:
        return Check(False, "no AppArmor or SELinux label")
    uuid = domain.findtext("uuid") or "?"
    if label == f"libvirt-{uuid} (enforce)":
        return Check(True, f"AppArmor: {label}")
    context = label.split(":")
    if len(context) >= 4 and context[2] in ("svirt_t", "svirt_tcg_t"):
        mode = "enforcing" if process.selinux_enforcing else "permissive"
        return Check(process.selinux_enforcing, f"SELinux ({mode}): {label}")
    return Check(False, f"label {label!r}")
