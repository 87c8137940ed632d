"""How `sandbox.return` rules of several policies hold together: the narrowest of each."""

from __future__ import annotations

from vmsandbox.policy.values import ReturnPolicy
from vmsandbox.spec import Accept

_RANK = {Accept.NONE: 0, Accept.SAFE: 1, Accept.ALL: 2}


def exceeds(asked: Accept, cap: str | None) -> bool:
    """Whether more is asked for than a policy lets be taken without a person."""
    return cap is not None and _RANK[asked] > _RANK[Accept(cap)]


def narrowed(one: ReturnPolicy, other: ReturnPolicy) -> ReturnPolicy:
    """What both of them allow."""
    caps = [Accept(each) for each in (one.accept, other.accept) if each is not None]
    return ReturnPolicy(
        accept=min(caps, key=_RANK.__getitem__).value if caps else None,
        denied_paths=tuple(dict.fromkeys((*one.denied_paths, *other.denied_paths))),
        files=_least(one.files, other.files),
        bytes=_least(one.bytes, other.bytes),
        deletions=_least(one.deletions, other.deletions),
    )


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
