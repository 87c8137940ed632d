"""What `policy check` says about seccomp profiles was recorded in a guest: it still fits what the programs do there."""

from __future__ import annotations

import json

from harness import REPOSITORY, Guest

from vmsandbox.policy.seccomp.native import syscall_names
from vmsandbox.policy.syscalls_needed import recorded

RECORDER = REPOSITORY / "tools/record_syscalls.py"
TRIED = ("login", "bash", "the host's read-back", "git commit", "python3")  # the others take long, or are not in `base`


def test_the_recorded_calls_are_still_enough(guest: Guest) -> None:
    numbers = {name: number for number, name in syscall_names().items()}
    expected = {
        program: {kind: [numbers[name] for name in names] for kind, names in kinds.items()}
        for program, kinds in recorded().items()
        if program in TRIED
    }
    argv = ("python3", "-I", "-S", "-", "check", json.dumps(expected))
    said = guest.exec(*argv, stdin=RECORDER.read_bytes(), timeout=300).stdout
    found = {program: result for line in said.splitlines() for program, result in json.loads(line).items()}
    assert set(found) == set(TRIED)
    for program, result in found.items():
        new = [syscall_names()[number] for number in result["new"]]
        assert result == {"new": [], "EPERM": True, "ENOSYS": True}, (program, new, "python tools/renew_syscalls.py")
