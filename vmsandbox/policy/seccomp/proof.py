"""Runs a seccomp program over the edges of its conditions, and compares with what the profile says.

Without it libseccomp would be trusted where it promises nothing: see `native.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import product

from vmsandbox.errors import UserInputError
from vmsandbox.policy.seccomp.values import ARCHITECTURES, NATIVE, Condition, Rule, rank

# The classic BPF instructions that are used (linux/filter.h, linux/bpf_common.h), all on 32-bit words.
LOAD, AND, JUMP, RETURN, JUMP_IF_EQUAL, JUMP_IF_MORE, JUMP_IF_AT_LEAST = 0x20, 0x54, 0x05, 0x06, 0x15, 0x25, 0x35
_MAX_STEPS = 200_000
_ALL_BITS = (1 << 64) - 1


def contradiction(title: str, one: Rule, other: Rule, why: str) -> UserInputError:
    return UserInputError(
        f"the seccomp profile {title} contradicts itself about {one.name}",
        details=f"{one.where} would not count beside {other.where}: {why}",
        resolution="write each call's entries so that at most one of them fits",
    )


def decide(program: bytes, number: int, arguments: Sequence[int], architecture: str = NATIVE) -> int:
    """What a program of libseccomp's returns for a call: an interpreter of the instructions that it uses."""
    word = ARCHITECTURES["SCMP_ARCH_X86_64" if architecture == "SCMP_ARCH_X32" else architecture]
    data = struct.pack("=IIQ6Q", number, word, 0, *arguments)
    accumulator = at = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == LOAD:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == AND:
            accumulator &= value
        elif code == JUMP:
            at += value
        elif code == RETURN:
            return int(value)
        else:
            taken = {
                JUMP_IF_EQUAL: accumulator == value,
                JUMP_IF_MORE: accumulator > value,
                JUMP_IF_AT_LEAST: accumulator >= value,
            }[code]
            at += if_true if taken else if_false


def prove(program: bytes, number: int | None, rules: list[Rule], default: int, title: str) -> None:
    """Try every edge of every condition: the strictest rule that fits has to be what the program returns.

    Args:
        program: of the whole profile.
        number: of the call on x86_64.
        rules: the call's, with more than one action.
        default: what is returned where none fits.
        title: of the profile, for the error.

    Raises:
        UserInputError: it is not, or this cannot be told.
    """
    name = rules[0].name
    if number is None or number < 0:
        raise _unproved(title, name, rules)
    edges = [sorted(_edges([c for rule in rules for c in rule.conditions if c.index == index])) for index in range(6)]
    count = len(rules)
    for values in edges:
        count *= len(values)
    if count > _MAX_STEPS:
        raise _unproved(title, name, rules)
    for arguments in product(*edges):
        fitting = [rule for rule in rules if all(one.holds(arguments[one.index]) for one in rule.conditions)]
        strictest = min(fitting, key=lambda rule: rank(rule.returns), default=None)
        expected = default if strictest is None else strictest.returns
        found = decide(program, number, arguments)
        if rank(found) > rank(expected) or (len(fitting) < 2 and found != expected):
            one, other = (fitting + rules)[:2]
            shown = ", ".join(hex(value) for value in arguments)
            raise contradiction(title, one, other, f"both fit {name}({shown}), or nearly so")


def _unproved(title: str, name: str, rules: list[Rule]) -> UserInputError:
    return UserInputError(
        f"the seccomp profile {title} has entries about {name} that cannot be compared",
        details="different actions depend on the arguments: " + ", ".join(rule.where for rule in rules),
        resolution="give them the same action, or fewer conditions",
    )


def _edges(conditions: list[Condition]) -> set[int]:
    if not conditions:
        return {0}
    found = {0, _ALL_BITS}
    for one in conditions:
        if one.operator == "SCMP_CMP_MASKED_EQ":
            lowest = one.value & -one.value
            found |= {one.two, one.two | (_ALL_BITS & ~one.value), one.two ^ lowest}
            # Together with another mask's bits.
            found |= {one.two | other.two for other in conditions} | {one.two | other.value for other in conditions}
        else:
            found |= {value & _ALL_BITS for value in (one.value - 1, one.value, one.value + 1)}
    return found
