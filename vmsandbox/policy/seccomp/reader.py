"""From the JSON of a seccomp profile to the rules that hold in a guest.

Without it `oci.py` would be one file too long to be read. What each key means is said there.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from vmsandbox.policy.format.checkedjson import CheckedJson, shown
from vmsandbox.policy.format.words import capability
from vmsandbox.policy.seccomp.native import syscall_names, syscall_number
from vmsandbox.policy.seccomp.values import (
    ACTIONS,
    ARCHITECTURES,
    NATIVE,
    OPERATORS,
    UNDECIDED,
    Condition,
    Filter,
    Rule,
    kernel_return,
    permits,
)

GUEST_KERNEL = (6, 1)  # the oldest of an image in images/; for includes.minKernel
_MAX_ERRNO = 4095
_GO_ARCHITECTURE = "amd64"
_TOP = (
    "defaultAction", "defaultErrnoRet", "defaultErrno", "architectures", "archMap", "syscalls", "flags",
    "listenerPath", "listenerMetadata",
)  # fmt: skip
_ENTRY = ("name", "names", "action", "args", "errnoRet", "errno", "comment", "includes", "excludes")
_ARGUMENT = ("index", "value", "valueTwo", "op")
_CONDITIONS = ("caps", "arches", "minKernel")
_OTHER_ARCHITECTURES = (
    "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC", "PPC64", "PPC64LE",
    "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB",
)  # fmt: skip
_ALL_ARCHITECTURES = (*ARCHITECTURES, *(f"SCMP_ARCH_{name}" for name in _OTHER_ARCHITECTURES))
_FLAGS = (
    "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
)  # fmt: skip


class ProfileReader(CheckedJson):
    """One profile on its way to a `Filter`; gathers what is wrong and what has no effect."""

    def __init__(self, where: str) -> None:
        example = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["ptrace"], "action": "SCMP_ACT_ERRNO"}],
        }
        super().__init__(f"the seccomp profile {where}", f"correct the file; an example: {json.dumps(example)}")

    def read(self, text: str, capabilities: Collection[str]) -> Filter:
        data = self.parsed(text)
        if not self.mapping(data, "", _TOP):
            raise self.invalid()
        action = data.get("defaultAction")
        default = self._returned(data, "", action, "defaultAction", ("defaultErrnoRet", "defaultErrno"))
        architectures = self._architectures(data)
        rules: list[Rule] = []
        for number, entry in enumerate(self.items(data, "", "syscalls")):
            rules += self._entry(entry, f"syscalls[{number}]", default, capabilities)
        for number, flag in enumerate(self.items(data, "", "flags")):
            self.one_of(flag, f"flags[{number}]", "flag", _FLAGS)
            if flag == "SECCOMP_FILTER_FLAG_LOG":
                self.notes.append(f"flags[{number}]: {flag} has no effect: what is refused is not logged in the guest")
        for key in ("listenerPath", "listenerMetadata"):
            if not isinstance(data.get(key, ""), str):
                self.problem(key, "not a text")
            elif data.get(key):
                self.notes.append(f"{key}: has no effect: no program of the host decides about system calls")
        if self.problems:
            raise self.invalid()
        return Filter(default, architectures, tuple(rules))

    def _entry(self, entry: Any, at: str, default: int, capabilities: Collection[str]) -> list[Rule]:
        if not self.mapping(entry, at, _ENTRY):
            return []
        names = self._names(entry, at)
        returned = self._returned(entry, f"{at}.", entry.get("action"), "action", ("errnoRet", "errno"))
        conditions = tuple(
            one
            for number, argument in enumerate(self.items(entry, f"{at}.", "args"))
            if (one := self._condition(argument, f"{at}.args[{number}]")) is not None
        )
        for index, times in Counter(one.index for one in conditions).items():
            if times > 1:
                told = "some runtimes take both, some either; SCMP_CMP_MASKED_EQ, or an entry each"
                self.problem(f"{at}.args", f"argument {index} more than once: {told}")
        if not isinstance(entry.get("comment", ""), str):
            self.problem(f"{at}.comment", "not a text")
        included = self._applies(entry, at, "includes", capabilities)
        excluded = self._applies(entry, at, "excludes", capabilities)
        known = [(place, name) for place, name in names if self._known(place, name, permits(returned))]
        if not included or excluded:
            return []
        return [Rule(place, name, returned, conditions) for place, name in known]

    def _names(self, entry: dict[str, Any], at: str) -> list[tuple[str, str]]:
        found = [(f"{at}.names[{number}]", one) for number, one in enumerate(self.items(entry, f"{at}.", "names"))]
        if "name" in entry:
            found.append((f"{at}.name", entry["name"]))
        if not found:
            self.problem(f"{at}.names", "no system call is named")
        names: list[tuple[str, str]] = []
        seen: set[str] = set()
        for place, name in found:
            if not isinstance(name, str) or not name:
                self.problem(place, "not the name of a system call")
            elif name in seen:
                self.problem(place, f"{shown(name)} is named twice")
            else:
                seen.add(name)
                names.append((place, name))
        return names

    def _known(self, place: str, name: str, permitted: bool) -> bool:
        number = syscall_number(name) if name.isascii() and name.isprintable() else None
        if number is not None:
            return True
        text = f"unknown system call {shown(name)}{self.close(name, tuple(syscall_names().values()))}"
        if permitted:
            self.notes.append(f"{place}: {text}: it is not let through")
        else:
            self.problem(place, f"{text}: it would not be stopped")
        return False

    def _returned(self, holder: dict[str, Any], at: str, action: Any, key: str, errors: tuple[str, str]) -> int:
        """What the kernel is to return for the action in `holder[key]` with its errno, ALLOW if it is wrong."""
        if key not in holder:
            self.problem(f"{at}{key}", "missing")
            return kernel_return("SCMP_ACT_ALLOW", 0)
        if not self.one_of(action, f"{at}{key}", "action", ACTIONS):
            return kernel_return("SCMP_ACT_ALLOW", 0)
        if action in UNDECIDED:
            self.notes.append(f"{at}{key}: {action} answers ENOSYS: there is no program that decides")
        number = self._errno(holder, at, errors)
        if number is not None and action not in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
            self.problem(f"{at}{errors[0]}", f"{action} returns no error")
        return kernel_return(action, errno.EPERM if number is None else number)

    def _errno(self, holder: dict[str, Any], at: str, keys: tuple[str, str]) -> int | None:
        number, name = holder.get(keys[0]), holder.get(keys[1]) or None
        if number is not None and (type(number) is not int or not 0 <= number <= _MAX_ERRNO):
            self.problem(f"{at}{keys[0]}", f"not a number from 0 to {_MAX_ERRNO}")
            return None
        if name is None:
            return number
        named = getattr(errno, name, None) if isinstance(name, str) and name in errno.errorcode.values() else None
        if named is None:
            self.problem(f"{at}{keys[1]}", f"not the name of an error: {shown(name)}")
        elif number not in (None, named):
            self.problem(f"{at}{keys[1]}", f"{name} is {named}, but {keys[0]} says {number}")
        return named

    def _condition(self, argument: Any, at: str) -> Condition | None:
        if not self.mapping(argument, at, _ARGUMENT):
            return None
        before = len(self.problems)
        numbers = {}
        for key, most, default in (("index", 5, None), ("value", 2**64 - 1, None), ("valueTwo", 2**64 - 1, 0)):
            number = argument.get(key, default)
            if type(number) is not int or not 0 <= number <= most:
                self.problem(f"{at}.{key}", "missing" if key not in argument else f"not a number from 0 to {most}")
            numbers[key] = number
        operator = argument.get("op")
        self.one_of(operator, f"{at}.op", "operator", tuple(OPERATORS))
        if len(self.problems) > before:
            return None
        value, two = numbers["value"], numbers["valueTwo"]
        if operator != "SCMP_CMP_MASKED_EQ" and two:
            self.problem(f"{at}.valueTwo", "has a meaning with SCMP_CMP_MASKED_EQ alone")
        elif operator == "SCMP_CMP_MASKED_EQ" and two & ~value:
            self.problem(f"{at}.valueTwo", "has bits that the mask (value) takes away: it is never equal")
        return Condition(numbers["index"], operator, value, two)

    def _architectures(self, data: dict[str, Any]) -> tuple[str, ...]:
        """Those beside the native one, which always counts: everything in the guest is of it."""
        named: list[Any] = []
        for number, one in enumerate(self.items(data, "", "architectures")):
            self.one_of(one, f"architectures[{number}]", "architecture", _ALL_ARCHITECTURES)
            named.append(one)
        for number, entry in enumerate(self.items(data, "", "archMap")):
            at = f"archMap[{number}]"
            if not self.mapping(entry, at, ("architecture", "subArchitectures")):
                continue
            main = entry.get("architecture")
            self.one_of(main, f"{at}.architecture", "architecture", _ALL_ARCHITECTURES)
            for position, one in enumerate(self.items(entry, f"{at}.", "subArchitectures")):
                self.one_of(one, f"{at}.subArchitectures[{position}]", "architecture", _ALL_ARCHITECTURES)
                named += [one] if main == NATIVE else []
            named += [main] if main == NATIVE else []
        if data.get("architectures") and data.get("archMap"):
            self.problem("archMap", "stands beside `architectures`: one of them")
        if (data.get("architectures") or data.get("archMap")) and not set(ARCHITECTURES) & {str(x) for x in named}:
            self.problem(
                "architectures" if data.get("architectures") else "archMap",
                f"is not for {NATIVE}, which the guests are",
            )
        return tuple(one for one in ARCHITECTURES if one != NATIVE and one in named)

    def _applies(self, entry: dict[str, Any], at: str, key: str, capabilities: Collection[str]) -> bool:
        """Whether `includes` hold, all of them (also if there are none), or one of `excludes`: moby's setupSeccomp."""
        if entry.get(key) is None:
            return key == "includes"
        part, at = entry[key], f"{at}.{key}"
        if not self.mapping(part, at, _CONDITIONS):
            return False
        held = []
        for number, one in enumerate(self.items(part, f"{at}.", "caps")):
            try:
                held.append(capability(one if isinstance(one, str) else "") in capabilities)
            except ValueError:
                self.problem(f"{at}.caps[{number}]", f"not a capability: {shown(one)}")
        if arches := self.items(part, f"{at}.", "arches"):
            held.append(_GO_ARCHITECTURE in arches)
        if part.get("minKernel"):
            kernel = str(part["minKernel"]).split(".")
            if len(kernel) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 5 for word in kernel):
                self.problem(f"{at}.minKernel", "not a kernel version such as 4.8")
            else:
                held.append((int(kernel[0]), int(kernel[1])) <= GUEST_KERNEL)
        return all(held) if key == "includes" else any(held)
