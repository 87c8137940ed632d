"""Takes everything from the broker's process that serving does not need, before it accepts its first connection.

Were the interpreter taken over by a guest's bytes, what is left is: the connections it has, TCP and DNS outwards, and
reading Python's own libraries and the host's resolver settings. No file of anybody, no program, no signal, no port.

Landlock: landlock(7), Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_libc = ctypes.CDLL(None, use_errno=True)
# Landlock system calls have the same numbers on every architecture (asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_FS_READ_FILE, _FS_READ_DIR = 1 << 2, 1 << 3
_FS_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # ABI → accesses it knows
_NET_BIND, _SCOPE_ALL = 1, 3  # scope: abstract unix sockets, and signals to processes outside
NICE = 5


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends; at once if it already has."""
    _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(0)


def confine(user: int | None, readable: Iterable[Path], files: int, memory: int) -> list[str]:
    """Confine this process for good, while it has one thread. Returns what is in force ("user", "landlock").

    Args:
        user: user and group id to become (needs root); None stays who it is.
        readable: files and folders that stay readable; missing ones are left out.
        files: open descriptors at most.
        memory: bytes of address space at most.

    Raises:
        OSError: what every Linux has could not be taken away.
    """
    done = []
    os.nice(max(0, NICE - os.nice(0)))  # it was started with that
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        done.append("user")
        _prctl(_PR_SET_PDEATHSIG, 9)  # becoming another user has cleared it
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _landlock(readable):
        done.append("landlock")
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: files,
              resource.RLIMIT_AS: memory}  # fmt: skip
    for what, limit in limits.items():
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))
    return done


def no_more_processes() -> None:
    """No new process and no new thread from here on (for a user of its own; another one's processes would count)."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _landlock(readable: Iterable[Path]) -> bool:
    """Reading below `readable` and nothing else of any file system; no TCP port to listen on; no signals."""
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False  # a kernel without it, or it is switched off
    handled = struct.pack(
        "QQQ", _FS_ALL.get(abi, (1 << 16) - 1), _NET_BIND if abi >= 4 else 0, _SCOPE_ALL if abi >= 6 else 0
    )[: 8 if abi < 4 else 16 if abi < 6 else 24]  # fmt: skip
    ruleset = _libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            with suppress(FileNotFoundError, PermissionError):
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    allowed = _FS_READ_FILE | (_FS_READ_DIR if path.is_dir() else 0)
                    rule = struct.pack("=Qi", allowed, fd)  # struct landlock_path_beneath_attr, packed
                    if _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) != 0:
                        raise OSError(ctypes.get_errno(), f"landlock: {path}")
                finally:
                    os.close(fd)
        if _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), "landlock")
    finally:
        os.close(ruleset)
    return True
