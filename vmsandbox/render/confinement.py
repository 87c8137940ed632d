"""What a policy asks of the guest, as one message to its control program.

Pure: the same policy gives the same message, because the key of its template is the hash of it. What depends on the
project (its denied and writable paths) comes after the push, as operation `project` (`session.transfer.enforced`).
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable
from typing import Any

from vmsandbox.errors import UserInputError
from vmsandbox.policy.values import Policy, Tmpfs
from vmsandbox.render.commands import command_files
from vmsandbox.render.guest_paths import (
    ETC,
    ETC_NEEDED,
    ETC_WRITTEN,
    TMP,
    GuestPaths,
    guest_paths,
    is_within,
    parents_below,
)
from vmsandbox.spec import PROJECTS, WORKER_HOME, WORKER_UID

MESSAGE_LIMIT = 60 << 10  # bytes; the guest's program takes one line of 64 KiB
UNIT = "/etc/systemd/system/vmsandbox-ssh@.service.d/policy.conf"
SLICE = "/etc/systemd/system/vmsandbox-worker.slice.d/policy.conf"
SHELL = "/usr/lib/vmsandbox/worker-shell"
FILTERS = "/etc/vmsandbox/worker.d"
ENVIRONMENT = "/etc/vmsandbox/worker.env"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the guest's
# What a login needs (cloudinit/guest/vmsandbox-ssh@.service); a policy's capabilities are beside these.
LOGIN_CAPABILITIES = ("chown", "fowner", "kill", "setgid", "setuid", "sys_chroot")
# Of all connections together, beside what one of them may have: their sshd's, and the host's own commands.
TASKS_KEPT = 64
USER_NAMESPACES = {"kernel.unprivileged_userns_clone": "1", "user.max_user_namespaces": "1024"}


def asks_of_guest(policy: Policy) -> bool:
    """Whether a guest under this policy needs a template of its own. Cheap: it compiles nothing.

    Raises:
        UserInputError: see `confinement_of`.
    """
    return bool(
        _unit_lines(policy, guest_paths(policy.filesystem))
        or policy.filesystem.tmpfs
        or policy.kernel.seccomp
        or policy.kernel.user_namespaces
        or command_files(policy.commands)
    )


def confinement_of(policy: Policy) -> dict[str, Any] | None:
    """The message of operation `policy`; None where the policy asks nothing of the guest beyond the default.

    Raises:
        UserInputError: the policy cannot be had in a guest (a needed path denied, a filter that is too long).
        HostError: the host has no libseccomp.
    """
    if not asks_of_guest(policy):
        return None
    paths = guest_paths(policy.filesystem)
    filters = [[f"{FILTERS}/{n:02}.bpf", 0o644, _deflated(code), "deflate"] for n, code in enumerate(_filters(policy))]
    message = {
        "files": [*filters, *map(list, command_files(policy.commands)), *_settings(policy, paths)],
        "folders": _folders(policy, paths),
        "mounts": [_memory(one) for one in policy.filesystem.tmpfs],
        "sysctls": USER_NAMESPACES if policy.kernel.user_namespaces else {},
        "shell": SHELL if filters or not paths.tmp_is_writable else None,
        "restart": True,
    }
    if (size := len(json.dumps(message))) > MESSAGE_LIMIT:
        raise UserInputError(
            "the policy is too long for a guest",
            details=f"{size} bytes of {MESSAGE_LIMIT}; its system-call filters are {len(filters)}",
            resolution="use a shorter seccomp profile, or fewer command rules",
        )
    return message


def _settings(policy: Policy, paths: GuestPaths) -> list[list[Any]]:
    """Files for systemd, for what a session writes later, and for the worker's shell."""
    files = []
    if unit := _unit_lines(policy, paths):
        files.append([UNIT, 0o644, "\n".join(["[Service]", "Type=exec", *unit, ""])])
    if policy.resources.processes is not None:
        files.append([SLICE, 0o644, f"[Slice]\nTasksMax={policy.resources.processes + TASKS_KEPT}\n"])
    if ETC in paths.hidden:
        files += [[f"{ETC}/{name}", 0o644, ""] for name in ETC_WRITTEN]
    if not paths.tmp_is_writable:
        files.append([ENVIRONMENT, 0o644, f"export TMPDIR={_temporary(paths)}\n"])
    return files


def _unit_lines(policy: Policy, paths: GuestPaths) -> list[str]:
    """Properties of the SSH units; the project's own folder is left to operation `project`."""
    lines = []
    if paths.writable is not None:
        # Not ProtectKernelTunables or ProtectControlGroups: they would mount a /proc without the session's boot id, and
        # the worker may write neither. ProtectHome, because `strict` leaves homes as they are. What is below PROJECTS
        # keeps the flags of its own mounts.
        lines += ["ProtectSystem=strict", "ProtectHome=read-only"]
        lines += [f"ReadWritePaths={_word(path)}" for path in (*paths.writable, PROJECTS)]
        if not any(is_within(SHARED_MEMORY, path) for path in paths.writable):
            lines += [f"ReadOnlyPaths=-{SHARED_MEMORY} -/dev/mqueue"]
    lines += [f"BindPaths={_word(pin)}" for pin in sorted(_pins(paths))]
    if ETC in paths.hidden:
        lines += ["TemporaryFileSystem=/etc:ro,mode=0755,size=1M"]
        lines += [f"BindReadOnlyPaths=-{ETC}/{name}" for name in ETC_NEEDED]
    lines += [f"InaccessiblePaths={_word(path)}" for path in paths.hidden if path != ETC]
    if policy.kernel.new_privileges:
        lines += ["NoNewPrivileges=no"]
    if policy.kernel.capabilities:
        lines += ["CapabilityBoundingSet=" + " ".join(f"CAP_{name.upper()}" for name in policy.kernel.capabilities)]
    if policy.resources.processes is not None:
        lines += [f"TasksMax={policy.resources.processes}"]
    return lines


def _pins(paths: GuestPaths) -> set[str]:
    """Folders of the worker's on the way to a hidden one: mounted on themselves, or it could rename them away.

    Only where it may write: such a mount can be written, and what is read-only is not renamed.
    """
    own = _workers_own(paths) if paths.writable is None else paths.writable
    return {pin for path in paths.hidden for pin in parents_below(path, own)}


def _workers_own(paths: GuestPaths) -> tuple[str, ...]:
    return (WORKER_HOME, TMP, "/var/tmp", *(paths.writable or ()))  # noqa: S108 - the guest's


def _folders(policy: Policy, paths: GuestPaths) -> list[list[Any]]:
    """Folders to be made where they are missing: what may be written, and what is hidden (so that nobody makes it)."""
    memory = {one.path for one in policy.filesystem.tmpfs}
    made: dict[str, int] = {}
    for path in paths.writable or ():
        if path not in memory:
            for parent in parents_below(path, ("/",)):
                owner = WORKER_UID if is_within(parent, WORKER_HOME) else 0
                made.setdefault(parent, owner)
            made[path] = WORKER_UID
    for path in paths.hidden:
        if any(is_within(path, own) for own in _workers_own(paths)):
            for parent in parents_below(path, _workers_own(paths)):
                made.setdefault(parent, WORKER_UID)
            made[path] = 0
    return [[path, 0o755 if owner == 0 and path not in paths.hidden else 0o700, owner]
            for path, owner in sorted(made.items())]  # fmt: skip


def _memory(one: Tmpfs) -> list[Any]:
    """The mount of a folder that is memory. Below the worker's home it is the worker's own."""
    own = is_within(one.path, WORKER_HOME)
    owner = f"mode=0700,uid={WORKER_UID},gid={WORKER_UID}" if own else "mode=1777"
    options = f"nosuid,nodev,{'exec' if one.exec else 'noexec'},size={one.size},{owner}"
    return [one.path, "tmpfs", options]


def _temporary(paths: GuestPaths) -> str:
    """Where temporary files go when /tmp may not be written: the first folder in it that may, else any."""
    writable = paths.writable or ()
    within = [path for path in writable if is_within(path, TMP)]
    return _shell_word((within or list(writable) or [TMP])[0])


def _filters(policy: Policy) -> list[bytes]:
    if not policy.kernel.seccomp:
        return []
    from vmsandbox.policy.seccomp.oci import compile_profile

    # The first file is the innermost: it is loaded last.
    names = policy.kernel.capabilities
    return [compile_profile(profile.text, names, str(profile.source)) for profile in policy.kernel.seccomp]


def _deflated(code: bytes) -> str:
    return base64.b64encode(zlib.compress(code, 9)).decode()


def _word(path: str) -> str:
    """A path that may be missing, as one word of a unit file (systemd.syntax; systemd.unit, "Specifiers")."""
    path = "-" + path
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        path = path.replace(special, escaped)
    path = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", path)
    return f'"{path}"' if re.search(r"[ '\\\";#]", path) else path


def _shell_word(text: str) -> str:
    import shlex

    return shlex.quote(text)


def all_capabilities(names: Iterable[str]) -> tuple[str, ...]:
    """The bounding set of the worker's processes, for a policy with these."""
    return tuple(sorted({*LOGIN_CAPABILITIES, *names}))
