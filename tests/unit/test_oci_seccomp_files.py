"""What is refused in a seccomp profile's file, with the place of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from seccomp_profiles import argument_of, entry, profile_of

from vmsandbox.errors import UserInputError
from vmsandbox.policy.seccomp.oci import check_profile

ERRNO, KILL = "SCMP_ACT_ERRNO", "SCMP_ACT_KILL"


def conditional(*arguments: dict[str, Any]) -> dict[str, Any]:
    return entry("read", ERRNO, args=list(arguments))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a JSON object"),
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"defaultAction": NaN}', "unknown action"),
        ('{"defaultAction": 1' + "0" * 5000 + "}", "not JSON"),
        ("{}", "defaultAction: missing"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "defaultAction": "SCMP_ACT_KILL"}', "'defaultAction' is given twice"),
        (
            profile_of(default="SCMP_ACT_ALOW"),
            "unknown action 'SCMP_ACT_ALOW' (did you mean SCMP_ACT_ALLOW?)",
        ),
        (profile_of(syscall=[]), "syscall: unknown key (did you mean syscalls?)"),
        (profile_of(defaultErrnoRet=1), "defaultErrnoRet: SCMP_ACT_ALLOW returns no error"),
        (profile_of(default=ERRNO, defaultErrnoRet=5000), "defaultErrnoRet: not a number from 0 to 4095"),
        (profile_of(default=ERRNO, defaultErrnoRet=True), "defaultErrnoRet: not a number"),
        (profile_of(architectures=["SCMP_ARCH_X64"]), "architectures[0]: unknown architecture"),
        (profile_of(architectures=["SCMP_ARCH_AARCH64"]), "architectures: is not for SCMP_ARCH_X86_64"),
        (profile_of(architectures="SCMP_ARCH_X86"), "architectures: not a list"),
        (profile_of(archMap=[{"architecture": "SCMP_ARCH_ARM"}]), "archMap: is not for SCMP_ARCH_X86_64"),
        (profile_of(flags=["TSYNC"]), "flags[0]: unknown flag"),
        (profile_of(entry("read", "ALLOW")), "syscalls[0].action: unknown action 'ALLOW'"),
        (profile_of({"names": ["read"]}), "syscalls[0].action: missing"),
        (profile_of({"names": [], "action": KILL}), "syscalls[0].names: no system call is named"),
        (profile_of({"names": ["read", "read"], "action": KILL}), "syscalls[0].names[1]: 'read' is named twice"),
        (profile_of({"names": ["read"], "name": "read", "action": KILL}), "syscalls[0].name: 'read' is named twice"),
        (profile_of(entry("ptrase", KILL)), "names[0]: unknown system call 'ptrase' (did you mean ptrace?): it would"),
        (profile_of(entry("read\0", KILL)), r"unknown system call 'read\x00'"),
        (profile_of({"names": [7], "action": KILL}), "syscalls[0].names[0]: not the name"),
        (profile_of(entry("read", KILL, errnoRet=1)), "syscalls[0].errnoRet: SCMP_ACT_KILL returns no error"),
        (profile_of(entry("read", ERRNO, errno="EPRM")), "syscalls[0].errno: not the name of an error"),
        (profile_of(entry("read", ERRNO, errno="EPERM", errnoRet=2)), "errno: EPERM is 1, but errnoRet says 2"),
        (profile_of(conditional(argument_of(6, "SCMP_CMP_EQ", 1))), "args[0].index: not a number from 0 to 5"),
        (profile_of(conditional(argument_of(0, "SCMP_CMP_EQ", 2**64))), "args[0].value: not a number"),
        (profile_of(conditional(argument_of(0, "SCMP_CMP_EQ", -1))), "args[0].value: not a number"),
        (profile_of(conditional({"index": 0, "value": 1})), "args[0].op: unknown operator None"),
        (profile_of(conditional(argument_of(0, "==", 1))), "args[0].op: unknown operator '=='"),
        (profile_of(conditional(argument_of(0, "SCMP_CMP_EQ", 1, 2))), "args[0].valueTwo: has a meaning"),
        (profile_of(conditional(argument_of(0, "SCMP_CMP_MASKED_EQ", 1, 2))), "args[0].valueTwo: has bits"),
        (
            profile_of(conditional(argument_of(0, "SCMP_CMP_GE", 1), argument_of(0, "SCMP_CMP_LE", 2))),
            "argument 0 more than once",
        ),
        (profile_of(entry("read", ERRNO, includes={"cap": []})), "syscalls[0].includes.cap: unknown key"),
        (profile_of(entry("read", ERRNO, excludes={"caps": ["CAP_ADMIN"]})), "excludes.caps[0]: not a capability"),
        (profile_of(entry("read", ERRNO, includes={"minKernel": "new"})), "includes.minKernel: not a kernel version"),
        (json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "x" * 300_000}), "larger than 256 KiB"),
    ],
)
def test_a_profile_that_is_wrong_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(UserInputError) as error:
        check_profile(text, "p.json")
    assert said in error.value.details and "p.json" in error.value.brief


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UserInputError) as error:
        check_profile(profile_of(entry("nope", KILL), entry("read", "NO"), typo=1), "p.json")
    assert len(error.value.details.splitlines()) == 3


def test_a_file_of_nonsense_is_refused_fast() -> None:
    many = json.dumps({f"k{number}": 0 for number in range(20_000)})
    names = json.dumps(
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [f"n{n}" for n in range(20_000)], "action": KILL}]}
    )
    for text in (many, names):
        with pytest.raises(UserInputError) as error:
            check_profile(text, "p.json")
        assert len(error.value.details.splitlines()) == 50
