"""Answers a guest's DNS questions by the policy alone: nothing is asked of anybody, so nothing can be told through it.

An allowed name is at the broker itself, which learns from Host or SNI where a connection is meant to go; every other
name is refused. Without it a tool that knows no proxy would fail before its first connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from typing import Any

from vmsandbox.broker.dnswire import (
    IN,
    NOERROR,
    NOTIMP,
    REFUSED,
    A,
    BadMessage,
    Question,
    parse_query,
    refuse_unread,
    reply,
)
from vmsandbox.broker.record import Bucket
from vmsandbox.broker.service import Service
from vmsandbox.egress.hosts import BadHostError, is_address, parse_host
from vmsandbox.egress.values import EgressEvent, EgressKind

_PER_SECOND, _BURST = 500.0, 1000.0
_CONNECTIONS = 16
_SECONDS = 10.0  # for a question over TCP
_LARGEST = 4096  # bytes of a question


class Names:
    """Answers questions that came to one address."""

    def __init__(self, service: Service, address: str) -> None:
        self._service, self._address = service, address
        self._bucket = Bucket(_PER_SECOND, _BURST)
        self._connections = 0

    def answer(self, untrusted: bytes) -> bytes | None:
        """The answer; None: there is none (too many, or not even a question's head)."""
        if len(untrusted) > _LARGEST or not self._bucket.has():
            return None
        try:
            question = parse_query(untrusted)
        except (BadMessage, struct.error):
            return refuse_unread(untrusted)
        if question.opcode != 0:
            return reply(question, NOTIMP)
        if not self._allowed(question):
            return reply(question, REFUSED)
        return reply(question, NOERROR, self._address if question.kind == A else None)

    def _allowed(self, question: Question) -> bool:
        try:
            name = parse_host(question.name)
            decision = self._service.rules.name(name)
        except BadHostError as error:
            self._tell(ascii(question.name)[1:-1][:253], "bad-host", error.brief, "")
            return False
        if question.klass == IN and decision.allowed and not is_address(name):
            return True
        self._tell(name, decision.rule, decision.reason, decision.remedy)
        return False

    def _tell(self, name: str, rule: str, reason: str, remedy: str) -> None:
        self._service.recorder.tell(
            EgressEvent(EgressKind.REFUSED, time.time(), via="dns", host=name, rule=rule, reason=reason, remedy=remedy)
        )

    async def over_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: questions, one after the other."""
        self._connections += 1
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                while self._connections <= _CONNECTIONS:
                    async with asyncio.timeout(_SECONDS):
                        (length,) = struct.unpack("!H", await reader.readexactly(2))
                        answer = self.answer(await reader.readexactly(length))
                        if answer is None:
                            break
                        writer.write(struct.pack("!H", len(answer)) + answer)
                        await writer.drain()
        finally:
            self._connections -= 1
            writer.close()


class _OverUdp(asyncio.DatagramProtocol):
    def __init__(self, names: Names) -> None:
        self._names = names
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, untrusted: bytes, sender: Any) -> None:
        if (answer := self._names.answer(untrusted)) is not None:
            self._transport.sendto(answer, sender)


async def serve_udp(service: Service, sock: socket.socket) -> None:
    """Answer on a bound datagram socket."""
    names = Names(service, sock.getsockname()[0])
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: _OverUdp(names), sock=sock)


async def serve_tcp(service: Service, sock: socket.socket) -> asyncio.Server:
    """Answer on a listening socket."""
    return await asyncio.start_server(Names(service, sock.getsockname()[0]).over_tcp, sock=sock)
