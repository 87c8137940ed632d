"""Room on disk and in memory, and what the kernel offers.

Without these checks a full disk or a kernel without user namespaces would end an image build after minutes.
"""

from __future__ import annotations

import os
import pwd

from vmsandbox.ledger.admission import margin_of
from vmsandbox.session.checks import CheckResult, Examined, Status, install_line
from vmsandbox.session.checks.card import check_card
from vmsandbox.session.checks.ledger import check_ledger

GIB = 1 << 30
ENOUGH_DISK, LEAST_DISK = 6 * GIB, 3 * GIB
GUEST_MEMORY = 640 << 20  # reserved for a guest of the usual size (`session.resources.admitting`)
NETWORK_MEMORY = 96 << 20  # for its broker


def check_resources(host: Examined) -> list[CheckResult]:
    """Disk, memory, unprivileged image builds, the filtered network card."""
    checks = [_disk(host), _memory(host), check_ledger(host)]
    if not host.is_root:
        checks.append(_user_namespaces(host))
    checks.append(check_card(host))
    return checks


def _disk(host: Examined) -> CheckResult:
    """The least room of the file systems that hold images, templates and sessions."""
    rooms = []
    for folder in (host.layout.images, host.layout.templates, host.layout.live):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        usage = os.statvfs(place)
        rooms.append((usage.f_bavail * usage.f_frsize, place))
    free, place = min(rooms)
    found = f"{free / GIB:.1f} GiB free at {place}"
    status = Status.OK if free >= ENOUGH_DISK else Status.WARN if free >= LEAST_DISK else Status.FAIL
    remedy = "free disk space until 6 GiB are available, `vmsandbox gc`, or set VMSANDBOX_HOME to a larger disk"
    return CheckResult("disk", "disk space", status, found, "" if status is Status.OK else remedy)


def _memory(host: Examined) -> CheckResult:
    lines = (line.partition(":") for line in (host.read("/proc/meminfo") or "").splitlines())
    sizes = {key: int(value.split()[0]) * 1024 for key, _, value in lines if value.endswith(" kB")}
    if "MemAvailable" not in sizes:
        return CheckResult("memory", "memory", Status.WARN, "/proc/meminfo does not say", "")
    free, stays = sizes["MemAvailable"], margin_of(sizes.get("MemTotal", 0))
    least = GUEST_MEMORY + stays
    status = Status.FAIL if free < least else Status.WARN if free < least + NETWORK_MEMORY else Status.OK
    remedy = f"end something: a guest needs 640 MiB, 736 with a network, and {stays >> 20} MiB stay with the host"
    found = f"{free / GIB:.1f} GiB available"
    return CheckResult("memory", "memory", status, found, "" if status is Status.OK else remedy)


def _user_namespaces(host: Examined) -> CheckResult:
    """What `mmdebstrap --mode=unshare` needs: subordinate ids, newuidmap, user namespaces for everyone."""
    obstacles, packages, lines = [], [], []
    name = _user_name(host.uid)
    for file in ("/etc/subuid", "/etc/subgid"):
        owners = {line.split(":")[0] for line in (host.read(file) or "").splitlines()}
        if not owners & {name, str(host.uid)}:
            obstacles.append(f"{file} has no line for {name}")
            option = "--add-subuids" if file.endswith("uid") else "--add-subgids"
            lines.append(f"sudo usermod {option} 100000-165535 {name}")
    if host.programs.find("newuidmap") is None:
        obstacles.append("newuidmap is not installed")
        packages.append("uidmap")
        lines.append(install_line(("uidmap",)))
    for sysctl, bad, good in (
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "15000"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),  # Ubuntu 23.10 and newer
    ):
        if host.read(f"/proc/sys/{sysctl}") == bad:
            obstacles.append(f"{sysctl.replace('/', '.')} is {bad}")
            lines.append(f"sudo sysctl -w {sysctl.replace('/', '.')}={good}")
    title = "image builds without root"
    if not obstacles:
        return CheckResult("user-namespaces", title, Status.OK, "subordinate ids and user namespaces")
    found = "; ".join(obstacles)
    return CheckResult("user-namespaces", title, Status.WARN, found, "\n".join(lines), tuple(packages))


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
