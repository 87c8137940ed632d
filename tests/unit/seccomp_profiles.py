"""Short words for seccomp profiles in tests."""

from __future__ import annotations

import json
from typing import Any

from vmsandbox.policy.seccomp.native import syscall_number

SAMPLE = json.dumps(
    {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["clone", "execve", "read", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["chroot", "mount", "umount", "pivot_root"], "action": "SCMP_ACT_KILL"},
        ],
    }
)


def profile_of(*entries: dict[str, Any], default: str = "SCMP_ACT_ALLOW", **more: Any) -> str:
    return json.dumps({"defaultAction": default, "syscalls": list(entries), **more})


def entry(name: str, action: str, **more: Any) -> dict[str, Any]:
    return {"names": [name], "action": action, **more}


def argument_of(index: int, operator: str, value: int, two: int = 0) -> dict[str, Any]:
    return {"index": index, "op": operator, "value": value, "valueTwo": two}


def number_of(name: str) -> int:
    number = syscall_number(name)
    assert number is not None
    return number
