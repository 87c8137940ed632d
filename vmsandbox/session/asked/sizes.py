"""What a guest is made of, from the policy and the command line: an option may ask for less, never for more.

Without one place for it, a command line could give a guest more of the host than its policy does, in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.hypervisor.isolation import Isolation
from vmsandbox.policy.values import Policy, ResourcesPolicy, SessionPolicy
from vmsandbox.spec import Grade, GuestLimits

DEFAULT_IMAGE = "base"
DEFAULT_MEMORY_MIB, LEAST_MEMORY_MIB, MOST_MEMORY_MIB = 512, 256, 1 << 20
DEFAULT_VCPUS, MOST_VCPUS = 2, 64
LEAST_DISK = 64 << 20  # less, and a guest whose own files change (logs, its name) is at its end before it has begun
LEAST_WRITE_RATE = 64 << 10
LEAST_RESERVED = 128 << 20
_MIB = 1 << 20
_GRADES = (Grade.EMULATED, Grade.SEPARATED, Grade.ISOLATED)


@dataclass(frozen=True)
class Sizes:
    """What a guest is made of."""

    image: str
    vcpus: int
    memory_mib: int
    limits: GuestLimits


def sizes_of(policy: Policy, *, image: str | None, vcpus: int | None, memory_mib: int | None) -> Sizes:
    """Policy and options (None: not given) in one.

    Raises:
        RefusedError: an option asks for more than the policy allows.
        UserInputError: a value that no guest can have.
    """
    resources = policy.resources
    if image is not None and policy.image not in (None, image):
        raise _refused(policy, "image", f"--image {image}", f"the image {policy.image!r}")
    most_memory = _mib(resources.memory)
    if memory_mib is not None and most_memory is not None and memory_mib > most_memory:
        raise _refused(policy, "resources.memory", f"--memory {memory_mib}", f"{most_memory} MiB")
    if vcpus is not None and resources.vcpus is not None and vcpus > resources.vcpus:
        raise _refused(policy, "resources.vcpus", f"--vcpus {vcpus}", f"{resources.vcpus}")
    memory = _first(memory_mib, most_memory, DEFAULT_MEMORY_MIB)
    processors = _first(vcpus, resources.vcpus, DEFAULT_VCPUS)
    for what, value, least, most in (
        ("--memory" if memory_mib is not None else "sandbox.resources.memory", memory, LEAST_MEMORY_MIB,
         MOST_MEMORY_MIB),
        ("--vcpus" if vcpus is not None else "sandbox.resources.vcpus", processors, 1, MOST_VCPUS),
    ):  # fmt: skip
        if not least <= value <= most:
            unit = " MiB" if "memory" in what else ""
            raise UserInputError(
                f"{what} must be between {least} and {most}{unit}, not {value}", details=_where(policy).strip()
            )
    return Sizes(image or policy.image or DEFAULT_IMAGE, processors, memory, _limits(policy, resources, memory))


def refuse_grade(policy: Policy, isolation: Isolation) -> None:
    """Raises RefusedError if a guest is less isolated than its policy asks for (`sandbox.isolation`)."""
    if policy.isolation is None:
        return
    wanted = Grade(policy.isolation)
    if _GRADES.index(isolation.grade) < _GRADES.index(wanted):
        raise RefusedError(
            f"the policy asks for isolation {wanted.value!r}, and this guest is {isolation.grade.value!r}",
            details="\n".join((f"sandbox.isolation: {wanted.value}{_where(policy)}", *isolation.missing)),
            resolution="`vmsandbox doctor` says what this host lacks; or change the policy",
        )


def disk_free_of(limits: GuestLimits) -> int | None:
    """Bytes that the guest's file system is to have free, so that it is full before its disk's file is.

    The rest is for what a byte costs: the file system's own tables, QEMU's, and clusters of 64 KiB that are half used.
    """
    if limits.disk_bytes is None:
        return None
    return limits.disk_bytes - limits.disk_bytes // 8 - (32 << 20)


def _limits(policy: Policy, resources: ResourcesPolicy, memory_mib: int) -> GuestLimits:
    reserved = _mib(resources.memory_reserved)
    for key, value, least in (
        ("disk", resources.disk, LEAST_DISK),
        ("write_rate", resources.write_rate, LEAST_WRITE_RATE),
        ("memory_reserved", resources.memory_reserved, LEAST_RESERVED),
    ):
        if value is not None and value < least:
            raise UserInputError(
                f"sandbox.resources.{key} must be at least {least >> 10} KiB, not {value} bytes",
                details=_where(policy).strip(),
            )
    if reserved is not None and reserved >= memory_mib:
        reserved = None  # all of it: nothing to balloon
    # QEMU counts a file in sectors.
    disk = resources.disk - resources.disk % 512 if resources.disk is not None else None
    return GuestLimits(disk, resources.write_rate, reserved)


def _mib(value: int | None) -> int | None:
    return None if value is None else value // _MIB


def _first(option: int | None, policy: int | None, default: int) -> int:
    return option if option is not None else policy if policy is not None else default


def _refused(policy: Policy, key: str, option: str, allowed: str) -> RefusedError:
    return RefusedError(
        f"the policy allows {allowed}, not {option}",
        details=f"sandbox.{key}{_where(policy)}",
        resolution=f"change the policy, or omit {option}",
    )


def _where(policy: Policy) -> str:
    return f" ({policy.source})" if policy.source else ""


def needs_watcher(policy: SessionPolicy, reserved_mib: int | None = None) -> bool:
    """Whether there is something to watch. reserved_mib: what a guest with a balloon keeps."""
    asked = (policy.time, policy.idle, policy.healthcheck, reserved_mib)
    return any(one is not None for one in asked)
