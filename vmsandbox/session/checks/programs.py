"""The outside programs: QEMU, the image builder, SSH's clients.

Without these checks a missing program would show up as the failure of a step minutes into a build.
"""

from __future__ import annotations

import re

from vmsandbox.errors import HostError
from vmsandbox.hypervisor.kvm import EMULATOR
from vmsandbox.session.checks import CheckResult, Examined, Status, install_line

OLDEST_QEMU = (7, 2)  # Debian 12


def check_programs(host: Examined) -> list[CheckResult]:
    """QEMU with its version, qemu-img, mmdebstrap, the SSH clients."""
    has_image = any(host.layout.images.glob("*/current"))
    return [
        _qemu(host),
        _present(host, "qemu-img", "disk tool (qemu-img)", {"qemu-img": "qemu-utils"}, Status.FAIL),
        _present(
            host,
            "image-tools",
            "image builder",
            {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"},
            # An image that is there runs without what built it.
            Status.WARN if has_image else Status.FAIL,
        ),
        _present(
            host,
            "ssh",
            "SSH clients",
            dict.fromkeys(("ssh", "scp", "ssh-keygen"), "openssh-client"),
            Status.WARN,
        ),
    ]


def _qemu(host: Examined) -> CheckResult:
    title = "QEMU"
    needed = ".".join(map(str, OLDEST_QEMU))
    if host.programs.find(EMULATOR) is None:
        packages = ("qemu-system-x86",)
        return CheckResult("qemu", title, Status.FAIL, f"{EMULATOR} is not installed", install_line(packages), packages)
    try:
        said = host.programs.run([EMULATOR, "--version"], timeout=10).text
    except HostError as error:
        return CheckResult("qemu", title, Status.FAIL, f"{error.brief}: {error.details}", "reinstall QEMU")
    found = re.search(r"version (\d+)\.(\d+)\S*", said)
    if found is None:
        return CheckResult("qemu", title, Status.FAIL, f"no version in {said[:200]!r}", "reinstall QEMU")
    if (int(found[1]), int(found[2])) < OLDEST_QEMU:
        remedy = f"install QEMU {needed} or newer (Debian 12 has it)"
        return CheckResult("qemu", title, Status.FAIL, f"{found[0]} is older than {needed}", remedy)
    return CheckResult("qemu", title, Status.OK, found[0])


def _present(host: Examined, check: str, title: str, wanted: dict[str, str], otherwise: Status) -> CheckResult:
    """Whether programs (name → Debian package) are installed."""
    missing = [name for name in wanted if host.programs.find(name) is None]
    if not missing:
        return CheckResult(check, title, Status.OK, ", ".join(wanted))
    packages = tuple(dict.fromkeys(wanted[name] for name in missing))
    found = f"not installed: {', '.join(missing)}"
    return CheckResult(check, title, otherwise, found, install_line(packages), packages)
