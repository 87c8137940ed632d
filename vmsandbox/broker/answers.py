"""What a refusal says, in the one shape that every tool in the guest gets it in.

Without it an agent would see a reset connection and try again for ever; with it, it can read which rule refused and
what its person would have to add.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from vmsandbox.egress.values import Decision, Destination

RULE_HEADER = "x-vmsandbox-rule"
_REASONS = {
    400: "Bad Request", 403: "Forbidden", 408: "Request Timeout", 413: "Content Too Large",
    431: "Request Header Fields Too Large", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip
NOWHERE = Destination("", 0)


@dataclass(frozen=True)
class Refusal:
    """An answer of the broker's own in place of a server's. status: 403 by a rule; 4xx, 5xx for what failed."""

    rule: str
    reason: str
    remedy: str = ""
    to: Destination = NOWHERE
    status: int = 403

    @property
    def failed(self) -> bool:
        """Whether the other side failed, rather than a rule refused."""
        return self.status in (502, 504)

    @property
    def body(self) -> bytes:
        """JSON; everything but ASCII is escaped, so that no terminal is driven by a host's name."""
        told = {
            "error": "failed on its way through vmsandbox" if self.failed else "refused by vmsandbox",
            "rule": self.rule,
            "reason": self.reason,
            "remedy": self.remedy,
            "host": self.to.host,
            "port": self.to.port,
        }
        return json.dumps(told).encode("ascii") + b"\n"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of an HTTP answer; lower case, as HTTP/2 wants them."""
        return [
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            (RULE_HEADER.encode("ascii"), _visible(self.rule, 200)),
            (b"content-length", b"%d" % len(self.body)),
        ]

    def as_http1(self) -> bytes:
        """The whole answer for a connection that ends with it."""
        head = b"HTTP/1.1 %d %s\r\n" % (self.status, self.phrase)
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in self.headers)
        return head + lines + b"connection: close\r\n\r\n" + self.body

    @property
    def phrase(self) -> bytes:
        """HTTP/1's reason phrase, with the reason: pip, npm and urllib show it to people, and never the body."""
        return _visible(f"{_REASONS.get(self.status, 'Refused')} by vmsandbox: {self.reason}", 300)


def by_decision(decision: Decision, to: Destination) -> Refusal:
    """A rule's refusal."""
    return Refusal(decision.rule, decision.reason, decision.remedy, to)


class Refused(Exception):
    """Ends a hook with a refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.rule)
        self.refusal = refusal


def _visible(text: str, most: int) -> bytes:
    """Text for an HTTP head: no line breaks, nothing that drives a terminal."""
    return "".join(char if 32 <= ord(char) < 127 else "?" for char in text[:most]).encode("ascii")
