"""One request on its way: where it goes, its form, and how it is written to the server.

What was checked is what is sent: host and port go out in the form that the rules saw, whatever spelling came in.
"""

from __future__ import annotations

import re
import time

from mitmproxy import http
from mitmproxy.net.http.validate import validate_headers

from vmsandbox.broker.answers import Refusal, Refused
from vmsandbox.broker.layers import AUTHORITY, EXCHANGE
from vmsandbox.broker.service import Door
from vmsandbox.egress.content import ResponseWatch
from vmsandbox.egress.hosts import BadHostError, parse_destination
from vmsandbox.egress.values import Destination

_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")  # RFC 9110 5.6.2
_TARGET = re.compile(rb"/[\x21-\x7e\x80-\xff]*")
_LINE_BREAK = re.compile(rb"[\r\n\0]")
_BY_HOP = ("proxy-connection", "proxy-authorization", "proxy-authenticate", "keep-alive")


class Exchange:
    """A request and its answer.

    target: its path with the query; path: without, for events (a query may hold what belongs in no record).
    headers: the guest's own. kept: bytes of its body in memory. told: an event has said that it was let through.
    """

    def __init__(self, request: http.Request, to: Destination, via: str) -> None:
        self.to, self.via = to, via
        self.method = request.data.method.decode("ascii", "backslashreplace")[:64]
        self.target = request.data.path.decode("utf-8", "backslashreplace")
        self.path = self.target.partition("?")[0]
        self.headers: list[tuple[str, str]] = []
        self.began = time.monotonic()
        self.rule = ""
        self.status = 0
        self.address = ""
        self.refusal: Refusal | None = None
        self.answered = self.told = self.closed = False
        self.sent = self.received = self.kept = 0
        self.watch: ResponseWatch | None = None


def of_flow(flow: http.HTTPFlow) -> Exchange:
    """The exchange that a flow is."""
    found: Exchange = flow.metadata[EXCHANGE]
    return found


def refuse_bad_form(request: http.Request, over_http2: bool) -> None:
    """Raise Refused for what two programs could read in two ways."""
    wrong = ""
    if request.http_version not in (("HTTP/2.0",) if over_http2 else ("HTTP/1.0", "HTTP/1.1")):
        wrong = "its version"
    elif not _METHOD.fullmatch(request.data.method):
        wrong = "its method"
    elif not _TARGET.fullmatch(request.data.path) and (request.data.method, request.data.path) != (b"OPTIONS", b"*"):
        wrong = "its path"
    elif any(_LINE_BREAK.search(value) for _, value in request.headers.fields):
        wrong = "a header with a line break"
    else:
        try:
            validate_headers(request)
        except ValueError as error:
            wrong = str(error)
    if wrong:
        raise Refused(Refusal("bad-request", f"the request is not passed on: {wrong}"[:500], status=400))


def destination(request: http.Request, tunnel: Destination | None, door: Door) -> Destination:
    """Where a request goes; raises Refused unless everything that names a host names the same one.

    Args:
        tunnel: where its connection goes, if CONNECT or SNI have said so.
    """
    hosts = [value.decode("ascii", "backslashreplace") for value in _all(request, b"host")]
    default = tunnel.port if tunnel else door.port if door.transparent else 80
    authority: bytes = getattr(request, AUTHORITY)
    named = [authority.decode("ascii", "backslashreplace")] if authority else []
    if len(hosts) > 1 or not named + hosts:
        reason = "a request names its host in one Host header (:authority in HTTP/2), and this one does not"
        raise Refused(Refusal("host-mismatch", reason, to=tunnel or Destination("", 0), status=400))
    if tunnel is None and request.data.scheme not in (b"", b"http"):
        raise Refused(Refusal("bad-request", "only http comes without CONNECT", status=400))
    try:
        found = [parse_destination(name, default) for name in named + hosts]
    except BadHostError as error:
        raise Refused(Refusal("bad-host", error.brief, to=tunnel or Destination("", 0))) from None
    first = tunnel or found[0]
    for other in found:
        if other != first:
            what = "its connection is to" if tunnel else "it is to"
            reason = f"a request names {other}, and {what} {first}"
            raise Refused(Refusal("host-mismatch", reason, to=first))
    if door.transparent and first.port != door.port:
        raise Refused(Refusal("host-mismatch", f"a request for {first} came to port {door.port}", to=first))
    return first


def to_be_sent(request: http.Request, to: Destination, *, tunnelled: bool) -> None:
    """Write the request as it was understood, without what is between the guest and the broker."""
    default = 443 if tunnelled else 80
    host = str(to) if to.port != default else f"[{to.host}]" if ":" in to.host else to.host
    request.data.host, request.data.port = to
    if not tunnelled:
        request.data.scheme = b"http"
    for name in _BY_HOP:
        request.headers.pop(name, None)
    if request.headers.get("upgrade", "websocket").lower() != "websocket":
        request.headers.pop("upgrade")
        request.headers.pop("connection", None)
    if request.is_http2:
        request.headers.pop("host", None)
        request.data.authority = host.encode("ascii")
    else:
        request.data.authority = b""
        request.headers["host"] = host


def texts(headers: http.Headers) -> list[tuple[str, str]]:
    """Headers as texts that become the same bytes again."""
    return [
        (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
        for name, value in headers.fields
    ]


def _all(request: http.Request, name: bytes) -> list[bytes]:
    return [value for key, value in request.headers.fields if key.lower() == name]
