"""Reads an OCI/Docker seccomp profile strictly, and compiles it for the guest's kernel.

Without the strictness a misspelt action or system call would leave a call open that the profile's author believes
closed: other readers skip what they do not know. Format: OCI runtime specification, config-linux.md, "Seccomp";
Docker's own keys (archMap, includes, excludes, name): moby/profiles/seccomp.

What an action does here: ALLOW, LOG, ERRNO, TRAP, KILL, KILL_THREAD and KILL_PROCESS as in seccomp(2). TRACE and NOTIFY
answer ENOSYS, as the kernel does when the program is missing that would decide. An unknown system call is a warning
(`profile_notes`) where it would be let through, and an error where the profile wants it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from vmsandbox.policy.seccomp.native import compile_filter
from vmsandbox.policy.seccomp.reader import ProfileReader
from vmsandbox.policy.seccomp.values import Filter


def check_profile(text: str, where: str) -> None:
    """Check a profile, also that it compiles. where: the file, for the error.

    Raises:
        UserInputError: all that is wrong, each with its place in the JSON.
        HostError: there is no libseccomp on this host.
    """
    compile_filter(ProfileReader(where).read(text, ()), where)


def canonical_profile(text: str, where: str) -> str:
    """The checked profile as JSON in one form: equal profiles make equal guests."""
    check_profile(text, where)
    return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def profile_notes(text: str, where: str = "profile") -> list[str]:
    """What of a valid profile has no effect here, one sentence each."""
    reader = ProfileReader(where)
    reader.read(text, ())
    return reader.notes


def compile_profile(text: str, capabilities: Collection[str] = (), where: str = "profile") -> bytes:
    """The classic BPF program of a profile for an x86_64 guest, as `setpriv --seccomp-filter` takes it.

    Args:
        text: the profile.
        capabilities: what the worker may have (`sys_admin`), for entries that depend on it.
        where: the file, for errors.

    Raises:
        UserInputError, HostError: as `check_profile`.
    """
    return compile_filter(ProfileReader(where).read(text, capabilities), where)


def read_profile(text: str, capabilities: Collection[str] = (), where: str = "profile") -> Filter:
    """The rules of a profile that hold in a guest. Raises as `check_profile`."""
    return ProfileReader(where).read(text, capabilities)
