"""Seccomp profiles: what is refused in a file, and what the compiled filter does to a real process of this host.

The calls that are tried are harmless with any outcome: umask(2), getpid(2), personality(0xffffffff), kill(…, 0).
"""

from __future__ import annotations

import errno
import json
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from seccomp_profiles import SAMPLE, argument_of, entry, number_of, profile_of

from vmsandbox.errors import UserInputError
from vmsandbox.policy.seccomp.oci import canonical_profile, check_profile, compile_profile, profile_notes
from vmsandbox.policy.seccomp.proof import decide
from vmsandbox.policy.seccomp.values import ACTIONS, OPERATORS, Condition, kernel_return

CHILD = Path(__file__).with_name("seccomp_child.py")
ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="loads x86_64 filters")


def _call(profiles: str | list[str], number: int | str, *arguments: int) -> tuple[int, int] | int:
    """(result, errno) of a call in a process with these filters; the signal that ended it."""
    programs = [compile_profile(one).hex() for one in ([profiles] if isinstance(profiles, str) else profiles)]
    argv = [sys.executable, "-I", "-S", str(CHILD), ",".join(programs), str(number), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, timeout=60)
    if done.returncode < 0:
        return -done.returncode
    assert done.returncode == 0, done.stderr
    result, error = json.loads(done.stdout)
    return result, error


@on_x86
@pytest.mark.parametrize(
    ("action", "more", "expected"),
    [
        ("SCMP_ACT_ERRNO", {}, (-1, errno.EPERM)),
        ("SCMP_ACT_ERRNO", {"errnoRet": errno.ENOTTY}, (-1, errno.ENOTTY)),
        ("SCMP_ACT_ERRNO", {"errno": "ENOTTY"}, (-1, errno.ENOTTY)),
        ("SCMP_ACT_KILL", {}, signal.SIGSYS),
        ("SCMP_ACT_KILL_THREAD", {}, signal.SIGSYS),
        ("SCMP_ACT_KILL_PROCESS", {}, signal.SIGSYS),
        ("SCMP_ACT_TRAP", {}, signal.SIGSYS),
        ("SCMP_ACT_TRACE", {"errnoRet": 7}, (-1, errno.ENOSYS)),
        ("SCMP_ACT_NOTIFY", {}, (-1, errno.ENOSYS)),
        ("SCMP_ACT_LOG", {}, None),
        ("SCMP_ACT_ALLOW", {}, None),
    ],
)
def test_each_action_in_a_real_process(action: str, more: dict[str, Any], expected: Any) -> None:
    umask = number_of("umask")
    found = _call(profile_of(entry("umask", action, **more)), umask, 0o77)
    if expected is None:
        assert isinstance(found, tuple) and found[1] == 0, "the call was made"
    else:
        assert found == expected


@on_x86
def test_the_default_action_with_its_error() -> None:
    needed = [entry(name, "SCMP_ACT_ALLOW") for name in ("write", "exit_group", "prctl")]
    default = {"default": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EBUSY}
    assert _call(profile_of(*needed, **default), number_of("umask"), 0) == (-1, errno.EBUSY)
    assert _call(profile_of(*needed, default="SCMP_ACT_ERRNO"), number_of("umask"), 0) == (-1, errno.EPERM)
    assert _call(profile_of(*needed, default="SCMP_ACT_KILL_PROCESS"), number_of("umask"), 0) == signal.SIGSYS


@on_x86
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_on_all_64_bits_in_a_real_process(operator: str) -> None:
    value, two = (0xFF00000000F0, 0x3000000000C0) if operator == "SCMP_CMP_MASKED_EQ" else (5 << 32, 0)
    profile = profile_of(
        entry("personality", "SCMP_ACT_ERRNO", errnoRet=77, args=[argument_of(0, operator, value, two)])
    )
    tried = {
        "SCMP_CMP_MASKED_EQ": [two | 0xF, two, two ^ 0x40, two | 1 << 40],
    }.get(operator, [value - 1, value, value + 1])
    for argument in tried:
        expected = Condition(0, operator, value, two).holds(argument)
        found = _call(profile, number_of("personality"), argument)
        assert isinstance(found, tuple) and (found[1] == 77) is expected, (operator, hex(argument))


@on_x86
def test_conditions_of_one_entry_hold_together_and_entries_are_alternatives() -> None:
    both = [argument_of(0, "SCMP_CMP_EQ", 1), argument_of(1, "SCMP_CMP_EQ", 2)]
    profile = profile_of(
        entry("kill", "SCMP_ACT_ERRNO", errnoRet=77, args=both),
        entry("kill", "SCMP_ACT_ERRNO", errnoRet=77, args=[argument_of(1, "SCMP_CMP_EQ", 9)]),
    )
    program = compile_profile(profile)
    kill = number_of("kill")
    for first, second, refused in ((1, 2, True), (1, 3, False), (2, 2, False), (5, 9, True)):
        assert (decide(program, kill, [first, second, 0, 0, 0, 0]) != ALLOW) is refused
    assert _call(profile, kill, 1, 9) == (-1, 77)


@on_x86
def test_stacked_profiles_hold_all_at_once() -> None:
    first = profile_of(entry("umask", "SCMP_ACT_ERRNO", errnoRet=71))
    second = profile_of(entry("getpid", "SCMP_ACT_ERRNO", errnoRet=72))
    assert _call([first, second], number_of("umask"), 0) == (-1, 71)
    assert _call([first, second], number_of("getpid")) == (-1, 72)
    killing = profile_of(entry("umask", "SCMP_ACT_KILL_PROCESS"))
    assert _call([first, killing], number_of("umask"), 0) == signal.SIGSYS, "the strictest counts"


@on_x86
def test_a_32_bit_call_is_killed_unless_its_architecture_is_named() -> None:
    getpid_of_x86, umask_of_x86 = "32:20", "32:60"
    assert _call(profile_of(), getpid_of_x86) == signal.SIGSYS
    named = profile_of(
        entry("umask", "SCMP_ACT_ERRNO", errnoRet=77), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    )
    found = _call(named, getpid_of_x86)
    if isinstance(found, int):
        pytest.skip("this host's kernel runs no 32-bit programs")
    assert found[0] > 0 and _call(named, umask_of_x86, 0) == (-1, 77), "the rule holds for its own number there"


@on_x86
def test_an_x32_call_is_killed_unless_it_is_named() -> None:
    getpid = number_of("getpid") | 0x40000000
    assert _call(profile_of(), getpid) == signal.SIGSYS
    named = compile_profile(
        profile_of(entry("umask", "SCMP_ACT_ERRNO", errnoRet=77), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"])
    )
    assert decide(named, getpid, [0] * 6, "SCMP_ARCH_X32") == ALLOW
    assert decide(named, number_of("umask") | 0x40000000, [0] * 6, "SCMP_ARCH_X32") == kernel_return(
        "SCMP_ACT_ERRNO", 77
    )


def test_a_socket_that_is_denied_is_denied_through_the_multiplexer_of_32_bit_programs_too() -> None:
    profile = profile_of(entry("socket", "SCMP_ACT_ERRNO"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])
    program = compile_profile(profile)
    direct, socketcall = 359, 102
    assert decide(program, direct, [0] * 6, "SCMP_ARCH_X86") != ALLOW
    assert decide(program, socketcall, [1, 0, 0, 0, 0, 0], "SCMP_ARCH_X86") != ALLOW


def test_calls_that_are_newer_than_the_hosts_libseccomp() -> None:
    entries = [entry(name, "SCMP_ACT_ERRNO") for name in ("mseal", "getxattrat", "file_setattr")]
    for architectures in ([], ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]):
        program = compile_profile(profile_of(*entries, architectures=architectures))
        for number in (462, 464, 469):
            assert decide(program, number, [0] * 6) == kernel_return("SCMP_ACT_ERRNO", 1)
            if architectures:
                assert decide(program, number, [0] * 6, "SCMP_ARCH_X86") == kernel_return("SCMP_ACT_ERRNO", 1)
                assert decide(program, number | 1 << 30, [0] * 6, "SCMP_ARCH_X32") == kernel_return("SCMP_ACT_ERRNO", 1)
            else:
                assert decide(program, number, [0] * 6, "SCMP_ARCH_X86") == KILL_PROCESS
        for number in (0, 461, 463, 470):
            assert decide(program, number, [0] * 6) == ALLOW


def test_what_is_compiled_is_what_the_entries_say() -> None:
    """Random exclusive conditions, against a plain reading of them."""
    chance = random.Random(5)
    for _ in range(60):
        operator, value = chance.choice(list(OPERATORS)), chance.getrandbits(chance.choice((4, 33, 64)))
        two = value & chance.getrandbits(64) if operator == "SCMP_CMP_MASKED_EQ" else 0
        index = chance.randrange(6)
        default, action = chance.sample([one for one in ACTIONS if one.endswith(("ALLOW", "ERRNO", "LOG", "TRAP"))], 2)
        program = compile_profile(
            profile_of(entry("ioctl", action, args=[argument_of(index, operator, value, two)]), default=default)
        )
        condition = Condition(index, operator, value, two)
        for argument in (
            0,
            2**64 - 1,
            value,
            value - 1,
            value + 1,
            two,
            two | 1,
            value ^ (1 << 63),
            chance.getrandbits(64),
        ):
            arguments = [argument % 2**64 if at == index else chance.getrandbits(64) for at in range(6)]
            said = action if condition.holds(arguments[index]) else default
            assert decide(program, number_of("ioctl"), arguments) == kernel_return(said, errno.EPERM), (said, condition)


def _depending(action: str, index: int, operator: str, value: int) -> dict[str, Any]:
    return entry("dup2", action, args=[argument_of(index, operator, value)])


@pytest.mark.parametrize(
    "entries",
    [
        # libseccomp lets the unconditional entry swallow the other.
        [entry("dup2", "SCMP_ACT_ALLOW"), _depending("SCMP_ACT_ERRNO", 1, "SCMP_CMP_EQ", 0x5412)],
        [entry("dup2", "SCMP_ACT_ALLOW"), entry("dup2", "SCMP_ACT_KILL")],
        # libseccomp takes the lenient one where both fit.
        [_depending("SCMP_ACT_KILL", 0, "SCMP_CMP_GE", 5), _depending("SCMP_ACT_ALLOW", 0, "SCMP_CMP_LE", 7)],
        [_depending("SCMP_ACT_KILL", 0, "SCMP_CMP_EQ", 5), _depending("SCMP_ACT_ALLOW", 1, "SCMP_CMP_EQ", 7)],
        # libseccomp takes no entry that says what the default says.
        [_depending("SCMP_ACT_ERRNO", 0, "SCMP_CMP_EQ", 5), _depending("SCMP_ACT_ALLOW", 1, "SCMP_CMP_EQ", 7)],
        # libseccomp takes the first of two that are the same but for the action.
        [_depending("SCMP_ACT_KILL", 0, "SCMP_CMP_EQ", 5), _depending("SCMP_ACT_ALLOW", 0, "SCMP_CMP_EQ", 5)],
    ],
)
def test_entries_that_contradict_each_other_are_refused(entries: list[dict[str, Any]]) -> None:
    for order in (entries, entries[::-1]):
        with pytest.raises(UserInputError, match="contradicts itself") as error:
            check_profile(profile_of(*order, default="SCMP_ACT_ERRNO"), "p.json")
        assert "syscalls[0].names[0]" in error.value.details and "syscalls[1].names[0]" in error.value.details


def test_entries_that_exclude_each_other_are_taken() -> None:
    audit = [argument_of(0, "SCMP_CMP_EQ", 16), argument_of(2, "SCMP_CMP_EQ", 9)]
    profile = profile_of(
        entry("socket", "SCMP_ACT_ERRNO", errnoRet=22, args=audit),
        entry("socket", "SCMP_ACT_ALLOW", args=[argument_of(2, "SCMP_CMP_NE", 9)]),
        entry("socket", "SCMP_ACT_ALLOW", args=[argument_of(0, "SCMP_CMP_NE", 16)]),
        default="SCMP_ACT_KILL",
    )
    program = compile_profile(profile)
    assert decide(program, number_of("socket"), [16, 0, 9, 0, 0, 0]) == kernel_return("SCMP_ACT_ERRNO", 22)
    assert decide(program, number_of("socket"), [16, 0, 0, 0, 0, 0]) == ALLOW


def test_an_unknown_call_that_would_be_let_through_is_a_note() -> None:
    profile = profile_of(entry("riscv_hwprobe", "SCMP_ACT_ALLOW"), default="SCMP_ACT_ERRNO")
    check_profile(profile, "p.json")
    assert profile_notes(profile) == [
        "syscalls[0].names[0]: unknown system call 'riscv_hwprobe': it is not let through"
    ]
    assert profile_notes(SAMPLE) == []


def test_entries_that_depend_on_capabilities_kernel_and_processor() -> None:
    profile = profile_of(
        entry("mount", "SCMP_ACT_ALLOW", includes={"caps": ["CAP_SYS_ADMIN"]}),
        entry("clone3", "SCMP_ACT_ERRNO", errnoRet=38, excludes={"caps": ["CAP_SYS_ADMIN"]}),
        entry("clone3", "SCMP_ACT_ALLOW", includes={"caps": ["CAP_SYS_ADMIN"]}),
        entry("ptrace", "SCMP_ACT_ALLOW", includes={"minKernel": "4.8"}),
        entry("bpf", "SCMP_ACT_ALLOW", includes={"minKernel": "99.0"}),
        entry("arch_prctl", "SCMP_ACT_ALLOW", includes={"arches": ["amd64", "x32"]}),
        entry("modify_ldt", "SCMP_ACT_ALLOW", includes={"arches": ["arm"]}),
        default="SCMP_ACT_ERRNO",
    )
    plain, admin = compile_profile(profile), compile_profile(profile, capabilities=("sys_admin",))

    def open_in(program: bytes) -> set[str]:
        names = ("mount", "clone3", "ptrace", "bpf", "arch_prctl", "modify_ldt")
        return {name for name in names if decide(program, number_of(name), [0] * 6) == ALLOW}

    assert open_in(plain) == {"ptrace", "arch_prctl"}
    assert open_in(admin) == {"ptrace", "arch_prctl", "mount", "clone3"}
    assert decide(plain, number_of("clone3"), [0] * 6) == kernel_return("SCMP_ACT_ERRNO", 38)


def test_the_canonical_form_keeps_the_meaning() -> None:
    loose = SAMPLE.replace(",", " ,\n")
    assert canonical_profile(loose, "p") == canonical_profile(SAMPLE, "p")
    assert compile_profile(canonical_profile(loose, "p")) == compile_profile(loose)
