"""Finds and reads a policy file, and says exactly where it is wrong.

Without the line, the key and a suggestion, a person whose policy is refused would delete the policy.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UserInputError
from vmsandbox.policy.format.strictyaml import MAX_BYTES, StrictYaml
from vmsandbox.policy.layer import Layer, SignedBy, said_keys
from vmsandbox.policy.packaged import packaged_policy
from vmsandbox.policy.values import Policy, SeccompProfile

if TYPE_CHECKING:
    from vmsandbox.policy.format.model import Sandbox

NAMES = (".claude/sandbox.yaml", ".vmsandbox.yaml")
_EXAMPLE = "sandbox: {filesystem: {denied_paths: [./secrets/]}}"


def find_policy(project: Path) -> Path | None:
    """The project's policy file: `.claude/sandbox.yaml`, else `.vmsandbox.yaml`, else None.

    Raises:
        UserInputError: whether there is one cannot be told (no permission). A policy is never skipped
            silently.
    """
    for name in NAMES:
        path = project / name
        try:
            path.lstat()  # a dangling link counts: reading it then says what is wrong
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserInputError(
                f"the policy cannot be looked for: {path}",
                details=str(error),
                resolution="make its folder readable, or name a policy with --policy",
            ) from error
        return path
    return None


def load_policy(path: Path) -> Policy:
    """Read and check one policy file (the format of `.claude/sandbox.yaml`, at most 256 KiB).

    Raises:
        UserInputError: it cannot be read, or is not a policy; names the file, the line and the key.
    """
    return load_layer(path).policy


def load_layer(path: Path, *, organisation: bool = False) -> Layer:
    """The same, with the keys that the file has, their lines, and the bytes that were read.

    Args:
        organisation: whether it is the organisation's file, which alone may demand signatures.
    """
    path = packaged_policy(path)
    content = read_bounded(path, "the policy")
    from vmsandbox.policy.format.model import PolicyFile
    from vmsandbox.policy.from_model import policy_of

    reader = StrictYaml(f"the policy {path}", _EXAMPLE)
    sandbox = reader.read(content, PolicyFile).sandbox
    files = [(path, content)]
    profiles = []
    for number, name in enumerate(sandbox.kernel.seccomp):
        profile, raw = _profile(path, reader, number, name)
        profiles.append(profile)
        files.append((profile.source, raw))
    policy = policy_of(sandbox, path, tuple(profiles))
    return Layer(
        policy, said_keys(reader.lines), dict(reader.lines), tuple(files), _signed(sandbox, reader, organisation)
    )


def read_bounded(path: Path, what: str, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file that a person named.

    Args:
        what: what it is called in errors.
        most: how many bytes it may have.

    Raises:
        UserInputError: it cannot be read, is no regular file, or is too large.
    """
    # O_NONBLOCK: a FIFO in the file's place must not block.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserInputError(f"{what} cannot be read: {path}", details=str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserInputError(f"{what} is not a regular file: {path}", resolution="name another file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserInputError(f"{what} cannot be read: {path}", details=str(error)) from error
    finally:
        os.close(fd)
    if len(content) > most:
        raise UserInputError(
            f"{what} is too large: {path}",
            details=f"it may have {most // 1024} KiB",
            resolution="is it the right file?",
        )
    return content


def _profile(policy: Path, reader: StrictYaml, number: int, name: str) -> tuple[SeccompProfile, bytes]:
    """One seccomp profile that the policy names, read and checked."""
    from vmsandbox.policy.seccomp.oci import check_profile

    key = ("sandbox", "kernel", "seccomp")
    where = (*key, number) if (*key, number) in reader.lines else key
    path = policy.parent / name
    try:
        raw = read_bounded(path, "the seccomp profile")
        text = canonical_json(raw)
        check_profile(text, str(path))
    except UserInputError as error:
        raise reader.invalid([reader.at(where, error.brief), *error.details.splitlines()]) from error
    except ValueError as error:
        raise reader.invalid([reader.at(where, f"{path} is not a seccomp profile: {error}")]) from None
    return SeccompProfile(path, text), raw


def canonical_json(raw: bytes) -> str:
    """A JSON object in its one form: sorted keys, no spaces.

    Raises:
        ValueError: it is none, or a key is in it twice.
    """
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _signed(sandbox: Sandbox, reader: StrictYaml, organisation: bool) -> SignedBy | None:
    if sandbox.signed is None:
        return None
    problem = ""
    if not organisation:
        problem = "only the organisation's file may demand signatures"
    elif not sandbox.signed.allowed_signers.startswith("/"):
        problem = "allowed_signers has to be an absolute path"
    if problem:
        raise reader.invalid([reader.at(("sandbox", "signed"), problem)])
    return SignedBy(Path(sandbox.signed.allowed_signers), tuple(sandbox.signed.principals or ()))
