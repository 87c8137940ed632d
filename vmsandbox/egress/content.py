"""What a request says and what its answer is: secrets put in, leaks refused, packages written down.

The broker asks this of every request that it can see inside, after the rules about hosts have let it through. Without
it an allowed host would be a way out for whatever the guest holds. Plain values in, plain values out: nothing here
knows how the broker gets them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmsandbox.egress.dlp import DLP, Finding, Scanner
from vmsandbox.egress.ledger import Ledger, ResponseWatch
from vmsandbox.egress.packages import asked
from vmsandbox.egress.secrets import Headers, fill_in, is_for_host
from vmsandbox.egress.values import BrokerConfig, Decision, Destination, EgressEvent, EgressKind

__all__ = ["Content", "Outgoing", "ResponseWatch"]

_TLS_PORT = 443
_FINE = Decision(True, "content", "nothing in it is refused")
_HIDDEN = "/(not written down: a secret is in it)"


class Outgoing(NamedTuple):
    """What becomes of a request.

    headers: what is sent upstream instead of the guest's; they may hold values of secrets: never write them down.
    events: alerts, for the records; the refusal itself is the broker's to write. freeze: the policy wants the guest
    frozen.
    """

    decision: Decision
    headers: Headers
    events: list[EgressEvent]
    freeze: bool


class Content:
    """One session's view of what passes. `outgoing` may run in several threads at once; a watch stays in one.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, config: BrokerConfig, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._scanner = Scanner(config)
        self._ledger = Ledger(config.policy.packages, clock)

    def outgoing(
        self, to: Destination, method: str, path: str, headers: Headers, body: bytes, *, tls: bool | None = None
    ) -> Outgoing:
        """Judges one request and makes its headers.

        Args:
            path: with its query, as sent.
            headers: without HTTP/2's pseudo headers; trailers belong here too.
            body: all of it, with its Content-Encoding still on.
            tls: whether it goes upstream over TLS; None: if the port is 443.
        """
        tls = to.port == _TLS_PORT if tls is None else tls
        filled = fill_in(self._config.policy.secrets, self._config.secrets, to, method, headers, tls)
        finding = self._scanner.head(_head(to, method, path, filled.bare))
        own = frozenset(use.name for use in self._config.policy.secrets if is_for_host(use, to))
        finding = finding or self._scanner.body(body, _header(headers, "content-encoding"), own) or filled.refusal
        if finding is not None:
            return self._refused(finding, to, method, path, headers)
        fetch = self._ledger.fetch(to, path, _header(headers, "accept"))
        if fetch is None:
            return Outgoing(_FINE, filled.headers, [], False)
        if (refusal := self._ledger.decide(fetch, to, path)) is not None:
            return Outgoing(refusal, headers, [], False)
        sent = asked(fetch, self._config.policy.packages, filled.headers)
        return Outgoing(_FINE, sent, [], False)

    def watch(self, to: Destination, method: str, path: str, headers: Headers) -> ResponseWatch | None:
        """What follows the answer to a request that is let through, or None if nothing has to.

        Args:
            headers: the guest's own, as `outgoing` got them.
        """
        if method != "GET":
            return None
        fetch = self._ledger.fetch(to, path, _header(headers, "accept"))
        return None if fetch is None else ResponseWatch(self._ledger, fetch, to, path)

    def _refused(self, finding: Finding, to: Destination, method: str, path: str, headers: Headers) -> Outgoing:
        if finding.is_secret and finding.where != "body" and not finding.where.startswith("header"):
            path = _HIDDEN
        path = path.partition("?")[0]  # a query may hold what belongs in no record
        reason = f"the request's {finding.where} holds {finding.said}"
        event = EgressEvent(
            EgressKind.ALERT, self._clock(), host=to.host, port=to.port, method=method, path=path, rule=finding.rule,
            reason=reason, remedy=finding.remedy, more={"what": finding.what, "where": finding.where},
        )  # fmt: skip
        freeze = self._config.policy.dlp.freeze and finding.rule == DLP and finding.is_hit
        return Outgoing(Decision(False, finding.rule, reason, finding.remedy), headers, [event], freeze)


def _head(to: Destination, method: str, path: str, headers: Headers) -> Sequence[tuple[str, bytes]]:
    parts = [
        ("host", to.host),
        ("method", method),
        ("path", path),
        ("header names", "\n".join(name for name, _ in headers)),
    ]
    parts += [(f"header {name[:40]}", value) for name, value in headers]
    return [(where, text.encode("utf-8", "surrogateescape")) for where, text in parts]


def _header(headers: Headers, name: str) -> str:
    return ", ".join(value for one, value in headers if one.lower() == name)
