"""Looks for what must not leave a guest: its canaries, the values of named secrets, placeholders, keys of known shapes.

Without it an allowed host is a way out for anything that an agent was talked into reading. It is a net, not a wall: who
encrypts, or uses an encoding of their own, passes (SECURITY.md says so). What the guest must not have does not depend
on it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from vmsandbox.egress.decoding import Budget, views
from vmsandbox.egress.needles import Needles, squeeze
from vmsandbox.egress.shapes import shaped_secret
from vmsandbox.egress.unpacking import TooMuchError, content_of
from vmsandbox.egress.values import BrokerConfig

DLP = "dlp"
OUTSIDE = "secret-outside"
_NOT_LOOKING = json.dumps({"sandbox": {"network": {"dlp": {"secrets": False}}}})


class Finding(NamedTuple):
    """Something that must not leave.

    rule: `dlp` or `secret-outside`. what: for the host's records. said: for the guest: never more than it sent.
    where: `host`, `path`, `header NAME`, `header names`, `body`. remedy: as in Decision.
    is_hit: it is there, for certain. is_secret: what stands there must not be written down either.
    """

    rule: str
    what: str
    said: str
    where: str
    remedy: str = ""
    is_hit: bool = True
    is_secret: bool = False


class Scanner:
    """What one session's requests are looked through for."""

    def __init__(self, config: BrokerConfig) -> None:
        policy = config.policy
        canaries = {f"canary {number}": value for number, value in enumerate(config.canaries, 1)}
        self._canaries = Needles(canaries if policy.dlp.canaries else {}, pieces=True)
        self._values = Needles(config.secrets)
        self._names = {use.name: use.placeholder for use in policy.secrets}
        self._placeholders = {frozenset[str](): Needles(self._names)}  # by the names that do no harm
        self._any = Needles.together((self._canaries, self._values, Needles(self._names)))
        self._shapes = policy.dlp.secrets
        self._idle = not (self._shapes or (policy.dlp.canaries and canaries) or config.secrets or policy.secrets)

    def head(self, parts: Sequence[tuple[str, bytes]]) -> Finding | None:
        """The request without its body. parts: (where, bytes); all together first, which is nearly always enough."""
        if self._idle:
            return None
        if (finding := self._look(b"\n".join(data for _, data in parts), "path and headers")) is None:
            return None
        return next((one for where, data in parts if (one := self._look(data, where)) is not None), finding)

    def body(self, body: bytes, encodings: str, own: frozenset[str] = frozenset()) -> Finding | None:
        """The body.

        Args:
            encodings: of the Content-Encoding header; empty without one.
            own: secrets that are for this host: it gets their values anyway, so their placeholders say nothing. (An
                agent that has seen its environment tells its model of them, in every request from then on.)
        """
        if self._idle or not body:
            return None
        if (finding := self._look(body, "body", own)) is not None or not encodings.strip():
            return finding
        budget = Budget.of(len(body))
        try:
            content = content_of(body, encodings, budget.stock)
        except TooMuchError as why:
            return _too_much("body", why)
        return None if content is body else self._look(content, "body", own)

    def _look(self, data: bytes, where: str, own: frozenset[str] = frozenset()) -> Finding | None:
        # What was found before the limit counts more than that there was one: it may freeze the guest.
        found: Finding | None = None
        try:
            for view in views(data, Budget.of(len(data))):
                one = self._look_at(view, where, own)
                if one is not None and one.rule == DLP:
                    return one
                found = found or one
        except TooMuchError as why:
            return found or _too_much(where, why)
        return found

    def _look_at(self, view: bytes, where: str, own: frozenset[str]) -> Finding | None:
        bare = squeeze(view)
        given = self._any.find(view, bare) is not None  # nearly never; one pass instead of three
        if given and (name := self._canaries.find(view, bare)):
            return Finding(DLP, f"{name}: a token planted in the guest", "a credential that no task needs", where)
        if given and (name := self._values.find(view, bare)):
            what = f"the value of the secret {name}"
            return Finding(DLP, what, what, where, is_secret=True)
        if self._shapes and (key := shaped_secret(view)) is not None:
            said = f"what looks like a key ({key.name}, {key.begins}…)"
            return Finding(DLP, f"{key.name} ({key.begins}…)", said, where, _NOT_LOOKING, is_secret=True)
        if given and (name := self._placeholders_but(own).find(view, bare)):
            said = f"the placeholder of the secret {name}, which may stand only where network.secrets says"
            return Finding(OUTSIDE, f"the placeholder of {name}", said, where)
        return None

    def _placeholders_but(self, own: frozenset[str]) -> Needles:
        if own not in self._placeholders:
            self._placeholders[own] = Needles({name: one for name, one in self._names.items() if name not in own})
        return self._placeholders[own]


def _too_much(where: str, why: TooMuchError) -> Finding:
    return Finding(DLP, f"not looked through: {why}", f"what cannot be looked through: {why}", where, is_hit=False)
