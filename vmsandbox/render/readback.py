"""Reads back what is in force in a guest, and compares it with what the policy says.

Pure: a script for the guest's shell, a parser of what it prints, and the differences. Without it a property that a
guest's systemd or kernel does not know, or a mount that failed, would be a policy that exists on paper alone.

The script starts no program: it has to run under the policy's own rules about commands. What it prints is the word of
a guest in which nothing but the host's own programs has run yet.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vmsandbox.errors import GuestError
from vmsandbox.policy.values import Policy, Tmpfs
from vmsandbox.render.confinement import SHARED_MEMORY, TASKS_KEPT, USER_NAMESPACES, all_capabilities
from vmsandbox.render.guest_paths import ETC, TMP, GuestPaths, guest_paths, is_within
from vmsandbox.spec import WORKER_HOME

# cloudinit/guest/90-vmsandbox.conf
SYSCTLS = {
    "user.max_user_namespaces": "0",
    "kernel.unprivileged_userns_clone": "0",
    "kernel.yama.ptrace_scope": "1",
    "kernel.kptr_restrict": "2",
    "kernel.dmesg_restrict": "1",
    "kernel.unprivileged_bpf_disabled": "1",
    "kernel.io_uring_disabled": "2",
    "kernel.perf_event_paranoid": "3",
    "kernel.kexec_load_disabled": "1",
    "fs.protected_hardlinks": "1",
    "fs.protected_symlinks": "1",
}
_CAPABILITY_BITS = {
    "chown": 0, "dac_override": 1, "dac_read_search": 2, "fowner": 3, "fsetid": 4, "kill": 5, "setgid": 6, "setuid": 7,
    "setpcap": 8, "linux_immutable": 9, "net_bind_service": 10, "net_broadcast": 11, "net_admin": 12, "net_raw": 13,
    "ipc_lock": 14, "ipc_owner": 15, "sys_module": 16, "sys_rawio": 17, "sys_chroot": 18, "sys_ptrace": 19,
    "sys_pacct": 20, "sys_admin": 21, "sys_boot": 22, "sys_nice": 23, "sys_resource": 24, "sys_time": 25,
    "sys_tty_config": 26, "mknod": 27, "lease": 28, "audit_write": 29, "audit_control": 30, "setfcap": 31,
    "mac_override": 32, "mac_admin": 33, "syslog": 34, "wake_alarm": 35, "block_suspend": 36, "audit_read": 37,
    "perfmon": 38, "bpf": 39, "checkpoint_restore": 40,
}  # fmt: skip
_SCRIPT = """
say() { lines=(); mapfile -t lines < "$2"; printf '=%s\\n' "$1"; printf '%s\\n' "${lines[@]}"; }
look() { for p; do r=; [ -e "$p" ] && r=e; LOOK
  printf '%s %s\\n' "${r:--}" "$p"; done; }
say status /proc/self/status
for l in "${lines[@]}"; do case $l in PPid:*) say parent /proc/${l#*[[:space:]]}/status;; esac; done
say mounts /proc/self/mountinfo
read -r c < /proc/self/cgroup; c=/sys/fs/cgroup${c#0::}
say unit.pids $c/pids.max; say slice.pids ${c%/*}/pids.max; say slice.memory ${c%/*}/memory.max
for s in SYSCTLS; do say "sysctl $s" "/proc/sys/${s//.//}"; done
printf '=paths\\n'; look PATHS
printf '=project\\n'; read -r go && look MORE
AFTER
printf '=end\\n'
"""
_END = b"=end\n"
# How a path is looked at. bash asks by faccessat2(2); under a profile that forbids it, it is tried: opened to read, a
# name looked up in it, and whose it is (o), and whether anybody may write there (k, sticky): the mount says the rest.
_ASK = '[ -r "$p" ] && r=${r}r; [ -w "$p" ] && r=${r}w; [ -x "$p" ] && r=${r}x'
_TRY = (
    '{ [ -f "$p" ] || [ -d "$p" ]; } && { : < "$p"; } 2> /dev/null && r=${r}r; [ -e "$p/." ] && r=${r}x; '
    '[ -O "$p" ] && r=${r}o; [ -k "$p" ] && r=${r}k'
)
_ACCESS_CALL = "faccessat2"


@dataclass(frozen=True)
class Expected:
    """What has to be true of a process of the worker's. Paths: absolute in the guest.

    filters      system-call filters of its own, beyond what its SSH server has
    writable, read_only, hidden   paths as this process finds them; missing ones are neither writable nor readable
    may_ask      whether its shell may ask what it may (faccessat2); else that is worked out from what it may see
    """

    no_new_privileges: bool
    filters: int
    capabilities: tuple[str, ...]
    processes: int | None
    sysctls: tuple[tuple[str, str], ...]
    memory: tuple[Tmpfs, ...]
    writable: tuple[str, ...]
    read_only: tuple[str, ...]
    hidden: tuple[str, ...]
    may_ask: bool = True


def expected_of(policy: Policy) -> Expected:
    """What a policy says of a guest in which no project lies."""
    paths = guest_paths(policy.filesystem)
    sysctls = SYSCTLS | (USER_NAMESPACES if policy.kernel.user_namespaces else {})
    return Expected(
        no_new_privileges=not policy.kernel.new_privileges or bool(policy.kernel.seccomp),
        filters=len(policy.kernel.seccomp),
        capabilities=all_capabilities(policy.kernel.capabilities),
        processes=policy.resources.processes,
        sysctls=tuple(sorted(sysctls.items())),
        memory=policy.filesystem.tmpfs,
        writable=tuple(path for path in paths.writable or () if not _denied(path, paths)),
        read_only=_read_only(paths),
        hidden=tuple("/etc/shadow" if path == ETC else path for path in paths.hidden),
        may_ask=_may_ask(policy),
    )


def expected_of_project(policy: Policy, folder: str, denied: Iterable[str]) -> Expected:
    """The paths of a guarded project alone. folder: where it lies. denied: relative to it."""
    paths = guest_paths(policy.filesystem)
    within = [f"{folder}/{name}" for name in paths.project_writable or ()]
    hidden = tuple(f"{folder}/{name}" for name in denied)
    locked = paths.project_writable is not None
    return Expected(
        no_new_privileges=True, filters=0, capabilities=(), processes=None, sysctls=(), memory=(),
        writable=tuple(path for path in within if path not in hidden) if locked else (folder,),
        read_only=(folder,) if locked else (), hidden=hidden, may_ask=_may_ask(policy),
    )  # fmt: skip


def _may_ask(policy: Policy) -> bool:
    if not policy.kernel.seccomp:
        return True
    from vmsandbox.policy.syscalls_needed import is_permitted

    return is_permitted(policy.kernel, _ACCESS_CALL)


def script_of(expected: Expected, project: Expected | None) -> str:
    """For `bash -c`. It waits for a line on its input before it looks at the project."""
    words = {
        "SYSCTLS": shlex.join(name for name, _value in expected.sysctls),
        "PATHS": shlex.join(_paths(expected)),
        "MORE": shlex.join(_paths(project)) if project else "",
        "LOOK": _ASK if expected.may_ask else _TRY,
        "AFTER": ":" if expected.may_ask else "say 'project mounts' /proc/self/mountinfo",
    }
    return re.sub("SYSCTLS|PATHS|MORE|LOOK|AFTER", lambda found: words[found[0]], _SCRIPT)


def is_whole(untrusted: bytes | bytearray) -> bool:
    """Whether the script has printed all."""
    return untrusted.endswith(_END)


def parse_facts(untrusted: bytes) -> dict[str, list[str]]:
    """Section → lines. Raises GuestError if it is not what the script prints."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in untrusted.decode("utf-8", "surrogateescape").splitlines():
        if line.startswith("="):
            lines = sections.setdefault(line[1:], [])
        else:
            lines.append(line)
    if not is_whole(untrusted) or "status" not in sections or "paths" not in sections:
        raise GuestError("the guest did not tell what is in force in it", details=ascii(untrusted[-500:]))
    return sections


def differences(expected: Expected, facts: Mapping[str, list[str]], section: str = "paths") -> list[str]:
    """What is not as expected, one sentence each."""
    marks = {path: mark for mark, _, path in (line.partition(" ") for line in facts.get(section, []))}
    if not expected.may_ask:
        mounts = [line.split(" ") for line in facts.get("mounts" if section == "paths" else f"{section} mounts", [])]
        marks = {path: mark + _written(path, mark, mounts) for path, mark in marks.items()}
    found = [*_path_differences(expected, marks)]
    if section != "paths":
        return found
    status, parent = _fields(facts["status"]), _fields(facts.get("parent", []))
    if expected.no_new_privileges and status.get("NoNewPrivs") != "1":
        found.append("its programs can gain privileges (NoNewPrivs is not set)")
    loaded = _number(status.get("Seccomp_filters")) - _number(parent.get("Seccomp_filters"))
    if loaded != expected.filters:
        found.append(f"{loaded} system-call filters are loaded, not {expected.filters}")
    allowed = sum(1 << _CAPABILITY_BITS[name] for name in expected.capabilities)
    if _number(status.get("CapBnd"), 16) & ~allowed:
        found.append(f"its capability bounding set is {status.get('CapBnd')}, more than {allowed:016x}")
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        if _number(status.get(name), 16):
            found.append(f"it has capabilities: {name} is {status.get(name)}")
    if expected.processes is not None:
        limits = (("unit.pids", expected.processes), ("slice.pids", expected.processes + TASKS_KEPT))
        found += [f"{name} is {_first(facts, name)}, not {most}" for name, most in limits
                  if _first(facts, name) != str(most)]  # fmt: skip
    if not _first(facts, "slice.memory").isdigit():
        found.append("the worker's memory has no limit below the guest's")
    for name, value in expected.sysctls:
        if _first(facts, f"sysctl {name}") != value:
            found.append(f"{name} is {_first(facts, f'sysctl {name}')!r}, not {value}")
    for one in expected.memory:
        found += _memory_differences(one, facts.get("mounts", []))
    return found


def count(expected: Expected) -> int:
    """How many single things `differences` compares."""
    return 8 + len(expected.sysctls) + len(expected.memory) + len(_paths(expected))


def _denied(path: str, paths: GuestPaths) -> bool:
    return any(is_within(path, hidden) for hidden in paths.hidden)


def _read_only(paths: GuestPaths) -> tuple[str, ...]:
    """Places that a worker usually may write, of which this policy does not speak."""
    if paths.writable is None:
        return ()
    usual = (WORKER_HOME, TMP, "/var/tmp", SHARED_MEMORY, "/run/lock", f"{WORKER_HOME}/.claude")  # noqa: S108
    writable = paths.writable
    return tuple(path for path in usual if not any(is_within(path, one) for one in writable))


def _paths(expected: Expected) -> list[str]:
    return [*expected.writable, *expected.read_only, *expected.hidden]


def _written(path: str, mark: str, mounts: list[list[str]]) -> str:
    """`w` if a path may be written that is the worker's or anybody's: the mount that it is in does not say `ro`.

    mounts: /proc/self/mountinfo, fields of its lines; a later one lies over an earlier one.
    """
    options: list[str] = []
    longest = -1
    for fields in mounts:
        if len(fields) > 9 and is_within(path, point := _unescaped(fields[4])) and len(point) >= longest:
            longest, options = len(point), fields[5].split(",")
    return "w" if {"o", "k"} & set(mark) and "ro" not in options else ""


def _unescaped(point: str) -> str:
    """A mount point as mountinfo writes it: blanks and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)


def _path_differences(expected: Expected, marks: Mapping[str, str]) -> Iterable[str]:
    for path in expected.writable:
        if "w" not in marks.get(path, ""):
            yield f"{path} cannot be written"
    for path in expected.read_only:
        if "w" in marks.get(path, "w"):
            yield f"{path} can be written"
    for path in expected.hidden:
        if {"r", "w", "x"} & set(marks.get(path, "r")):
            yield f"{path} can be entered"


def _memory_differences(one: Tmpfs, mounts: list[str]) -> Iterable[str]:
    """mountinfo: … mount point, options - type, source, super options (proc_pid_mountinfo(5))."""
    found = [fields for fields in (line.split(" ") for line in mounts) if len(fields) > 9 and fields[4] == one.path]
    if not found or "-" not in found[-1]:
        yield f"{one.path} is not memory of its own"
        return
    fields = found[-1]
    options, after = set(fields[5].split(",")), fields[fields.index("-") + 1 :]
    wanted = {"nosuid", "nodev"} | (set() if one.exec else {"noexec"})
    if after[0] != "tmpfs" or not wanted <= options:
        yield f"{one.path} is mounted as {after[0]} with {fields[5]}"
    if f"size={-(-one.size // 4096) * 4}k" not in after[-1].split(","):
        yield f"{one.path} has another size: {after[-1]}"


def _fields(lines: list[str]) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _first(facts: Mapping[str, list[str]], name: str) -> str:
    return next(iter(facts.get(name, [])), "")


def _number(text: str | None, base: int = 10) -> int:
    try:
        return int(text or "0", base)
    except ValueError:
        return -1
