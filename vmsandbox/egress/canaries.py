"""Tokens that nobody needs, planted where only someone who looks for keys finds them.

Without them a leak would be seen only if what leaks has a known shape. They look like real keys, are made at random,
open nothing, and are refused by `dlp.py` wherever they turn up, even in part.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence

_BASE32 = string.ascii_uppercase + "234567"
_LETTERS = string.ascii_letters + string.digits


def new_canaries(count: int) -> tuple[str, ...]:
    """So many tokens: an AWS-like key's id, its secret, a token as code hosts give them, and so on over again."""
    makers = (_key_id, _secret_key, _token)
    return tuple(makers[number % len(makers)]() for number in range(count))


def decoy_files(canaries: Sequence[str]) -> dict[str, bytes]:
    """Path below the worker's home → content, that has the canaries in it.

    No tool is misled: no program reads these places by itself. The AWS profile is not the default one, and the files of
    netrc, gh, git, npm and pip stay as they are.
    """
    if not canaries:
        return {}
    pairs = [canaries[at : at + 3] for at in range(0, len(canaries), 3)]
    profiles = []
    exports = []
    for number, (key_id, *rest) in enumerate(pairs, 1):
        profiles.append(f"[archive-{number}]\naws_access_key_id = {key_id}\n")
        if rest:
            profiles.append(f"aws_secret_access_key = {rest[0]}\n")
        exports += [f"DEPLOY_TOKEN_{number}={one}\n" for one in rest[1:]]
    files = {".aws/credentials": "".join(profiles).encode()}
    if exports:
        files[".config/deploy/production.env"] = "".join(exports).encode()
    return files


def _key_id() -> str:
    return "AKIA" + _random(_BASE32, 16)


def _secret_key() -> str:
    return _random(_LETTERS + "+/", 40)


def _token() -> str:
    return "ghp_" + _random(_LETTERS, 36)


def _random(letters: str, length: int) -> str:
    return "".join(secrets.choice(letters) for _ in range(length))
