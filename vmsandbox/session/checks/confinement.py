"""AppArmor and SELinux: whether they confine guests, and whether they let QEMU reach our files.

Without these checks a session on a host with AppArmor ends in "Permission denied": libvirt writes a profile
for each guest from the files that its XML names, and the file behind the guest's memory is not among them,
because libvirt's XML cannot express it.
"""

from __future__ import annotations

import re
from pathlib import Path

from vmsandbox.paths import Layout
from vmsandbox.session.checks import CheckResult, Examined, Status

APPARMOR_RULES = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")
_APPARMOR_TEMPLATE = "/etc/apparmor.d/libvirt/TEMPLATE.qemu"


def apparmor_rules(layout: Layout) -> tuple[str, ...]:
    """The lines that QEMU's profile needs: memory files (apparmor.d(5)), and sockets passed by an
    unconfined process, through which a guest's state is saved and loaded."""
    templates, live = _quoted(layout.templates), _quoted(layout.live)
    return (
        f'"{templates}/*/ram" r,',
        f'"{templates}/.making-*/ram" rw,',
        f'"{live}/**/ram" rw,',
        "unix (send, receive) type=stream addr=none peer=(label=unconfined),",
    )


def confining_system(host: Examined) -> str | None:
    """ "AppArmor" or "SELinux" if it would confine a guest that the system's libvirt starts."""
    driver = _security_driver(host)
    if driver == "none":
        return None
    if host.read("/sys/fs/selinux/enforce") == "1" and driver in (None, "selinux"):
        return "SELinux"
    enabled = host.read("/sys/module/apparmor/parameters/enabled") == "Y"
    if enabled and host.path(_APPARMOR_TEMPLATE).exists() and driver in (None, "apparmor"):
        return "AppArmor"
    return None


def check_confinement(host: Examined) -> CheckResult:
    """One check for whichever system this host has."""
    title = "confinement of QEMU (AppArmor, SELinux)"
    if not host.is_system:
        found = "guests run as this user; libvirt confines only those of qemu:///system"
        return CheckResult("confinement", title, Status.OK, found)
    system = confining_system(host)
    if system == "AppArmor":
        return _apparmor(host, title)
    if system == "SELinux":
        return _selinux(host, title)
    remedy = "use a host with AppArmor or SELinux enforcing; without it the grade is at most `separated`"
    return CheckResult("confinement", title, Status.WARN, "neither confines guests here", remedy)


def _apparmor(host: Examined, title: str) -> CheckResult:
    present = {line.strip() for line in (host.read(APPARMOR_RULES) or "").splitlines()}
    missing = [rule for rule in apparmor_rules(host.layout) if rule not in present]
    if not missing:
        return CheckResult("confinement", title, Status.OK, f"AppArmor, with our rules in {APPARMOR_RULES}")

    def add_rules() -> str:
        file = host.path(APPARMOR_RULES)
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text() if file.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        file.write_text(before + "# vmsandbox: memory and state of its guests\n" + "\n".join(missing) + "\n")
        # libvirt compiles a guest's profile when it starts; reloading brings the ones that run up to date.
        if host.has_systemd:
            host.programs.run(["systemctl", "reload", "apparmor"], timeout=60)
        return f"added {len(missing)} lines to {APPARMOR_RULES}"

    remedy = f"add these lines to {APPARMOR_RULES}, then `sudo systemctl reload apparmor`:\n" + "\n".join(missing)
    found = f"AppArmor, but {APPARMOR_RULES} does not let QEMU open its guests' memory files"
    fix = add_rules if host.is_root else None
    return CheckResult("confinement", title, Status.FAIL, found, remedy, fix=fix)


def _selinux(host: Examined, title: str) -> CheckResult:
    layout = host.layout
    lines = []
    for folder in (layout.images, layout.templates, layout.live, layout.run):
        lines.append(f"sudo semanage fcontext -a -t svirt_image_t '{re.escape(str(folder))}(/.*)?'")
        lines.append(f"sudo restorecon -R '{folder}'")
    found = "SELinux enforces; whether QEMU may open our files depends on their labels"
    return CheckResult("confinement", title, Status.WARN, found, "\n".join(lines))


def _security_driver(host: Examined) -> str | None:
    """What qemu.conf fixes (a name, or the first of a list); None: libvirt chooses what the host has."""
    text = host.read("/etc/libvirt/qemu.conf") or ""
    found = re.search(r'^\s*security_driver\s*=\s*\[?\s*"([a-z]+)"', text, re.MULTILINE)
    return found[1] if found else None


def _quoted(path: Path) -> str:
    """A path as AppArmor's own: what it would take for a pattern or a quote is escaped."""
    return re.sub(r'([][*?{}^"\\])', r"\\\1", str(path))
