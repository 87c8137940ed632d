"""One policy file as it was read: its values, which keys it really has, and the bytes that a signature is over.

Without the keys, a file that says nothing about memory could not be told from one that says "no limit"; a merge would
have to guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsandbox.policy.format.strictyaml import KeyPath
from vmsandbox.policy.values import Policy


@dataclass(frozen=True)
class SignedBy:
    """What a host demands: a signature of one of these. principals: empty: any that the file names."""

    allowed_signers: Path
    principals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One file of those that hold together, or several already merged.

    said      the keys that the file has: `network.mode`, `filesystem.denied_paths` (also those of sections above)
    lines     where they stand, with list indexes: `("sandbox", "network", "allowed_hosts", 0)` → 7
    files     all that was read for it, with its bytes: the policy, the profiles that it names
    signed    a demand of the organisation's file
    """

    policy: Policy
    said: frozenset[str]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    files: tuple[tuple[Path, bytes], ...] = field(default=(), repr=False)
    signed: SignedBy | None = None

    @property
    def source(self) -> Path | None:
        """The file."""
        return self.policy.source

    def says(self, key: str) -> bool:
        """Whether the file has this key."""
        return key in self.said


def said_keys(lines: Iterable[KeyPath]) -> frozenset[str]:
    """The keys of a file without `sandbox` in front and without list indexes."""
    found = set()
    for where in lines:
        words = []
        for part in where[1:]:
            if isinstance(part, int):
                break
            words.append(part)
        if words:
            found.add(".".join(words))
    return frozenset(found)


def layer_of(policy: Policy) -> Layer:
    """A policy that was made without a file, as one that says what differs from the default."""
    from vmsandbox.policy.format.rendering import plain_policy

    return Layer(policy, frozenset(_keys_of(plain_policy(policy), "")))


def _keys_of(plain: Mapping[str, Any], where: str) -> Iterator[str]:
    for name, value in plain.items():
        yield where + name
        if isinstance(value, dict):
            yield from _keys_of(value, f"{where}{name}.")
