"""HTTP/1 and HTTP/2 with bounds: heads, requests that wait, what flow control holds back; and errors in our shape.

Without them a head without an end would be kept for ever, and a client that opens no window would have the broker keep
what a server sends. Written against mitmproxy 11.0.2's inner interfaces, which requirements.txt pins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mitmproxy.connection import ConnectionState
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import RequestProtocolError, ResponseProtocolError, _http1
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Server
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Server

from vmsandbox.broker.answers import Refusal

if TYPE_CHECKING:
    from collections.abc import Generator

    from vmsandbox.broker.proxy import GuestConnection

    Steps = Generator[commands.Command, Any, Any]

_PIPELINED = 1 << 20  # bytes of the next requests that are kept while an answer is on its way
_BUFFERED = 16 << 20  # bytes that may wait for HTTP/2's flow control in one connection


class GuardedHttp1Server(Http1Server):
    """HTTP/1 with a guest: a head has a size and a time."""

    state: Any

    def __init__(self, context: Context, guest: GuestConnection) -> None:
        super().__init__(context)
        self.guest = guest

    def read_headers(self, event: events.ConnectionEvent) -> Steps:
        """As inherited; the request's first byte starts the clock, its last stops it."""
        too_long = False
        yield from super().read_headers(event)
        if self.state == self.read_headers:
            too_long = len(self.buf) > self.guest.limits.header_bytes
            self.guest.head_waits(len(self.buf) > 0)
        if too_long:
            refusal = self.guest.judge.long_head()
            if self.conn.state & ConnectionState.CAN_WRITE:
                yield commands.SendData(self.conn, refusal.as_http1())
            yield commands.CloseConnection(self.conn)
            self.state = self.done
        elif self.state == self.done and self.request is None and isinstance(event, events.DataReceived):
            self.guest.judge.bad_head()

    def send(self, event: Any) -> Steps:
        """As inherited; what mitmproxy refuses by itself is told of too."""
        if isinstance(event, ResponseProtocolError) and self.response is None and event.code == 400:
            self.guest.judge.bad_head()
        yield from super().send(event)

    def wait(self, event: events.Event) -> Steps:
        """As inherited: the next request waits for the answer to this one, and not all of it."""
        if len(self.buf) > _PIPELINED:
            yield commands.CloseConnection(self.conn)
            self.state = self.done
            yield http_layers.ReceiveHttp(RequestProtocolError(self.stream_id, "too much after the request"))
            return
        yield from super().wait(event)

    def done(self, event: events.ConnectionEvent) -> Steps:
        """Nothing that comes after the end is read."""
        self.buf.maybe_extract_at_most(len(self.buf))
        yield from ()


class GuardedHttp2Server(Http2Server):
    """HTTP/2 with a guest: heads have a size; what its flow control holds back is counted."""

    def __init__(self, context: Context, guest: GuestConnection) -> None:
        super().__init__(context)
        self.h2_conn.decoder.max_header_list_size = guest.limits.header_bytes
        guest.to_guest.append(self.h2_conn)


class _BoundedHttp1Client(Http1Client):
    """HTTP/1 with a server: the head of its answer has a size."""

    state: Any

    def read_headers(self, event: events.ConnectionEvent) -> Steps:
        yield from super().read_headers(event)
        if self.state == self.read_headers and len(self.buf) > self.context.options.header_bytes:
            self.state = self.done
            yield commands.CloseConnection(self.conn)
            if self.stream_id is not None:
                yield http_layers.ReceiveHttp(ResponseProtocolError(self.stream_id, "the answer's head is too long"))

    def done(self, event: events.ConnectionEvent) -> Steps:
        self.buf.maybe_extract_at_most(len(self.buf))
        yield from ()


class _BoundedHttp2Client(Http2Client):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.h2_conn.decoder.max_header_list_size = context.options.header_bytes
        context.options.h2.append(self.h2_conn)


def held_back(connections: list[Any]) -> bool:
    """Whether too much waits for the flow control of these HTTP/2 connections: then nothing more is read."""
    waiting = 0
    for one in connections:
        for queue in one.stream_buffers.values():
            waiting += sum(len(piece.data) for piece in queue)
    return waiting > _BUFFERED


def _error_answer(status: int, message: str = "") -> bytes:
    rule = {431: "limit-header-bytes", 408: "limit-connect-seconds"}.get(status, "bad-request")
    return Refusal(rule, message[:500], status=status).as_http1()


def install() -> None:
    """Have mitmproxy's HTTP layer use the bounded clients, and say what is wrong in our shape."""
    http_layers.Http1Client = _BoundedHttp1Client
    http_layers.Http2Client = _BoundedHttp2Client
    _http1.make_error_response = _error_answer
