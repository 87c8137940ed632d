"""One connection of a guest, from its first byte to its end: mitmproxy's protocol core on sockets of our own.

mitmproxy's own server is not used: it would listen, resolve names and dial by itself. Here everything that is dialled
goes through `dial`, and a hook that fails ends the connection instead of leaving it open.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from mitmproxy.connection import Client, Connection, ConnectionState
from mitmproxy.proxy import commands, events, mode_specs
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.server import ConnectionHandler, ConnectionIO

from vmsandbox.broker.addon import Judge
from vmsandbox.broker.answers import Refusal
from vmsandbox.broker.bounds import held_back
from vmsandbox.broker.dial import DialError, Dialled
from vmsandbox.broker.failures import say_failure
from vmsandbox.broker.opening import Opening
from vmsandbox.broker.service import Door, Service
from vmsandbox.egress.values import Destination, EgressKind

_MODE = mode_specs.ProxyMode.parse("regular")
_PARALLEL_SERVERS = 4  # connections to servers for each connection that a guest may have
# What mitmproxy's layers look up. lazy: nothing is dialled before the rules have been asked.
_OPTIONS = {
    "connection_strategy": "lazy", "validate_inbound_headers": True, "normalize_outbound_headers": True,
    "body_size_limit": None, "stream_large_bodies": None, "websocket": True, "rawtcp": False, "http2": True,
    "http2_ping_keepalive": 0, "keep_host_header": True, "proxy_debug": False, "store_streamed_bodies": False,
}  # fmt: skip


class GuestConnection(ConnectionHandler):
    """Carries one connection; `Opening` says what it is, `Judge` what it may.

    Shared with the layers: `limits`, `judge`, `to_guest` and `to_servers` (HTTP/2 connections whose flow control may
    hold data back). tunnel: where all of it goes, once a CONNECT or an SNI has said so. name: what the guest's TLS is
    for. refusal: the answer to every request.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, door: Door, service: Service
    ) -> None:
        client = Client(
            peername=("guest", 0), sockname=("broker", door.port), timestamp_start=time.time(), proxy_mode=_MODE,
            state=ConnectionState.OPEN,
        )  # fmt: skip
        self.to_guest: list[Any] = []
        self.to_servers: list[Any] = []
        self.limits = service.limits
        options = SimpleNamespace(**_OPTIONS, header_bytes=self.limits.header_bytes, h2=self.to_servers)
        super().__init__(Context(client, options))
        self.door, self.service = door, service
        self.tunnel: Destination | None = None
        self.refusal: Refusal | None = None
        self.name = ""
        self.failures: dict[Destination, Refusal] = {}
        self.dialled: dict[Connection, str] = {}
        self.sent = self.received = 0
        self._ahead: Dialled | None = None
        self.judge = Judge(self)
        self.opening = Opening(self)
        self._hooks = self.opening.hooks() | self.judge.hooks()
        self.timeout_watchdog.timeout = self.limits.idle_seconds
        self._writer = writer
        self._head_since: float | None = time.monotonic()  # the first head is waited for from the beginning
        self.transports[client] = ConnectionIO(
            reader=_Metered(reader, self._from_guest, self.to_servers, service), writer=writer, handler=None
        )

    async def handle_hook(self, hook: commands.StartHook) -> None:
        """Ask who is concerned; whoever fails ends the connection: nothing goes on undecided."""
        ask = self._hooks.get(hook.name)
        if ask is None:
            return
        try:
            answer = ask(*hook.args())
            if inspect.isawaitable(answer):
                await answer
        except Exception as error:
            say_failure(hook.name, error)
            self.end("broker-failed", "the broker failed on this connection, and has closed it", EgressKind.FAILED)
            raise asyncio.CancelledError from None

    def head_waits(self, begun: bool) -> None:
        """A request's head has begun (or, False: nothing of one has come, or it is complete)."""
        if not begun:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = time.monotonic()

    def overdue(self, now: float) -> bool:
        """Whether a request's head, or a ClientHello, takes too long."""
        return self._head_since is not None and now - self._head_since > self.limits.connect_seconds

    def end(self, rule: str, reason: str, kind: EgressKind = EgressKind.LIMIT) -> None:
        """Close everything of this connection, and say why."""
        self.judge.tell(kind, self.tunnel, rule=rule, reason=reason)
        for io in list(self.transports.values()):
            if io.handler is not None:
                io.handler.cancel(rule)

    async def dial_ahead(self, to: Destination) -> Refusal | None:
        """Dial what `open_connection` asks for next: once a tunnel is open, it cannot say why there is none."""
        try:
            self._ahead = await self._dial(to)
        except DialError as error:
            self.judge.tell_refusal(error.refusal, method="CONNECT")
            return error.refusal
        return None

    async def _dial(self, to: Destination) -> Dialled:
        if self.service.servers >= _PARALLEL_SERVERS * self.limits.connections:
            raise DialError(Refusal("limit-connections", "too many connections to servers", to=to, status=503))
        return await self.service.dialer.connect(to)

    async def open_connection(self, command: commands.OpenConnection) -> None:
        """Dial a server: the name is checked, resolved, its address checked, and that address dialled."""
        connection = command.connection
        to = Destination(*connection.address)
        self.failures.pop(to, None)
        connection.timestamp_start = time.time()
        try:
            self.service.servers += 1
            try:
                await self._serve(command, connection, to)
            finally:
                self.service.servers -= 1
        except DialError as error:
            self.failures[to] = error.refusal
            connection.error = error.refusal.reason
            self.transports.pop(connection, None)
            self.judge.not_dialled(error.refusal)
            await self.server_event(events.OpenConnectionCompleted(command, error.refusal.reason))

    async def _serve(self, command: commands.OpenConnection, connection: Connection, to: Destination) -> None:
        try:
            dialled, self._ahead = self._ahead or await self._dial(to), None
            reader, writer, address = dialled
        except asyncio.CancelledError:
            connection.error = "cancelled"
            self.transports.pop(connection, None)
            raise
        connection.timestamp_tcp_setup = time.time()
        connection.state = ConnectionState.OPEN
        connection.peername = (address, to.port)
        connection.sockname = ("broker", 0)
        self.dialled[connection] = address
        self.transports[connection] = ConnectionIO(
            handler=asyncio.current_task(),
            reader=_Metered(reader, self._from_server, self.to_guest, self.service),
            writer=writer,
        )
        self.opening.dialled(connection, address)
        await self.server_event(events.OpenConnectionCompleted(command, None))
        try:
            await self.handle_connection(connection)
        finally:
            connection.timestamp_end = time.time()
            self.dialled.pop(connection, None)

    def _from_guest(self, amount: int) -> None:
        self.sent += amount
        self.opening.passes(self.limits.request_bytes, self.sent)

    def _from_server(self, amount: int) -> None:
        self.received += amount
        self.opening.passes(self.limits.response_bytes, self.received)

    def log(self, message: str, level: int = logging.INFO, exc_info: Any = None) -> None:
        """mitmproxy's own words are for nobody, but that it has crashed: then the connection ends."""
        if level >= logging.ERROR and self.client.connected:  # its layers stumble over a client that is gone already
            say_failure("a layer", exc_info[1] if isinstance(exc_info, tuple) else sys.exc_info()[1])
            self.end("broker-failed", "the broker failed on this connection, and has closed it", EgressKind.FAILED)

    def finish(self) -> None:
        """Tell of what is still open: it is over."""
        self.opening.finish()
        self.judge.finish()

    async def run(self) -> None:
        """Carry it to its end."""
        try:
            await self.handle_client()
        finally:
            self.finish()
            if self._ahead is not None:
                self._ahead[1].close()
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()


class _Metered:
    """Reads a stream: counts, keeps to the session's rate, and waits while the other side cannot take more."""

    def __init__(
        self, reader: asyncio.StreamReader, count: Callable[[int], None], other_side: list[Any], service: Service
    ) -> None:
        self._reader, self._count, self._other_side, self._service = reader, count, other_side, service

    async def read(self, most: int) -> bytes:
        while self._other_side and held_back(self._other_side):
            await asyncio.sleep(0.02)
        data = await self._reader.read(most)
        if data:
            self._count(len(data))
            if wait := self._service.rate.take(len(data)) if self._service.rate else 0:
                await asyncio.sleep(wait)
        return data
