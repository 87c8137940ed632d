"""What all connections of one broker share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmsandbox.broker.record import Bucket, Recorder
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.values import BrokerConfig, EgressLimits

if TYPE_CHECKING:
    from vmsandbox.broker.certificates import Certificates
    from vmsandbox.broker.dial import Dialer
    from vmsandbox.broker.inside import Inside
    from vmsandbox.broker.proxy import GuestConnection


@dataclass(frozen=True)
class Door:
    """Where a connection came in. transparent: the client believes that it talks to the server, on `port`."""

    transparent: bool
    port: int = 0

    @property
    def via(self) -> str:
        """As in an event."""
        return "transparent" if self.transparent else "proxy"


@dataclass
class Service:
    """One broker's state. servers: open connections to servers. kept: bytes of requests that wait for their end."""

    config: BrokerConfig
    rules: Rules
    recorder: Recorder
    certificates: Certificates
    dialer: Dialer
    inside: Inside
    rate: Bucket | None = None
    servers: int = 0
    kept: int = 0
    guests: set[GuestConnection] = field(default_factory=set)

    @property
    def limits(self) -> EgressLimits:
        """The policy's."""
        return self.config.policy.limits
