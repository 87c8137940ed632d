"""Signatures of policy files, by ssh-keygen: made for reviewers, demanded by hosts.

Without them whoever can write into a project decides what its agent may do. A signature is checked over the bytes that
were read and are acted on, never over a file that may have changed since; and it covers the seccomp profiles that a
policy names as well as the policy.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vmsandbox.errors import HostError, RefusedError, UserInputError
from vmsandbox.policy.layer import Layer, SignedBy
from vmsandbox.policy.load import load_layer, read_bounded
from vmsandbox.process import Programs

NAMESPACE = "vmsandbox-policy"
_MOST = 64 << 10  # bytes of a signature
_SECONDS = 30


def signature_of(path: Path) -> Path:
    """Where the signature of a file is."""
    return path.with_name(path.name + ".sig")


def sign(path: Path, key: Path, programs: Programs) -> list[Path]:
    """Sign a policy and the seccomp profiles that it names.

    Args:
        key: a private SSH key without a passphrase, or the public half of one that ssh-agent holds.

    Returns:
        The signatures' files.

    Raises:
        UserInputError: it is no policy, or the key cannot be used.
    """
    made = []
    # SSH_ASKPASS: a key with a passphrase fails at once, instead of waiting for one where nobody can type it.
    environment = {"SSH_ASKPASS": "/bin/false", "SSH_ASKPASS_REQUIRE": "force"}
    if agent := os.environ.get("SSH_AUTH_SOCK"):
        environment["SSH_AUTH_SOCK"] = agent
    for file, content in load_layer(path).files:
        try:
            done = programs.run(
                ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", key.absolute()],
                stdin=content,
                env=environment,
                timeout=_SECONDS,
            )
        except HostError as error:
            raise UserInputError(
                f"{file} could not be signed",
                details=error.details,
                resolution="name a private key with --key, or the .pub of one that ssh-agent holds",
            ) from error
        made.append(_write(signature_of(file), done.stdout))
    return made


def check_signatures(layer: Layer, demanded: SignedBy, programs: Programs) -> None:
    """Refuse a layer of which a file is not signed as the host demands.

    Raises:
        RefusedError: a signature is missing, or is not that of these bytes by one of those who may sign.
    """
    for file, content in layer.files:
        path = signature_of(file)
        try:
            signature = read_bounded(path, "the signature", _MOST)
        except UserInputError as error:
            raise _refusal(file, error.details or error.brief) from error
        _check(file, content, signature, demanded, programs)


def _check(file: Path, content: bytes, signature: bytes, demanded: SignedBy, programs: Programs) -> None:
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        copy = Path(folder) / "signature"  # ssh-keygen reads it twice
        copy.write_bytes(signature)
        common: list[str | Path] = ["-f", demanded.allowed_signers, "-s", copy]
        found = programs.run(["ssh-keygen", "-Y", "find-principals", *common], stdin=b"", check=False, timeout=_SECONDS)
        named = found.text.splitlines() if found.status == 0 else []
        said = found.last_words or "no principal is found"
        for principal in demanded.principals or named:
            done = programs.run(
                ["ssh-keygen", "-Y", "verify", "-n", NAMESPACE, "-I", principal, *common],
                stdin=content,
                check=False,
                timeout=_SECONDS,
            )
            if done.status == 0:
                return
            said = done.last_words
    raise _refusal(file, said)


def _refusal(file: Path, why: str) -> RefusedError:
    return RefusedError(
        f"the policy is not signed as this host demands: {file}",
        details=why,
        resolution="have it signed by one of those who may (`vmsandbox policy sign`)",
    )


def _write(path: Path, content: bytes) -> Path:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(content)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise UserInputError(f"the signature cannot be written: {path}", details=str(error)) from error
    return path
