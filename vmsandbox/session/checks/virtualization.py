"""KVM and libvirt: whether they work, not whether they are there.

Without these checks a host whose KVM does not run guests, or whose /dev/kvm has permissions that make libvirt
probe QEMU anew for minutes at every start, would look like a slow or broken vmsandbox.
"""

from __future__ import annotations

import grp
import os
import shutil
import stat
import threading
from collections.abc import Callable
from typing import Protocol

from vmsandbox.errors import VmsandboxError
from vmsandbox.hypervisor.kvm import KVM_DEVICE, KvmProof
from vmsandbox.session.checks import CheckResult, Examined, Status, install_line

OLDEST_LIBVIRT = (9, 0, 0)  # Debian 12
ANSWER_DEADLINE = 15.0  # seconds; a healthy daemon answers in milliseconds


class LibvirtHost(Protocol):
    """What the doctor asks of a connection (hypervisor.connection.Host has it)."""

    @property
    def libvirt_version(self) -> tuple[int, int, int]:
        """The daemon's version."""

    @property
    def qemu_user(self) -> tuple[int, int] | None:
        """(uid, gid) that QEMU gets; None where libvirt cannot choose."""

    def close(self) -> None:
        """End the connection."""


OpenHost = Callable[[str], LibvirtHost]


def check_kvm(host: Examined, proof: KvmProof) -> CheckResult:
    """The proof as a check. Emulation is no boundary, so without leave to use it the check fails."""
    if proof.works:
        found = f"proven by running a guest ({proof.seconds:.2f} s{', earlier' if proof.cached else ''})"
        return CheckResult("kvm", "KVM", Status.OK, found)
    remedy = (
        "use a host with hardware virtualization (in a virtual machine: nested virtualization). To go on "
        "without a security boundary: --allow-emulation, or VMSANDBOX_ALLOW_EMULATION=1"
    )
    status = Status.WARN if host.allow_emulation else Status.FAIL
    return CheckResult("kvm", "KVM", status, proof.reason, remedy)


def check_kvm_device(host: Examined) -> CheckResult:
    """Who may open /dev/kvm.

    libvirtd (root) finds KVM usable, the QEMU it starts (user libvirt-qemu, group kvm) does not: libvirt then
    takes its knowledge of QEMU for outdated and probes again, some 20 times, at every start of a guest.
    """
    title, device = f"permissions of {KVM_DEVICE}", host.path(KVM_DEVICE)
    try:
        info = device.stat()
    except OSError as error:
        return CheckResult("kvm-device", title, Status.WARN, f"{KVM_DEVICE}: {error.strerror}", "see KVM")
    try:
        kvm_group = grp.getgrnam("kvm").gr_gid
    except KeyError:
        kvm_group = None
    found = f"mode {stat.S_IMODE(info.st_mode):o}, owner {info.st_uid}, group {_group_name(info.st_gid)}"
    for_all = info.st_mode & 0o006 == 0o006
    for_group = info.st_gid == kvm_group and info.st_mode & 0o060 == 0o060
    if not host.is_system:
        if os.access(device, os.R_OK | os.W_OK):
            return CheckResult("kvm-device", title, Status.OK, found)
        remedy = "sudo usermod -aG kvm $USER   (then log in again)"
        return CheckResult("kvm-device", title, Status.WARN, f"{found}: not for this user", remedy)
    if for_all or for_group:
        return CheckResult("kvm-device", title, Status.OK, found)

    def open_to_group() -> str:
        shutil.chown(device, group="kvm")
        device.chmod(0o660)
        return f"{KVM_DEVICE} now belongs to group kvm with mode 660"

    return CheckResult(
        "kvm-device",
        title,
        Status.WARN,
        f"{found}: not for QEMU's user, so libvirt probes QEMU again at every start (over a minute)",
        f"sudo chgrp kvm {KVM_DEVICE} && sudo chmod 660 {KVM_DEVICE}",
        fix=open_to_group if host.is_root and kvm_group is not None else None,
    )


def check_libvirt(host: Examined, open_host: OpenHost) -> tuple[CheckResult, tuple[int, int] | None]:
    """Whether libvirt's daemon is installed and answers. Also the (uid, gid) that it gives to QEMU."""
    title = f"libvirt ({host.uri})"
    if not any(host.programs.find(daemon) for daemon in ("libvirtd", "virtqemud")):
        packages = ("libvirt-daemon-system" if host.is_system else "libvirt-daemon", "libvirt-clients")
        missing = "neither libvirtd nor virtqemud is installed"
        return CheckResult("libvirt", title, Status.FAIL, missing, install_line(packages), packages), None
    try:
        version, qemu_user = _ask(host.uri, open_host)
    except VmsandboxError as error:
        found = f"{error.brief}: {error.details}" if error.details else error.brief
    except ImportError as error:
        remedy = "install vmsandbox with its dependencies (`make setup`, or `pip install .` in a checkout)"
        found = f"libvirt's Python bindings cannot be loaded: {error}"
        return CheckResult("libvirt", title, Status.FAIL, found, remedy), None
    else:
        found = f"version {'.'.join(map(str, version))} answers"
        if version < OLDEST_LIBVIRT:
            remedy = "libvirt 9.0 or newer is what vmsandbox is tested with (Debian 12 has it)"
            return CheckResult("libvirt", title, Status.WARN, found, remedy), qemu_user
        return CheckResult("libvirt", title, Status.OK, found), qemu_user
    commands = _daemon_commands(host)
    if not host.is_system:
        remedy = "libvirt starts its own daemon for this user; `virsh -c qemu:///session version` says more"
        return CheckResult("libvirt", title, Status.FAIL, found, remedy), None

    def start_daemons() -> str:
        for command in commands:
            host.programs.run(command, timeout=60)
        return "ran " + "; ".join(" ".join(command) for command in commands)

    if not commands:
        remedy = "its daemons run but do not answer: look at their log, then restart them"
        return CheckResult("libvirt", title, Status.FAIL, found, remedy), None
    remedy = " && ".join("sudo " + " ".join(command) for command in commands)
    fix = start_daemons if host.is_root else None
    return CheckResult("libvirt", title, Status.FAIL, found, remedy, fix=fix), None


def _daemon_commands(host: Examined) -> list[list[str]]:
    """What starts the system's daemon, by systemd or by hand."""
    monolithic = host.programs.find("libvirtd") is not None
    if host.has_systemd:
        return [["systemctl", "start", "libvirtd" if monolithic else "virtqemud"]]
    # virtlogd goes first: libvirtd refuses to start a guest without it. One that runs already stays.
    daemons = ["virtlogd", "libvirtd" if monolithic else "virtqemud"]
    running = [name for name in daemons if _is_running(host, name)]
    return [[name, "-d"] for name in daemons if name not in running]


def _is_running(host: Examined, daemon: str) -> bool:
    pid = host.read(f"/run/{daemon}.pid")
    return pid is not None and pid.isdigit() and host.read(f"/proc/{pid}/comm") == daemon


def _ask(uri: str, open_host: OpenHost) -> tuple[tuple[int, int, int], tuple[int, int] | None]:
    """Version and QEMU's user. In a thread, because a daemon that hangs must not hang the doctor."""
    answers: list[tuple[tuple[int, int, int], tuple[int, int] | None] | BaseException] = []

    def ask() -> None:
        try:
            connection = open_host(uri)
            try:
                answers.append((connection.libvirt_version, connection.qemu_user))
            finally:
                connection.close()
        except Exception as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_DEADLINE)
    if not answers:
        raise VmsandboxError(f"libvirt did not answer within {ANSWER_DEADLINE:g} seconds")
    answer = answers[0]
    if isinstance(answer, (VmsandboxError, ImportError)):
        raise answer
    if isinstance(answer, BaseException):
        raise VmsandboxError("libvirt could not be asked", details=f"{type(answer).__name__}: {answer}")
    return answer


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
