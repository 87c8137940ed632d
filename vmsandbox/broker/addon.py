"""Judges every request and answer of a connection: where it goes, its form, the rules, the limits; and tells of it.

A connection that was let through says nothing about the next request on it: each one is judged again, on kept-alive
connections and on every HTTP/2 stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mitmproxy import http
from mitmproxy.net.http.validate import validate_headers

from vmsandbox.broker.answers import NOWHERE, Refusal, Refused, by_decision
from vmsandbox.broker.exchange import Exchange, destination, of_flow, refuse_bad_form, texts, to_be_sent
from vmsandbox.broker.layers import EXCHANGE
from vmsandbox.egress.decide import LEARN
from vmsandbox.egress.values import Destination, EgressEvent, EgressKind

if TYPE_CHECKING:
    from vmsandbox.broker.proxy import GuestConnection


class Judge:
    """One connection's requests."""

    def __init__(self, guest: GuestConnection) -> None:
        self.guest = guest
        self._service = guest.service
        self._limits = guest.limits
        self._open: set[Exchange] = set()

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """By mitmproxy's names of them."""
        return {
            "requestheaders": self.requestheaders,
            "request": self.request,
            "responseheaders": self.responseheaders,
            "response": self.ended,
            "error": self.error,
            "websocket_message": self.websocket_message,
            "websocket_end": self.ended,
        }

    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A request's head: nothing has been dialled for it yet."""
        self.guest.head_waits(False)
        exchange = flow.metadata[EXCHANGE] = Exchange(flow.request, self.guest.tunnel or NOWHERE, self.guest.door.via)
        self._open.add(exchange)
        try:
            if self.guest.refusal is not None:
                raise Refused(self.guest.refusal)
            refuse_bad_form(flow.request, self.guest.client.alpn == b"h2")
            exchange.to = destination(flow.request, self.guest.tunnel, self.guest.door)
            decision = self._service.rules.request(exchange.to, exchange.method, exchange.path)
            if not decision.allowed:
                raise Refused(by_decision(decision, exchange.to))
            exchange.rule = decision.rule
            self._refuse_long(flow, exchange)
            to_be_sent(flow.request, exchange.to, tunnelled=self.guest.tunnel is not None)
            await self._service.recorder.room()
            if not self._service.inside.needs_body:
                await self._service.inside.look(exchange, flow.request, b"", self._service.recorder)
                flow.request.stream = True
        except Refused as refused:
            self._refuse(exchange, refused.refusal)

    async def request(self, flow: http.HTTPFlow) -> None:
        """A whole request, kept until now for the rules about content."""
        exchange = of_flow(flow)
        flow.request.trailers = None  # nobody would have looked at them
        if exchange.refusal is not None or flow.request.stream:
            return
        try:
            body = flow.request.raw_content or b""
            await self._service.inside.look(exchange, flow.request, body, self._service.recorder)
        except Refused as refused:
            self._refuse(exchange, refused.refusal)
        finally:
            self._let_go(exchange)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """An answer's head: it goes on as it comes, never kept."""
        exchange = of_flow(flow)
        assert flow.response is not None
        flow.response.headers.pop("alt-svc", None)  # other ways to the same host: there are none
        declared = flow.response.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self._limits.response_bytes:
            reason = f"the answer has {declared} bytes; the limit is {self._limits.response_bytes}"
            self._refuse(exchange, Refusal("limit-response-bytes", reason, to=exchange.to, status=502))
            return
        exchange.status = flow.response.status_code
        exchange.address = self.guest.dialled.get(flow.server_conn, "")
        exchange.watch = self._service.inside.watch(exchange)
        if exchange.watch is not None:
            decision = exchange.watch.start(exchange.status, texts(flow.response.headers))
            if not decision.allowed:
                exchange.watch = None  # nothing was fetched
                self._refuse(exchange, by_decision(decision, exchange.to))
                return

        def feed(chunk: bytes) -> bytes:
            if exchange.watch is not None and chunk:
                exchange.watch.feed(chunk)
            return chunk

        flow.response.stream = feed
        kind = EgressKind.LEARNED if exchange.rule == LEARN else EgressKind.ALLOWED
        self._tell_of(kind, exchange, rule=exchange.rule)

    async def websocket_message(self, flow: http.HTTPFlow) -> None:
        """What a guest says over a WebSocket is looked into like a request's body."""
        exchange = of_flow(flow)
        assert flow.websocket is not None
        message = flow.websocket.messages[-1]
        flow.websocket.messages.clear()  # mitmproxy would keep them all
        if not message.from_client:
            exchange.received += len(message.content)
            return
        exchange.sent += len(message.content)
        try:
            await self._service.inside.say(exchange, message.content, self._service.recorder)
        except Refused as refused:
            message.drop()
            exchange.refusal, exchange.answered = refused.refusal, True
            self.tell_refusal(refused.refusal, method=exchange.method, path=exchange.path)
            self.guest.end(refused.refusal.rule, "a WebSocket was closed", EgressKind.REFUSED)

    def error(self, flow: http.HTTPFlow) -> None:
        """It broke off, on either side."""
        self.ended(flow)

    def ended(self, flow: http.HTTPFlow) -> None:
        """All of it has passed, or never will."""
        exchange = flow.metadata.get(EXCHANGE)
        if exchange is None or exchange.closed:
            return
        if flow.websocket is not None and flow.websocket.timestamp_end is None and flow.error is None:
            return  # it has only begun
        self._end(exchange, whole=flow.error is None)

    def finish(self) -> None:
        """The connection is over, and with it what has not ended by itself."""
        for exchange in list(self._open):
            self._end(exchange, whole=False)

    def _end(self, exchange: Exchange, *, whole: bool) -> None:
        exchange.closed = True
        self._open.discard(exchange)
        self._let_go(exchange)
        if exchange.watch is not None:
            for event in exchange.watch.end(whole=whole):
                self._service.recorder.tell(replace(event, via=exchange.via, path=exchange.path))
        if exchange.told:
            seconds = time.monotonic() - exchange.began
            self._tell_of(EgressKind.CLOSED, exchange, sent=exchange.sent, received=exchange.received, seconds=seconds)
        elif exchange.refusal is None:  # what was sent may have arrived
            reason = "the connection ended before an answer"
            self._tell_of(EgressKind.FAILED, exchange, rule="no-answer", reason=reason, sent=exchange.sent)

    def may_keep(self, flow: http.HTTPFlow, amount: int) -> bool:
        """Whether more of a body may be kept."""
        exchange = of_flow(flow)
        exchange.sent += amount
        exchange.kept += amount
        self._service.kept += amount
        if exchange.sent > self._limits.request_bytes:
            self._refuse(exchange, self._too_long(exchange.to))
        elif self._service.kept > self._limits.request_bytes:
            reason = f"requests of more than {self._limits.request_bytes} bytes are being sent at once"
            self._refuse(exchange, Refusal("limit-request-bytes", reason, to=exchange.to, status=503))
        else:
            return True
        self._let_go(exchange)
        return False

    def may_pass(self, flow: http.HTTPFlow, amount: int) -> bool:
        """Whether more of a body may go on."""
        exchange = of_flow(flow)
        exchange.sent += amount
        if exchange.sent <= self._limits.request_bytes:
            return True
        self._refuse(exchange, self._too_long(exchange.to))
        return False

    def may_answer(self, flow: http.HTTPFlow, amount: int) -> bool:
        """Whether more of an answer may go on."""
        exchange = of_flow(flow)
        exchange.received += amount
        if exchange.received <= self._limits.response_bytes:
            return True
        reason = f"an answer was cut off at {self._limits.response_bytes} bytes"
        self.tell_refusal(
            Refusal("limit-response-bytes", reason, to=exchange.to), method=exchange.method, path=exchange.path
        )
        return False

    def wrong_answer(self, flow: http.HTTPFlow) -> Refusal | None:
        """Why a server's answer cannot be passed on."""
        assert flow.response is not None
        try:
            validate_headers(flow.response)
        except ValueError as error:
            to = of_flow(flow).to
            refusal = Refusal("bad-answer", f"{to} has answered what is no HTTP: {error}"[:500], to=to, status=502)
            self.tell_refusal(refusal, method=of_flow(flow).method, path=of_flow(flow).path)
            return refusal
        return None

    def no_server(self, flow: http.HTTPFlow, error: str) -> None:
        """There is no connection to the server, or it broke off before its answer."""
        exchange = of_flow(flow)
        known = self.guest.failures.get(exchange.to)
        if known is not None:
            exchange.refusal = known  # told when it happened
            return
        refusal = Refusal("upstream-failed", f"{exchange.to}: {error[:500]}", to=exchange.to, status=502)
        self._refuse(exchange, refusal)

    def not_dialled(self, refusal: Refusal) -> None:
        """A connection to a server was refused or failed."""
        self.tell_refusal(refusal)

    def long_head(self) -> Refusal:
        """A request's head is longer than allowed."""
        reason = f"a request's head has more than {self._limits.header_bytes} bytes"
        refusal = Refusal("limit-header-bytes", reason, to=self.guest.tunnel or NOWHERE, status=431)
        self.tell_refusal(refusal)
        return refusal

    def bad_head(self) -> None:
        """What came is no HTTP request (the answer is on its way)."""
        refusal = Refusal("bad-request", "what came is no HTTP request", to=self.guest.tunnel or NOWHERE, status=400)
        self.tell_refusal(refusal)

    def tell_refusal(self, refusal: Refusal, **more: Any) -> None:
        """Tell of a refusal that is not a request's."""
        limit = refusal.rule.startswith("limit-")
        kind = EgressKind.LIMIT if limit else EgressKind.FAILED if refusal.failed else EgressKind.REFUSED
        self.tell(kind, refusal.to, rule=refusal.rule, reason=refusal.reason, remedy=refusal.remedy,
                  status=refusal.status, **more)  # fmt: skip

    def tell(self, kind: EgressKind, to: Destination | None, **more: Any) -> None:
        """Tell of something on this connection."""
        to = to or NOWHERE
        event = EgressEvent(kind, time.time(), via=self.guest.door.via, host=to.host, port=to.port, **more)
        self._service.recorder.tell(event)

    def _tell_of(self, kind: EgressKind, exchange: Exchange, **more: Any) -> None:
        exchange.told = True
        self.tell(kind, exchange.to, method=exchange.method, path=exchange.path, status=exchange.status,
                  address=exchange.address, **more)  # fmt: skip

    def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        exchange.refusal = refusal
        if refusal is not self.guest.refusal:  # that one was told when the connection began
            self.tell_refusal(
                refusal, method=exchange.method, path=exchange.path, address=exchange.address, sent=exchange.sent
            )

    def _refuse_long(self, flow: http.HTTPFlow, exchange: Exchange) -> None:
        declared = flow.request.headers.get("content-length", "")
        if declared and int(declared) > self._limits.request_bytes:
            raise Refused(self._too_long(exchange.to))

    def _too_long(self, to: Destination) -> Refusal:
        reason = f"a request has more than {self._limits.request_bytes} bytes"
        return Refusal("limit-request-bytes", reason, to=to, status=413)

    def _let_go(self, exchange: Exchange) -> None:
        self._service.kept -= exchange.kept
        exchange.kept = 0
