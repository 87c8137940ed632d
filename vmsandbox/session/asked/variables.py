"""The variables that a policy passes into its guest: named ones of the host, and values of its own.

Nothing of the host's environment gets in unless it is named. A name that would change what programs of ours in the
guest do (a loader's, a shell's start-up file, our own) is refused instead of passed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vmsandbox.errors import UserInputError
from vmsandbox.policy.values import Policy

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = re.compile(r"LD_.*|GLIBC_TUNABLES|GCONV_PATH|BASH_ENV|ENV|SHELLOPTS|BASHOPTS|BASH_FUNC.*|VMSANDBOX.*")
_MOST_BYTES = 16 << 10  # of all: they travel in one message of 64 KiB, beside certificates


def guest_variables(policy: Policy, host: Mapping[str, str]) -> dict[str, str]:
    """`session.environment` of the host's variables, then `session.variables`. One that the host has not is left out.

    Raises:
        UserInputError: a name or value that no guest can have, named with its key.
    """
    chosen: dict[str, str] = {}
    for number, name in enumerate(policy.session.environment):
        key = f"session.environment[{number}]"
        _check_name(policy, key, name)
        if name in host:
            chosen[name] = _checked(policy, f"{key}: the host's {name}", host[name])
    for name, value in policy.session.variables:
        key = f"session.variables.{name}"
        _check_name(policy, key, name)
        chosen[name] = _checked(policy, key, value)
    if sum(len(f"{name}={value}".encode()) for name, value in chosen.items()) > _MOST_BYTES:
        raise _refused(policy, "session.variables", f"all of them may have {_MOST_BYTES} bytes", "")
    return chosen


def _check_name(policy: Policy, key: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise _refused(policy, key, "not a variable's name", "a name has letters, digits and `_`")
    if _RESERVED.fullmatch(name):
        raise _refused(policy, key, f"{name} may not be set", "it would change how the guest's own programs start")


def _checked(policy: Policy, key: str, value: str) -> str:
    if value and not value.isprintable():
        raise _refused(policy, key, "a value of one line, of characters that can be printed", "")
    return value


def _refused(policy: Policy, key: str, why: str, resolution: str) -> UserInputError:
    where = f" ({policy.source})" if policy.source else ""
    return UserInputError(f"sandbox.{key}: {why}", details=where.strip(), resolution=resolution)
