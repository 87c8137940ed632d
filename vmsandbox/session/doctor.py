"""What this host can do, which isolation grade it can give, and how to mend what is missing.

Without it every missing piece would be found one failed session at a time. `diagnose` only looks (it runs
QEMU's `--version` and, if there is no answer of it yet, the KVM test guest); `mend` does what is safe, and
says it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.kvm import KvmProof, prove_kvm
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.checks import CheckResult, Examined, Status, install_line
from vmsandbox.session.checks.broker import check_broker
from vmsandbox.session.checks.confinement import check_confinement, confining_system
from vmsandbox.session.checks.programs import check_programs
from vmsandbox.session.checks.resources import check_resources
from vmsandbox.session.checks.virtualization import (
    LibvirtHost,
    OpenHost,
    check_kvm,
    check_kvm_device,
    check_libvirt,
)
from vmsandbox.spec import Grade

_INSTALL_DEADLINE = 1800.0  # seconds
_ROUNDS = 3  # packages, then what they make possible (starting a daemon), then what that shows


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and what follows from them.

    grade          the best grade a session could have here; None if none can run under any condition
    grade_reasons  why it is not better, for people (empty for `isolated`)
    """

    checks: tuple[CheckResult, ...]
    grade: Grade | None
    grade_reasons: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        """Whether a session could run now, as far as can be known without running one."""
        return all(check.status is not Status.FAIL for check in self.checks)

    def as_json(self) -> dict[str, object]:
        """The same for `--json`."""
        return {
            "can_run": self.can_run,
            "grade": self.grade.value if self.grade else None,
            "grade_reasons": list(self.grade_reasons),
            "checks": [
                {
                    "id": check.id,
                    "title": check.title,
                    "status": check.status.value,
                    "found": check.found,
                    "remedy": check.remedy,
                    "fixable": check.fix is not None or bool(check.packages),
                }
                for check in self.checks
            ],
        }


@dataclass(frozen=True)
class Mended:
    """One thing that `mend` did (or tried): `error` is empty if it worked."""

    id: str
    done: str
    error: str = ""


def diagnose(
    layout: Layout,
    programs: Programs,
    *,
    allow_emulation: bool = False,
    uri: str | None = None,
    open_host: OpenHost | None = None,
    kvm: KvmProof | None = None,
    root: Path = Path("/"),
) -> Diagnosis:
    """Examine this host.

    Args:
        allow_emulation: a host without KVM may run sessions.
        uri: libvirt's URI; by default the one that sessions of this user use.
        open_host: connects to libvirt; by default hypervisor.connection.Host.open.
        kvm: a proof that was made already.
        root: the folder that is taken for `/` when files of the host are read.
    """
    host = Examined(layout, programs, uri or _default_uri(), allow_emulation=allow_emulation, root=root)
    proof = kvm or prove_kvm(layout, programs)
    libvirt, qemu_user = check_libvirt(host, open_host or _open_host)
    # The order is the order of mending: a daemon is started when all that it looks at is right.
    checks = (
        *check_programs(host),
        check_kvm(host, proof),
        check_kvm_device(host),
        check_confinement(host),
        libvirt,
        *check_resources(host),
        *check_broker(host),
    )
    if any(check.id in ("qemu", "libvirt") and check.status is Status.FAIL for check in checks):
        return Diagnosis(checks, None, ("QEMU and libvirt are needed for any session",))
    return Diagnosis(checks, *_grade(host, proof, qemu_user))


def mend(
    diagnosis: Diagnosis,
    programs: Programs,
    monitor: Monitor,
    *,
    again: Callable[[], Diagnosis],
    uid: int | None = None,
) -> tuple[Diagnosis, tuple[Mended, ...]]:
    """Do what is safe about a diagnosis, and say each thing.

    Packages are installed as root on Debian and its derivatives only. Nothing is tried twice.

    Args:
        again: examines the host once more, after something was done.

    Returns:
        The last diagnosis, and what was done.
    """
    done: list[Mended] = []
    tried: set[object] = set()
    is_root = (os.geteuid() if uid is None else uid) == 0
    can_install = is_root and programs.find("apt-get") is not None
    for _ in range(_ROUNDS):
        bad = [check for check in diagnosis.checks if check.status is not Status.OK]
        wanted = tuple(sorted({package for check in bad for package in check.packages} - tried))
        before = len(done)
        if wanted and can_install:
            tried.update(wanted)
            with monitor.step(f"installing {', '.join(wanted)}"):
                done.append(_attempt("packages", partial(_install, programs, wanted)))
        for check in bad:
            if check.fix is not None and check.id not in tried:
                tried.add(check.id)
                with monitor.step(f"mending: {check.title}"):
                    done.append(_attempt(check.id, check.fix))
        if len(done) == before:
            break
        for mended in done[before:]:
            if mended.error:
                monitor.warning(f"{mended.id}: {mended.error}")
            else:
                monitor.notice(mended.done)
        diagnosis = again()
    return diagnosis, tuple(done)


def _attempt(check: str, fix: Callable[[], str]) -> Mended:
    try:
        return Mended(check, fix())
    except (VmsandboxError, OSError, LookupError) as error:
        details = f"\n{error.details}" if isinstance(error, VmsandboxError) and error.details else ""
        return Mended(check, "", f"{error}{details}")


def _install(programs: Programs, packages: tuple[str, ...]) -> str:
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    if programs.run(command, timeout=_INSTALL_DEADLINE, check=False, env=quiet).status != 0:
        # A fresh machine has no package lists, an old one has outdated ones.
        programs.run(["apt-get", "update", "-q"], timeout=_INSTALL_DEADLINE, env=quiet)
        programs.run(command, timeout=_INSTALL_DEADLINE, env=quiet)
    return "ran " + install_line(packages).removeprefix("sudo ")


def _grade(host: Examined, proof: KvmProof, qemu_user: tuple[int, int] | None) -> tuple[Grade, tuple[str, ...]]:
    """The best grade that isolation.py could give to a session here (it looks at the guest itself)."""
    reasons = []
    if not proof.works:
        reasons.append(f"KVM does not run guests here: {proof.reason}")
    if not host.is_system:
        reasons.append(f"guests of {host.uri} run as this user; only qemu:///system gives them another")
    else:
        if qemu_user is None or qemu_user[0] == 0:
            reasons.append("libvirt does not run QEMU as a user of its own (user and group in qemu.conf)")
        if confining_system(host) is None:
            reasons.append("neither AppArmor nor SELinux confines guests here")
    if not proof.works:
        return Grade.EMULATED, tuple(reasons)
    return Grade.SEPARATED if reasons else Grade.ISOLATED, tuple(reasons)


def _default_uri() -> str:
    return os.environ.get("VMSANDBOX_LIBVIRT_URI") or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")


def _open_host(uri: str) -> LibvirtHost:
    # Here, not at the top: where libvirt's bindings are missing, the doctor is who must say so.
    from vmsandbox.hypervisor.connection import Host

    return Host.open(uri)
