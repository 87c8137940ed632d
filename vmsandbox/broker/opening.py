"""How a connection begins: what it is, where it goes, and whether that may be. Asked before anything is dialled.

The name that a CONNECT has said, the SNI and later each request's host must be one. A CONNECT is for TLS only: what
could not be looked into or named would be a tunnel for anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mitmproxy import http
from mitmproxy.connection import Connection
from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy import layer, layers
from mitmproxy.proxy.layers.http import HTTPMode
from mitmproxy.proxy.layers.tls import ClientTLSLayer, ServerTLSLayer, parse_client_hello

from vmsandbox.broker.answers import Refusal, by_decision
from vmsandbox.broker.certificates import ALPN
from vmsandbox.broker.layers import GuardedHttp, Last
from vmsandbox.egress.decide import LEARN
from vmsandbox.egress.hosts import BadHostError, is_address, parse_destination, parse_host
from vmsandbox.egress.values import Destination, EgressKind

if TYPE_CHECKING:
    from vmsandbox.broker.proxy import GuestConnection

_HELLO = 64 << 10  # bytes of a ClientHello at most
_ALERT = b"\x15\x03\x03\x00\x02\x02"  # a fatal TLS alert (RFC 8446 6.2), its number follows
_ACCESS_DENIED, _DECODE_ERROR, _UNRECOGNIZED_NAME = b"\x31", b"\x32", b"\x70"
_SNI, _ENCRYPTED_HELLO = 0, 0xFE0D  # TLS extensions (RFC 6066, RFC 9849)
_NOT_TRUSTED = ("unknown ca", "bad certificate", "certificate unknown", "unknown_ca", "certificate_unknown")


class Opening:
    """One connection's beginning, and all of a tunnel that is not looked into."""

    def __init__(self, guest: GuestConnection) -> None:
        self.guest = guest
        self._service = guest.service
        self._tunnelled: float | None = None  # when a tunnel that is not looked into was let through
        self._told: Destination | None = None

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """By mitmproxy's names of them."""
        return {
            "next_layer": self.next_layer,
            "http_connect": self.http_connect,
            "tls_clienthello": self.tls_clienthello,
            "tls_start_client": self.tls_start_client,
            "tls_start_server": self.tls_start_server,
            "tls_failed_client": self.tls_failed_client,
            "tls_failed_server": self.tls_failed_server,
        }

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """CONNECT: answered with the refusal itself where it is refused."""
        guest = self.guest
        guest.head_waits(False)
        refusal = self._refuse_connect(flow.request)
        if refusal is None:
            guest.head_waits(True)  # the ClientHello has its time
            return
        guest.judge.tell_refusal(refusal, method="CONNECT")
        headers = http.Headers(refusal.headers)
        flow.response = http.Response(
            b"HTTP/1.1", refusal.status, refusal.phrase, headers, refusal.body, None, time.time(), time.time()
        )

    def _refuse_connect(self, request: http.Request) -> Refusal | None:
        guest = self.guest
        if guest.door.transparent or guest.tunnel is not None or request.http_version not in ("HTTP/1.1", "HTTP/1.0"):
            return Refusal("bad-request", "CONNECT is only for the proxy itself", status=400)
        try:
            to = parse_destination(request.data.authority.decode("ascii", "backslashreplace"))
            # Node's agents leave 443 out of this Host; it goes nowhere, and a port that it names is still compared.
            if any(parse_destination(host, to.port) != to for host in request.headers.get_all("host") if host):
                return Refusal("host-mismatch", f"CONNECT is to {to}, and the Host header names another", to=to)
        except BadHostError as error:
            return Refusal("bad-host", error.brief)
        decision = self._service.rules.host(to)
        if not decision.allowed:
            return by_decision(decision, to)
        guest.tunnel = to
        request.data.host, request.data.port = to
        return None

    async def next_layer(self, nextlayer: layer.NextLayer) -> None:
        """Say what comes next, or nothing as long as too little has come."""
        guest, context = self.guest, nextlayer.context
        if any(isinstance(one, ClientTLSLayer) for one in context.layers):
            nextlayer.layer = GuardedHttp(context, HTTPMode.transparent, guest)
            return
        if guest.tunnel is None and not guest.door.transparent:
            nextlayer.layer = GuardedHttp(context, HTTPMode.regular, guest)
            return
        data = nextlayer.data_client()
        if not data:
            return
        if starts_like_tls_record(data):
            await self._tls(nextlayer, data)
        elif len(data) < 3 and b"\x16\x03".startswith(data[:2]):
            return  # may become TLS
        elif guest.tunnel is None and guest.door.port != 443:
            nextlayer.layer = GuardedHttp(context, HTTPMode.regular, guest)
        else:
            to = guest.tunnel or Destination("", guest.door.port)
            refusal = Refusal("not-tls", f"port {to.port} carries TLS here, and something else has come", to=to)
            self._last(nextlayer, refusal, refusal.as_http1())

    async def _tls(self, nextlayer: layer.NextLayer, data: bytes) -> None:
        try:
            hello = parse_client_hello(data)
            if hello is None and len(data) <= _HELLO:
                return
            if hello is None or [kind for kind, _ in hello.extensions].count(_SNI) > 1:
                raise ValueError("too long, or more than one SNI")
        except (ValueError, EOFError):
            bad = Refusal("bad-tls", "the TLS ClientHello is none", to=self.guest.tunnel or Destination("", 0))
            self._last(nextlayer, bad, _ALERT + _DECODE_ERROR)
            return
        name, refusal = self._named(hello.sni)
        if refusal is not None:
            if not name:
                self._last(nextlayer, refusal, _ALERT + _UNRECOGNIZED_NAME)
                return
            self.guest.judge.tell_refusal(refusal)
        to = self.guest.tunnel = self.guest.tunnel or Destination(name, self.guest.door.port)
        context = nextlayer.context
        context.server.address = tuple(to)
        self.guest.head_waits(False)
        if refusal is None and not self._service.rules.inspects(to):
            if any(kind == _ENCRYPTED_HELLO for kind, _ in hello.extensions):
                reason = f"the name behind {to.host} is encrypted (ECH), and this rule passes TLS through unseen"
                refusal = Refusal("encrypted-client-hello", reason, to=to)
                self.guest.judge.tell_refusal(refusal)
            else:
                refusal = await self.guest.dial_ahead(to)
            if refusal is None:
                self._tunnelled = time.monotonic()
                nextlayer.layer = layers.TCPLayer(context, ignore=True)
                return
        # What is refused gets its TLS from us, so that the tool can read why.
        self.guest.name, self.guest.refusal = name, refusal
        nextlayer.layer = ServerTLSLayer(context)
        nextlayer.layer.child_layer = ClientTLSLayer(context)

    def _named(self, untrusted_sni: str | None) -> tuple[str, Refusal | None]:
        """The name that a certificate is for ("": there is none), and why it is refused."""
        tunnel, port = self.guest.tunnel, self.guest.door.port
        if untrusted_sni is None:
            if tunnel is not None and is_address(tunnel.host):
                return tunnel.host, None  # RFC 6066 3: an address is never sent as SNI
            return "", Refusal(
                "no-sni", "the TLS ClientHello names no server (SNI)", to=tunnel or Destination("", port)
            )
        try:
            name = parse_host(untrusted_sni)
        except BadHostError as error:
            return "", Refusal("bad-host", error.brief, to=tunnel or Destination("", port))
        if tunnel is not None:
            if name == tunnel.host:
                return name, None
            reason = f"CONNECT is to {tunnel.host}, and TLS inside of it names {name} (SNI)"
            return name, Refusal("sni-mismatch", reason, to=tunnel)
        to = Destination(name, port)
        decision = self._service.rules.host(to)
        return name, None if decision.allowed else by_decision(decision, to)

    def _last(self, nextlayer: layer.NextLayer, refusal: Refusal, words: bytes) -> None:
        self.guest.judge.tell_refusal(refusal)
        nextlayer.layer = Last(nextlayer.context, words)

    def tls_clienthello(self, data: Any) -> None:
        """The server comes first, so that both sides speak the same HTTP; but nobody is dialled for a refusal."""
        data.establish_server_tls_first = self.guest.refusal is None

    def tls_start_client(self, data: Any) -> None:
        """TLS with the guest, as the server it asked for."""
        self.guest.head_waits(True)  # the handshake and the first request
        server = data.context.server
        chosen = (server.alpn or b"") if server.tls_established else None
        data.ssl_conn = self._service.certificates.for_guest(self.guest.name, chosen)

    def tls_start_server(self, data: Any) -> None:
        """TLS with the server, whose certificate has to be for the name that was asked for."""
        server = data.conn
        server.sni = server.address[0]
        offers = [one for one in data.context.client.alpn_offers if one in ALPN]
        server.alpn_offers = offers
        data.ssl_conn = self._service.certificates.for_server(server.sni, offers)

    def tls_failed_client(self, data: Any) -> None:
        """A client that knows which certificates it wants does not take ours; say so, nobody else will."""
        error = str(data.conn.error or "")
        to = self.guest.tunnel
        if to is None or self.guest.refusal is not None:
            return
        if any(words in error.lower() for words in _NOT_TRUSTED):
            reason = (
                f"the client does not accept the session's own authority for {to.host}: "
                "it pins certificates, or brings authorities of its own"
            )
            refusal = Refusal("client-rejects-ca", reason, _pass_through(to), to)
            self.guest.judge.tell_refusal(refusal)
        else:
            self.guest.judge.tell(
                EgressKind.FAILED, to, rule="client-tls", reason=f"TLS with the client: {error[:500]}"
            )

    def tls_failed_server(self, data: Any) -> None:
        """The server's certificate is wrong, or it speaks no TLS."""
        to = Destination(*data.conn.address)
        error = str(data.conn.error or "")
        rule = "upstream-certificate" if "ertificate verify failed" in error or "mismatch" in error else "upstream-tls"
        refusal = Refusal(rule, f"{to}: {error[:500]}", to=to, status=502)
        self.guest.failures[to] = refusal
        self.guest.judge.tell_refusal(refusal, address=self.guest.dialled.get(data.conn, ""))

    def dialled(self, connection: Connection, address: str) -> None:
        """A tunnel is open."""
        to = self.guest.tunnel
        if self._tunnelled is None or to is None:
            return
        self._told = to
        learned = self._service.rules.host(to).rule == LEARN
        kind = EgressKind.LEARNED if learned else EgressKind.ALLOWED
        self.guest.judge.tell(kind, to, method="CONNECT", address=address, rule=self._service.rules.host(to).rule)

    def passes(self, limit: int, amount: int) -> None:
        """A tunnel's bytes are counted as one request and one answer."""
        if self._tunnelled is not None and amount > limit:
            self.guest.end("limit-bytes", f"more than {limit} bytes in one direction of a tunnel")

    def finish(self) -> None:
        """The connection is over."""
        to, self._told = self._told, None
        if to is not None:
            guest = self.guest
            assert self._tunnelled is not None
            seconds = time.monotonic() - self._tunnelled
            guest.judge.tell(
                EgressKind.CLOSED,
                to,
                method="CONNECT",
                sent=guest.sent,
                received=guest.received,
                seconds=seconds,
            )


def _pass_through(to: Destination) -> str:
    """The policy that lets a host's TLS through unseen."""
    host = f"[{to.host}]" if ":" in to.host else to.host
    return json.dumps({"sandbox": {"network": {"rules": [{"host": host, "ports": [to.port], "tls": "passthrough"}]}}})
