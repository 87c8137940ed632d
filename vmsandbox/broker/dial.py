"""Opens connections to servers: resolves once, checks each address, dials exactly what it checked.

Without it a name could be checked at one address and dialled at another: a DNS server that changes its answer between
two questions is all it takes.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence

from vmsandbox.broker.answers import Refusal, by_decision
from vmsandbox.broker.resolve import ResolveError, Resolver
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.hosts import is_address
from vmsandbox.egress.values import Destination

_FIRST_TRY = 3.0  # seconds for an address while there are others


# A connection and the address that was dialled.
Dialled = tuple[asyncio.StreamReader, asyncio.StreamWriter, str]


class DialError(Exception):
    """There is no connection; `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class Dialer:
    """Dials for one broker.

    Args:
        own_addresses: of the host: never dialled unless a rule names them.
        seconds: for one connection, the look-up of its name included.
    """

    def __init__(self, rules: Rules, resolver: Resolver, own_addresses: Sequence[str], seconds: float) -> None:
        self._rules, self._resolver = rules, resolver
        self._own_addresses, self._seconds = tuple(own_addresses), seconds

    async def connect(self, to: Destination) -> Dialled:
        """A connection and the address that was dialled; raises DialError."""
        decision = self._rules.host(to)
        if not decision.allowed:  # was asked before; what is dialled never depends on that alone
            raise DialError(by_decision(decision, to))
        deadline = time.monotonic() + self._seconds
        try:
            async with asyncio.timeout(self._seconds):
                addresses = await self._addresses(to)
        except TimeoutError:
            raise DialError(
                Refusal("upstream-timeout", f"{to.host} was not resolved in time", to=to, status=504)
            ) from None
        except ResolveError as error:
            raise DialError(Refusal("upstream-unknown", str(error), to=to, status=502)) from None
        return await self._first(to, self._checked(to, addresses), deadline)

    async def _addresses(self, to: Destination) -> Sequence[str]:
        if named := self._rules.addresses(to):
            return named
        return [to.host] if is_address(to.host) else await self._resolver.addresses(to.host)

    def _checked(self, to: Destination, addresses: Sequence[str]) -> list[str]:
        """The addresses that may be dialled; raises DialError if there are none."""
        decisions = [(address, self._rules.address(to, address, self._own_addresses)) for address in addresses]
        allowed = [address for address, decision in decisions if decision.allowed]
        if not allowed:
            raise DialError(by_decision(decisions[0][1], to))
        return allowed

    async def _first(self, to: Destination, addresses: list[str], deadline: float) -> Dialled:
        """The first of them that answers, one after the other."""
        refusal = Refusal("upstream-timeout", f"{to} did not answer in time", to=to, status=504)
        for number, address in enumerate(addresses):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            more_to_try = number + 1 < len(addresses)
            try:
                async with asyncio.timeout(min(left, _FIRST_TRY) if more_to_try else left):
                    return *await _open(address, to.port), address
            except TimeoutError:
                refusal = Refusal("upstream-timeout", f"{to} ({address}) did not answer in time", to=to, status=504)
            except OSError as error:
                reason = f"{to} ({address}): {error.strerror or error}"
                refusal = Refusal("upstream-failed", reason, to=to, status=502)
        raise DialError(refusal)


async def _open(address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An address, never a name: nothing is looked up here.
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
        return await asyncio.open_connection(sock=sock, limit=1 << 18)
    except BaseException:
        sock.close()
        raise
