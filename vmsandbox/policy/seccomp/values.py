"""A seccomp profile as values, between the JSON of it (`oci.py`) and the filter (`native.py`).

Without them the reader of users' files and the part that talks to libseccomp would know each other's dictionaries.
Names: the OCI runtime specification, config-linux.md, "Seccomp"; seccomp(2) for what each action does.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

# Action -> what the kernel returns for it (linux/seccomp.h). ERRNO has its number in the low bits.
# TRACE and NOTIFY leave the decision to a program outside. Without one the kernel answers ENOSYS, and that is what they
# become: the only tracer that could be there is the worker's own, which would let everything through.
_KILL_THREAD, _KILL_PROCESS, _TRAP, _ERRNO, _LOG, _ALLOW = 0, 0x80000000, 0x30000, 0x50000, 0x7FFC0000, 0x7FFF0000
_NOBODY_DECIDES = _ERRNO | errno.ENOSYS
_RETURNS = {
    "SCMP_ACT_KILL": _KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": _KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": _KILL_PROCESS,
    "SCMP_ACT_TRAP": _TRAP,
    "SCMP_ACT_ERRNO": _ERRNO,
    "SCMP_ACT_TRACE": _NOBODY_DECIDES,
    "SCMP_ACT_NOTIFY": _NOBODY_DECIDES,
    "SCMP_ACT_LOG": _LOG,
    "SCMP_ACT_ALLOW": _ALLOW,
}
ACTIONS = tuple(_RETURNS)
UNDECIDED = ("SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY")
# seccomp.h's enum scmp_compare.
OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
# AUDIT_ARCH_* of what an x86_64 kernel can run, as libseccomp numbers them (x32 is told by a bit of the call's number).
ARCHITECTURES = {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0x4000003E}
NATIVE = "SCMP_ARCH_X86_64"


def kernel_return(action: str, number: int) -> int:
    """What a filter returns for an action; number: errno, for SCMP_ACT_ERRNO."""
    value = _RETURNS[action]
    return value | number if value == _ERRNO else value


def permits(returned: int) -> bool:
    """Whether the call is made: ALLOW, LOG."""
    return returned in (_LOG, _ALLOW)


def answers(returned: int) -> bool:
    """Whether the call is refused with an error that the program can handle: ERRNO."""
    return returned & 0xFFFF0000 == _ERRNO


def rank(returned: int) -> int:
    """The order in which the kernel takes results: the lowest is the most restrictive (signed, as in seccomp(2))."""
    action = returned & 0xFFFF0000
    return action - (1 << 32) if action & 0x80000000 else action


@dataclass(frozen=True)
class Condition:
    """On an argument (0–5, unsigned 64 bits). MASKED_EQ: `argument & value == two`."""

    index: int
    operator: str
    value: int
    two: int = 0

    def holds(self, argument: int) -> bool:
        value = self.value
        match self.operator:
            case "SCMP_CMP_NE":
                return argument != value
            case "SCMP_CMP_LT":
                return argument < value
            case "SCMP_CMP_LE":
                return argument <= value
            case "SCMP_CMP_EQ":
                return argument == value
            case "SCMP_CMP_GE":
                return argument >= value
            case "SCMP_CMP_GT":
                return argument > value
            case _:
                return argument & value == self.two


@dataclass(frozen=True)
class Rule:
    """What is returned for one system call when all conditions hold. where: its place in the file, for errors."""

    where: str
    name: str
    returns: int
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Filter:
    """What one profile comes to in a guest. architectures: beside the native one."""

    default: int
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
