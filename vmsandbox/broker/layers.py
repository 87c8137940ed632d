"""mitmproxy's HTTP layers with what a hostile client needs: refusals are answered at once, bodies have limits.

Without them a refused upload would be kept in memory to its end, and a refusal would be told in HTML. Written
against mitmproxy 11.0.2's inner interfaces, which requirements.txt pins.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from mitmproxy import http
from mitmproxy.net.http import status_codes
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import (
    HttpLayer,
    HTTPMode,
    HttpStream,
    RequestData,
    RequestEndOfMessage,
    RequestProtocolError,
    RequestTrailers,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    SendHttp,
)

from vmsandbox.broker.answers import Refusal
from vmsandbox.broker.bounds import GuardedHttp1Server, GuardedHttp2Server

if TYPE_CHECKING:
    from vmsandbox.broker.proxy import GuestConnection

Steps = Generator[commands.Command, Any, Any]
_DROPPED = 1 << 20  # bytes of a refused request's body that are read on, so that the client sees the answer
EXCHANGE = "vmsandbox"  # key of a flow's metadata
AUTHORITY = "vmsandbox_authority"  # attribute of a request: what stood in its first line (or :authority), as it stood


class Last(layer.Layer):
    """Says some last bytes to the client, and closes."""

    def __init__(self, context: Context, words: bytes) -> None:
        super().__init__(context)
        self._words = words

    def _handle_event(self, event: events.Event) -> Steps:
        if isinstance(event, events.Start):
            yield commands.SendData(self.context.client, self._words)
            yield commands.CloseConnection(self.context.client)


class GuardedHttp(HttpLayer):
    """HTTP with a guest: guarded streams, bounded heads."""

    def __init__(self, context: Context, mode: HTTPMode, guest: GuestConnection) -> None:
        super().__init__(context, mode)
        self.guest = guest

    def _handle_event(self, event: events.Event) -> Steps:
        if isinstance(event, events.Start):
            kind = GuardedHttp2Server if self.context.client.alpn == b"h2" else GuardedHttp1Server
            self.connections[self.context.client] = kind(self.context.fork(), self.guest)
        yield from super()._handle_event(event)

    def make_stream(self, stream_id: int) -> Steps:
        self.streams[stream_id] = GuardedStream(self.context.fork(), stream_id, self.guest)
        yield from self.event_to_child(self.streams[stream_id], events.Start())


class GuardedStream(HttpStream):
    """One request and its answer. The hooks leave an `Exchange` in the flow's metadata that says what is refused."""

    client_state: Any
    server_state: Any

    def __init__(self, context: Context, stream_id: int, guest: GuestConnection) -> None:
        super().__init__(context, stream_id)
        self.guest = guest
        self._dropped = 0
        self._talks = False

    def state_wait_for_request_headers(self, event: Any) -> Steps:
        """As inherited, which forgets what an absolute-form request line named."""
        setattr(event.request, AUTHORITY, event.request.data.authority)
        yield from super().state_wait_for_request_headers(event)

    def check_invalid(self, request: bool) -> Steps:
        """A request's form is judged in the hook for its head; an answer's here."""
        if not request and (wrong := self.guest.judge.wrong_answer(self.flow)):
            self.flow.metadata[EXCHANGE].refusal = wrong
            yield from self._answer()
            return True
        return False

    def check_killed(self, emit_error_hook: bool) -> Steps:
        """Asked after each hook: answers at once if the hook has refused."""
        exchange = self.flow.metadata.get(EXCHANGE)
        if exchange is not None and exchange.refusal is not None and not exchange.answered:
            yield from self._answer()
            return True
        return (yield from super().check_killed(emit_error_hook))

    def state_consume_request_body(self, event: events.Event) -> Steps:
        """Keeps the body for the rules about content, within limits."""
        if isinstance(event, RequestData) and not self.guest.judge.may_keep(self.flow, len(event.data)):
            yield from self._answer()
            return
        yield from super().state_consume_request_body(event)

    def state_stream_request_body(self, event: events.Event) -> Steps:
        """Passes the body on, within limits."""
        if isinstance(event, RequestData) and not self.guest.judge.may_pass(self.flow, len(event.data)):
            yield from self._answer()
            return
        yield from super().state_stream_request_body(event)

    def state_stream_response_body(self, event: events.Event) -> Steps:
        """Passes the answer on, within limits: a too long one is cut off so that nobody takes it for whole."""
        if isinstance(event, ResponseData) and not self.guest.judge.may_answer(self.flow, len(event.data)):
            yield from self._cut()
            return
        yield from super().state_stream_response_body(event)

    def make_server_connection(self) -> Steps:
        """As inherited, with an answer that says why there is none."""
        connection, err = yield http_layers.GetHttpConnection(
            (self.flow.request.host, self.flow.request.port),
            self.flow.request.scheme == "https",
            self.flow.server_conn.via,
            self.flow.server_conn.transport_protocol,
        )
        if err:
            self.guest.judge.no_server(self.flow, str(err))
            yield from self._answer()
            return False
        self.context.server = self.flow.server_conn = connection
        self._talks = True
        return True

    def handle_protocol_error(self, event: Any) -> Steps:
        """A server that breaks off before its answer gets one in our shape too."""
        begun = self.flow.response is not None or not hasattr(self.flow, "request")
        if isinstance(event, ResponseProtocolError) and not begun and self.client_state != self.state_errored:
            self.guest.judge.no_server(self.flow, event.message)
            yield from self._answer(server_is_gone=True)
            return
        yield from super().handle_protocol_error(event)

    def _answer(self, server_is_gone: bool = False) -> Steps:
        """Send the refusal instead of an answer, whatever of the request or the answer has come so far."""
        exchange = self.flow.metadata[EXCHANGE]
        refusal: Refusal = exchange.refusal
        exchange.answered = True
        if self.server_state in (self.state_stream_response_body, self.state_done):
            yield from self._cut()  # the server's answer is on its way already
            return
        waiting_for_more = self.client_state != self.state_done
        if self._talks and not server_is_gone:
            yield SendHttp(RequestProtocolError(self.stream_id, "refused"), self.context.server)
        self.request_body_buf.clear()
        self.flow.response = self._response(refusal)
        yield SendHttp(ResponseHeaders(self.stream_id, self.flow.response, False), self.context.client)
        body = b"" if self.flow.request.method == "HEAD" else refusal.body
        if body:
            yield SendHttp(ResponseData(self.stream_id, body), self.context.client)
        self.server_state = self.state_errored
        self.client_state = self.state_drop if waiting_for_more else self.state_errored
        self.flow.live = False
        self.guest.judge.ended(self.flow)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
        if not waiting_for_more:
            yield http_layers.DropStream(self.stream_id)

    def _response(self, refusal: Refusal) -> http.Response:
        version = b"HTTP/2.0" if self.flow.request.is_http2 else b"HTTP/1.1"
        headers = http.Headers(refusal.headers)
        return http.Response(version, refusal.status, refusal.phrase, headers, b"", None, time.time(), time.time())

    def _cut(self) -> Steps:
        yield SendHttp(RequestProtocolError(self.stream_id, "limit"), self.context.server)
        yield SendHttp(_broken_off(self.stream_id), self.context.client)
        self.client_state = self.server_state = self.state_errored
        self.flow.live = False
        self.guest.judge.ended(self.flow)
        yield http_layers.DropStream(self.stream_id)

    def state_drop(self, event: events.Event) -> Steps:
        """The rest of a refused request: read, not kept; a long one ends the connection."""
        if isinstance(event, RequestData):
            self._dropped += len(event.data)
            if self._dropped > _DROPPED:
                self.client_state = self.state_errored
                yield SendHttp(_broken_off(self.stream_id), self.context.client)
        elif isinstance(event, RequestEndOfMessage):
            self.client_state = self.state_errored
            yield http_layers.DropStream(self.stream_id)
        elif isinstance(event, RequestTrailers):
            pass


def _broken_off(stream_id: int) -> ResponseProtocolError:
    return ResponseProtocolError(stream_id, "broken off", status_codes.NO_RESPONSE)
