"""Says which programs of a guest a seccomp profile lets start, and which system calls they lack.

Without it a person would learn from a session that does not even give a prompt. The data (`syscalls_needed.json`) was
recorded in a guest, not guessed: see `tools/record_syscalls.py`.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Collection
from functools import cache
from pathlib import Path

from vmsandbox.policy.lint import Finding
from vmsandbox.policy.seccomp.oci import profile_notes
from vmsandbox.policy.seccomp.reader import ProfileReader
from vmsandbox.policy.seccomp.values import Filter, answers, permits, rank
from vmsandbox.policy.values import KernelPolicy

DATA = Path(__file__).with_name("syscalls_needed.json")
# Runs only when there are several profiles: it puts the next one on.
SETPRIV = "setpriv"


@cache
def recorded() -> dict[str, dict[str, list[str]]]:
    """Program -> what it makes, and what it needs where the rest fails with EPERM or with ENOSYS; names of calls."""
    found: dict[str, dict[str, list[str]]] = json.loads(DATA.read_text(encoding="utf-8"))["programs"]
    return found


def missing_calls(
    text: str, capabilities: Collection[str] = (), where: str = "profile", *, stacked: bool = False
) -> dict[str, list[str]]:
    """The programs that cannot start under a profile, each with the calls that it lacks.

    A call that ends the process is missing if the program makes it; one that fails, if the program cannot do without.
    One that the profile permits with some arguments counts as permitted.

    Args:
        text, capabilities, where: as in `oci_seccomp.compile_profile`.
        stacked: whether another profile is put on after this one.

    Raises:
        UserInputError: it is no profile.
    """
    wanted = ProfileReader(where).read(text, capabilities)
    returned = _returned(wanted)
    found = {}
    for program, calls in recorded().items():
        if (stacked or program != SETPRIV) and (lacks := _lacking(wanted, returned, calls)):
            found[program] = lacks
    return found


def kernel_findings(kernel: KernelPolicy) -> list[Finding]:
    """What `policy check` says about the seccomp profiles, the programs that cannot start first."""
    missing, notes = [], []
    several = len(kernel.seccomp) > 1
    for number, profile in enumerate(kernel.seccomp):
        at = f"kernel.seccomp[{number}]" if several else "kernel.seccomp"
        name = str(profile.source)
        # They are put on in an order of their own: each may have to let the next one be put on.
        found = missing_calls(profile.text, kernel.capabilities, name, stacked=several)
        for program, calls in found.items():
            text = f"{profile.source.name} does not let {program} run: it lacks {', '.join(calls)}"
            missing.append(Finding(at, text, True))
        for note in profile_notes(profile.text, name):
            notes.append(Finding(at, f"{profile.source.name}: {note}", False))
    return missing + notes


def is_permitted(kernel: KernelPolicy, call: str) -> bool:
    """Whether all profiles permit a system call, at least with some arguments."""
    for profile in kernel.seccomp:
        wanted = ProfileReader(str(profile.source)).read(profile.text, kernel.capabilities)
        if not permits(_returned(wanted).get(call, wanted.default)):
            return False
    return True


def _returned(wanted: Filter) -> dict[str, int]:
    """Call → the best that it can come to, where the profile has something to say of it."""
    returned: dict[str, int] = {}
    for rule in wanted.rules:
        returned[rule.name] = max(returned.get(rule.name, rule.returns), rule.returns, key=rank)
        if rule.conditions:
            returned[rule.name] = max(returned[rule.name], wanted.default, key=rank)
    return returned


def _lacking(wanted: Filter, returned: dict[str, int], calls: dict[str, list[str]]) -> list[str]:
    lacks = []
    for name in calls["makes"]:
        result = returned.get(name, wanted.default)
        if permits(result):
            continue
        needed = calls["ENOSYS" if result & 0xFFFF == errno.ENOSYS else "EPERM"]
        if not answers(result) or name in needed:
            lacks.append(name)
    return lacks
