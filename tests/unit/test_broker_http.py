"""HTTP at the broker's door: nothing that two programs could read differently, and answers that stream."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from broker_running import Authority, Running, Server, rule, running, told

from vmsandbox.egress.values import Dlp, EgressKind, EgressLimits, Tls

SMALL = EgressLimits(
    connections=4, header_bytes=8192, request_bytes=100_000, response_bytes=300_000, connect_seconds=1, idle_seconds=2
)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def lasting() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def broker(folder: Path, session: Authority, upstream: Authority, lasting: Server) -> Iterator[Running]:
    allow = rule("allowed.test", lasting.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow) as found:
        yield found


def _said(broker: Running, *words: bytes, wait: float = 0) -> bytes:
    """All that comes back to these bytes, until the broker closes."""
    with broker.connect() as sock:
        for word in words:
            sock.sendall(word)
            time.sleep(wait)
        return told(sock)


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 5,5\r\n",
        "Content-Length: -1\r\n",
        "X-Folded: a\r\n b: c\r\n",
        "Host: evil.test\r\n",
        "X-Nul: a\0b\r\n",
        "X-Return: a\rHost: evil.test\r\n",
        "No-Colon\r\n",
        ": no name\r\n",
        "X\tY: z\r\n",
    ],
)
def test_what_two_programs_could_read_differently_is_refused(broker: Running, lasting: Server, lines: str) -> None:
    before = lasting.connections
    to = f"allowed.test:{lasting.port}"
    body = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: evil.test\r\n\r\n"
    request = f"POST http://{to}/ HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n{lines}\r\n{body}"
    with broker.connect() as sock:
        sock.sendall(request.encode("latin-1"))
        answer = sock.recv(65536)
    assert answer.split()[1] in (b"400", b"403"), answer
    assert b"x-vmsandbox-rule" in answer
    assert lasting.connections == before


@pytest.mark.parametrize(
    "line",
    ["GET  http://{to}/ HTTP/1.1 x", "GET http://{to}/ HTTP/2.0", "GET http://{to}/ HTTP/1.9",
     "GET http://{to}/ HTTP/0.9",
     "GET http://{to}/", "G\x01T http://{to}/ HTTP/1.1", "GET ftp://{to}/ HTTP/1.1", "GET https://{to}/ HTTP/1.1",
     "TRACE http://{to}/ HTTP/1.1", "PRI * HTTP/2.0", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
)  # fmt: skip
def test_a_line_that_is_no_request_is_refused(broker: Running, lasting: Server, line: str) -> None:
    before = lasting.connections
    to = f"allowed.test:{lasting.port}"
    with broker.connect() as sock:
        sock.sendall(f"{line.format(to=to)}\r\nHost: {to}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        answer = sock.recv(65536)
    assert answer.split()[1] in (b"400", b"403"), answer
    assert lasting.connections == before


def test_what_is_between_guest_and_broker_does_not_go_on(broker: Running, server: Server, lasting: Server) -> None:
    heads: list[str] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        heads.append(str(handler.headers).lower())
        handler.send_response(204)
        handler.send_header("alt-svc", 'h3=":443"')
        handler.end_headers()

    lasting.answer = answer
    try:
        done = broker.curl("-i", "-H", "Proxy-Authorization: Basic eDp5", "-H", "Upgrade: h2c", "-H",
                           "Connection: Upgrade, HTTP2-Settings", f"http://allowed.test:{lasting.port}/")  # fmt: skip
    finally:
        lasting.answer = None
    assert not [name for name in ("proxy-", "upgrade") if name in heads[0]]
    assert b"204" in done.stdout and b"alt-svc" not in done.stdout.lower()


@pytest.mark.parametrize("secure", [False, True])
def test_an_answer_streams_as_it_comes(folder: Path, session: Authority, upstream: Authority, secure: bool) -> None:
    server = Server(tls=upstream.leaf(folder, "allowed.test") if secure else None)

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for number in range(4):
            data = f"data: {number} {time.time()}\n\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            handler.wfile.flush()
            time.sleep(0.4)
        handler.wfile.write(b"0\r\n\r\n")

    server.answer = answer
    # With the rules about content in force: requests are kept until they are whole, answers never.
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",), tls=Tls.INSPECT)
    with running(folder, session, upstream.file(folder), allow, dlp=Dlp()) as broker:
        import subprocess

        scheme = "https" if secure else "http"
        argv = ["curl", "-q", "-sSN", "--cacert", str(broker.ca), "-x", broker.proxy, "--max-time", "15",
                "-d", "{}", f"{scheme}://allowed.test:{server.port}/v1/messages"]  # fmt: skip
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            delays = []
            for line in child.stdout:
                if line.startswith(b"data:"):
                    delays.append(time.time() - float(line.split()[2]))
            assert child.wait(10) == 0
        assert len(delays) == 4 and max(delays) < 0.3, delays
        allowed = broker.event(kind=EgressKind.ALLOWED, path="/v1/messages")
        closed = broker.event(kind=EgressKind.CLOSED, path="/v1/messages")
        assert closed.time - allowed.time > 1.2  # told when the answer began, not at its end
    server.close()


def test_what_was_sent_without_an_answer_is_told_of(broker: Running, lasting: Server) -> None:
    def never(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        time.sleep(1)

    to = f"allowed.test:{lasting.port}"
    request = f"POST http://{to}/%s HTTP/1.1\r\nHost: {to}\r\nContent-Length: 6\r\n\r\nsecret"
    lasting.answer = never
    try:
        with broker.connect() as sock:
            sock.sendall((request % "left").encode())
            time.sleep(0.3)
        event = broker.event(kind=EgressKind.FAILED, path="/left")
        assert (event.rule, event.sent) == ("no-answer", 6)
        with broker.connect() as sock:
            sock.sendall((request % "hung-up").encode())
            assert b" 502 " in sock.recv(65536)
        event = broker.event(kind=EgressKind.FAILED, path="/hung-up")
        assert (event.rule, event.sent) == ("upstream-failed", 6)
    finally:
        lasting.answer = None


def test_large_bodies_pass_both_ways(broker: Running, lasting: Server, folder: Path) -> None:
    body = folder / "large"
    body.write_bytes(b"0123456789abcdef" * (1 << 16))
    code, answer = broker.status("--data-binary", f"@{body}", f"http://allowed.test:{lasting.port}/large")
    assert (code, answer["bytes"]) == (200, 1 << 20)
    code, answer = broker.status("-H", "Transfer-Encoding: chunked", "-T", str(body),
                                 f"http://allowed.test:{lasting.port}/chunked")  # fmt: skip
    assert (code, answer["bytes"]) == (200, 1 << 20)
    assert broker.event(kind=EgressKind.CLOSED, path="/chunked").sent == 1 << 20


def test_a_refused_upload_is_answered_before_it_ends(broker: Running, lasting: Server) -> None:
    to = f"evil.test:{lasting.port}"
    head = f"POST http://{to}/ HTTP/1.1\r\nHost: {to}\r\nContent-Length: 99999999\r\n\r\n"
    with broker.connect() as sock:
        sock.sendall(head.encode())
        assert b" 403 " in sock.recv(65536)
        sent = 0
        with pytest.raises(OSError):  # the rest is not taken for ever
            while sent < 90_000_000:
                sent += sock.send(b"x" * 65536)
    assert sent < 40_000_000


def test_a_websocket_passes_where_its_request_is_allowed(folder: Path, session: Authority, upstream: Authority) -> None:
    """A handshake and an echo by hand (RFC 6455)."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]

    def serve() -> None:
        sock, _ = listening.accept()
        with sock:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")  # fmt: skip
            frame = sock.recv(1024)
            mask, data = frame[2:6], frame[6:]
            plain = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
            sock.sendall(bytes([0x81, len(plain)]) + plain)
            time.sleep(0.5)

    threading.Thread(target=serve, daemon=True).start()
    allow = rule("allowed.test", port, addresses=("127.0.0.1",), paths=("/live",))
    upgrade = ("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
               "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")  # fmt: skip
    with running(folder, session, upstream.file(folder), allow) as broker:
        with broker.connect() as sock:
            sock.sendall(
                f"GET http://allowed.test:{port}/other HTTP/1.1\r\nHost: allowed.test:{port}\r\n{upgrade}".encode()
            )
            assert b" 403 " in sock.recv(4096)
        with broker.connect() as sock:
            sock.sendall(
                f"GET http://allowed.test:{port}/live HTTP/1.1\r\nHost: allowed.test:{port}\r\n{upgrade}".encode()
            )
            assert b" 101 " in sock.recv(4096)
            sock.sendall(
                bytes([0x81, 0x85, 1, 2, 3, 4]) + bytes(a ^ b for a, b in zip(b"hello", b"\1\2\3\4\1", strict=True))
            )
            assert sock.recv(1024) == b"\x81\x05hello"
        closed = broker.event(kind=EgressKind.CLOSED, path="/live")
        assert (closed.sent, closed.received, closed.status) == (5, 5, 101)


def test_another_protocol_is_not_upgraded_to(folder: Path, session: Authority, upstream: Authority) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    got = bytearray()

    def serve() -> None:
        sock, _ = listening.accept()
        with sock:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: raw\r\nConnection: Upgrade\r\n\r\n")
            sock.settimeout(2)
            with suppress(OSError):
                got.extend(sock.recv(1024))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    allow = rule("allowed.test", port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow) as broker, broker.connect() as sock:
        to = f"allowed.test:{port}"
        sock.sendall(f"GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\nUpgrade: raw\r\nConnection: Upgrade\r\n\r\n".encode())
        sock.recv(4096)
        try:
            sock.sendall(b"raw bytes")
            told(sock, 3)
        except OSError:
            pass
        thread.join(3)
    assert bytes(got) == b""
