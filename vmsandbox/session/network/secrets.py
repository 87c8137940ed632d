"""Reads the secrets that a policy names, on the host, for the broker alone.

Without care here a secret would end in an error message, or be one that somebody else could put in its place. No value
is in any error; a file that others can write is refused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.policy.values import SecretSource
from vmsandbox.process import Programs

SHORTEST = 8  # characters: a shorter value could not be told from other text when it leaks
LONGEST = 16 << 10
_SECONDS = 60  # a password manager may ask for a touch
_LAST = 0x7E  # the last visible character of ASCII


def read_secrets(
    uses: Iterable[SecretSource], programs: Programs, environ: Mapping[str, str], project: Path
) -> dict[str, str]:
    """The values of the secrets, by name.

    Args:
        uses: `NetworkPolicy.secrets`.
        environ: of the person who starts the session.
        project: what a relative file is relative to.

    Raises:
        UserInputError: a secret is missing, empty, or cannot stand in a header. Never quotes a value.
    """
    return {use.name: _checked(use.name, _read(use, programs, environ, project)) for use in uses}


def _read(use: SecretSource, programs: Programs, environ: Mapping[str, str], project: Path) -> bytes:
    if use.env is not None:
        value = environ.get(use.env)
        if value is None:
            raise _error(use.name, f"the environment has no {use.env}", f"set {use.env} before you start the session")
        return os.fsencode(value)
    if use.file is not None:
        return _from_file(use.name, project / Path(use.file).expanduser(), project)
    return _from_command(use, programs, project)


def _from_file(name: str, path: Path, project: Path) -> bytes:
    try:
        # On purpose not blocking: a FIFO would hold the session for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise _error(
            name, f"{path} cannot be read: {error.strerror}", "make it readable, or name another file"
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _error(name, f"{path} is no file", "name a file, or use a command")
        if status.st_uid not in (0, os.geteuid(), project.stat().st_uid):
            raise _error(name, f"{path} belongs to another user", "take a file of your own")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _error(name, f"others can write {path}", f"chmod go-w {path}")
        return os.read(descriptor, LONGEST + 3)
    except OSError as error:
        raise _error(name, f"{path} cannot be read: {error.strerror}", "name another file") from None
    finally:
        os.close(descriptor)


def _from_command(use: SecretSource, programs: Programs, project: Path) -> bytes:
    program = use.command[0] if use.command else ""
    try:
        finished = programs.run(use.command, timeout=_SECONDS, check=False, cwd=project)
    except HostError as error:
        raise _error(use.name, error.brief, "run the command by hand to see what it needs") from None
    if finished.status != 0:
        # On purpose without its output: the secret may be in it.
        why = f"{program} ended with status {finished.status}"
        raise _error(use.name, why, "run the command by hand to see what it says")
    return finished.stdout


def _checked(name: str, raw: bytes) -> str:
    value = raw.removesuffix(b"\n").removesuffix(b"\r")
    if not value:
        raise _error(name, "it is empty", "see where the policy takes it from")
    if any(code < 0x20 or code > _LAST for code in value) or value.strip() != value:
        why = "it has spaces around it, more than one line, control characters or letters beyond ASCII"
        raise _error(name, why, "a header cannot hold that: give the key or token alone")
    if not SHORTEST <= len(value) <= LONGEST:
        raise _error(name, f"it is shorter than {SHORTEST} or longer than {LONGEST} characters", "is it the right one?")
    return value.decode("ascii")


def _error(name: str, why: str, resolution: str) -> UserInputError:
    return UserInputError(
        f"the secret {name} cannot be used: {why}", details=f"network.secrets, {name}", resolution=resolution
    )
