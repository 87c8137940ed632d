"""Takes everything from the receiver that it does not need, before it reads the first byte from a guest.

Were the interpreter taken over by crafted input, what is left is: the pipe to its parent, two manifests to read, and
new files in one empty folder. No other user's files, no program, no socket, no other process.

Landlock: landlock(7), Documentation/userspace-api/landlock.rst. seccomp: seccomp(2), linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_libc = ctypes.CDLL(None, use_errno=True)

# Landlock system calls have the same numbers on every architecture (asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_FS_WRITE_FILE, _FS_REMOVE_FILE, _FS_MAKE_REG = 1 << 1, 1 << 5, 1 << 8
_FS_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # ABI → accesses it knows

# What a running interpreter and this program call: (x86_64, aarch64); None where an architecture has no such call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "mremap": (25, 216),
    "madvise": (28, 233), "getpid": (39, 172), "exit": (60, 93), "fcntl": (72, 25), "sigaltstack": (131, 132),
    "futex": (202, 98), "clock_gettime": (228, 113), "exit_group": (231, 94), "openat": (257, 56),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "renameat2": (316, 276),
    "getrandom": (318, 278),
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h


def confine(folder: int, user: int | None, file_bytes: int) -> list[str]:
    """Confine this process for good. Returns what is in force beside the limits ("user", "landlock", "seccomp").

    Args:
        folder: descriptor of the only folder it may make files in.
        user: user and group id to become (needs root); None stays who it is.
        file_bytes: the largest file it may write.

    Raises:
        OSError: what every Linux has could not be taken away.
    """
    done = []
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        done.append("user")
    _prctl(_PR_SET_PDEATHSIG, 9)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _landlock(folder):
        done.append("landlock")
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_FSIZE, file_bytes + 4096),
        (resource.RLIMIT_AS, 2 << 30),
        (resource.RLIMIT_CPU, 900),
    ):
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))
    if _seccomp():
        done.append("seccomp")
    return done


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _landlock(folder: int) -> bool:
    """Nothing of any file system but making, writing and removing files in `folder`; no TCP; no signals out of here."""
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False  # a kernel without it, or it is switched off
    handled = struct.pack(
        "QQQ", _FS_ALL.get(abi, (1 << 16) - 1), 3 if abi >= 4 else 0, 3 if abi >= 6 else 0
    )[: 8 if abi < 4 else 16 if abi < 6 else 24]  # fmt: skip
    ruleset = _libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    try:
        allowed = _FS_WRITE_FILE | _FS_REMOVE_FILE | _FS_MAKE_REG
        rule = struct.pack("=Qi", allowed, folder)  # struct landlock_path_beneath_attr, packed
        if _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) != 0 or _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), "landlock")
    finally:
        os.close(ruleset)
    return True


def _seccomp() -> bool:
    """An allow-list of system calls; all others fail with EPERM (not a kill: a failure can still say what it was)."""
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH or sys.maxsize < 1 << 32:
        return False
    column = 0 if machine == "x86_64" else 1
    numbers = [number for pair in _CALLS.values() if (number := pair[column]) is not None]
    # struct seccomp_data: nr at 0, arch at 4. BPF: load word absolute 0x20, jump if equal 0x15, return 0x06.
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, _AUDIT_ARCH[machine]), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    for index, number in enumerate(numbers):
        program.append((0x15, len(numbers) - index, 0, number))  # equal: over the rest, to "allow"
    program += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    in_force: bool = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0) == 0
    return in_force  # not, on a kernel without it
