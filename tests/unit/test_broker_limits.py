"""Limits at the broker's door: sizes, times, rates, connections. What passes one is told which."""

from __future__ import annotations

import http.server
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from broker_running import QUIET, Authority, Http2Server, Server, broker_environment, rule, running, told

from vmsandbox.egress.values import Dlp, EgressKind, EgressLimits, Tls

SMALL = EgressLimits(
    connections=4, header_bytes=8192, request_bytes=100_000, response_bytes=300_000, connect_seconds=1, idle_seconds=2
)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("dlp", [QUIET, Dlp()])
def test_too_large_a_request_is_refused(
    folder: Path, session: Authority, upstream: Authority, server: Server, dlp: Dlp
) -> None:
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    body = folder / "body"
    body.write_bytes(b"x" * 100_001)
    with running(folder, session, upstream.file(folder), allow, limits=SMALL, dlp=dlp) as broker:
        url = f"http://allowed.test:{server.port}/"
        for argv in (["--data-binary", f"@{body}"], ["-H", "Transfer-Encoding: chunked", "-T", str(body)]):
            code, answer = broker.status(*argv, url)
            assert (code, answer["rule"]) == (413, "limit-request-bytes")
        assert broker.event(kind=EgressKind.LIMIT, rule="limit-request-bytes").status == 413
        body.write_bytes(b"x" * 100_000)
        assert broker.status("--data-binary", f"@{body}", url)[0] == 200


def test_too_large_a_request_is_refused_before_it_comes(
    folder: Path, session: Authority, upstream: Authority, server: Server
) -> None:
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow, limits=SMALL) as broker, broker.connect() as sock:
        to = f"allowed.test:{server.port}"
        sock.sendall(f"POST http://{to}/ HTTP/1.1\r\nHost: {to}\r\nContent-Length: 100001\r\n\r\n".encode())
        assert b" 413 " in sock.recv(65536)
    assert server.connections == 0


def test_too_long_an_answer_is_refused_or_cut_off(
    folder: Path, session: Authority, upstream: Authority, server: Server
) -> None:
    def declared(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "300001")
        handler.end_headers()
        handler.wfile.write(b"x" * 300_001)

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("connection", "close")
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"x" * 10_000)
        handler.close_connection = True

    def long_head(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 20_000)

    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow, limits=SMALL) as broker:
        url = f"http://allowed.test:{server.port}/"
        server.answer = declared
        assert broker.status(url)[1]["rule"] == "limit-response-bytes"
        server.answer = endless
        done = broker.curl("-H", "X: 2", url)
        assert done.returncode != 0 or len(done.stdout) <= 300_000
        assert len(done.stdout) <= 300_000
        server.answer = long_head
        assert broker.status(url)[0] == 502


def test_a_long_head_is_refused(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow, limits=SMALL) as broker:
        head = f"GET http://allowed.test:{server.port}/ HTTP/1.1\r\n".encode() + b"X: " + b"y" * 9000
        with broker.connect() as sock:
            sock.sendall(head)
            answer = sock.recv(65536)
        assert b" 431 " in answer and b"limit-header-bytes" in answer
        assert broker.event(kind=EgressKind.LIMIT, rule="limit-header-bytes").status == 431


def test_a_slow_head_is_ended(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",), tls=Tls.INSPECT)
    with running(folder, session, upstream.file(folder), allow, limits=SMALL) as broker:
        begun = time.monotonic()
        with broker.connect() as slow, broker.connect() as silent, broker.connect() as tunnel:
            tunnel.sendall(f"CONNECT allowed.test:{server.port} HTTP/1.1\r\n\r\n".encode())
            assert b" 200 " in tunnel.recv(4096)
            with pytest.raises(OSError):
                for byte in b"GET http://allowed.test/ HTTP/1.1\r\n" * 100:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert told(silent) == b"" and told(tunnel) == b""
        assert time.monotonic() - begun < 4
        assert broker.event(kind=EgressKind.LIMIT, rule="limit-connect-seconds")


def test_connections_are_counted(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    limits = replace(SMALL, connect_seconds=30, idle_seconds=30)
    with running(folder, session, upstream.file(folder), allow, limits=limits) as broker:
        many = [broker.connect() for _ in range(4)]
        time.sleep(0.2)
        code, answer = broker.status(f"http://allowed.test:{server.port}/")
        assert (code, answer["rule"]) == (503, "limit-connections")
        assert broker.event(kind=EgressKind.LIMIT, rule="limit-connections")
        for sock in many:
            sock.close()
        time.sleep(0.3)
        assert broker.status(f"http://allowed.test:{server.port}/")[0] == 200


def test_a_silent_connection_is_ended(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(8)

    server.answer = answer
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow, limits=SMALL) as broker:
        begun = time.monotonic()
        broker.status(f"http://allowed.test:{server.port}/")
        assert time.monotonic() - begun < 6


def test_a_server_that_does_not_accept_is_a_timeout(folder: Path, session: Authority, upstream: Authority) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        queue = [socket.socket() for _ in range(4)]
        for sock in queue:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        port = full.getsockname()[1]
        allow = rule("allowed.test", port, addresses=("127.0.0.1",))
        with running(folder, session, upstream.file(folder), allow, limits=SMALL) as broker:
            begun = time.monotonic()
            code, answer = broker.status(f"http://allowed.test:{port}/")
            assert (code, answer["rule"]) == (504, "upstream-timeout") and time.monotonic() - begun < 3
        for sock in queue:
            sock.close()


def test_the_next_address_is_tried(folder: Path, session: Authority, upstream: Authority) -> None:
    server = Server("127.0.0.9")
    allow = rule("allowed.test", server.port, addresses=("127.0.0.8", "127.0.0.9"))
    with running(folder, session, upstream.file(folder), allow) as broker:
        assert broker.status(f"http://allowed.test:{server.port}/")[0] == 200
        assert broker.event(kind=EgressKind.ALLOWED).address == "127.0.0.9"
    server.close()


def test_an_address_that_is_silent_leaves_time_for_the_next(
    folder: Path, session: Authority, upstream: Authority
) -> None:
    server = Server("127.0.0.9")
    with socket.socket() as full:
        full.bind(("127.0.0.8", server.port))
        full.listen(0)
        queue = [socket.socket() for _ in range(4)]
        for sock in queue:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        allow = rule("allowed.test", server.port, addresses=("127.0.0.8", "127.0.0.9"))
        limits = replace(SMALL, connect_seconds=5, idle_seconds=20)
        with running(folder, session, upstream.file(folder), allow, limits=limits) as broker:
            assert broker.status(f"http://allowed.test:{server.port}/")[0] == 200
        for sock in queue:
            sock.close()
    server.close()


def test_bandwidth_is_bounded(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "600000")
        handler.end_headers()
        handler.wfile.write(b"x" * 600_000)

    server.answer = answer
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    limits = EgressLimits(bytes_per_second=200_000)
    with running(folder, session, upstream.file(folder), allow, limits=limits) as broker:
        begun = time.monotonic()
        assert len(broker.curl(f"http://allowed.test:{server.port}/").stdout) == 600_000
        assert 1.5 < time.monotonic() - begun < 6


def test_requests_that_wait_are_bounded(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(5)

    server.answer = answer
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow) as broker, broker.connect() as sock:
        to = f"allowed.test:{server.port}"
        sock.sendall(f"GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\n\r\n".encode())
        sent = 0
        with pytest.raises(OSError):
            while sent < 60_000_000:
                sent += sock.send(b"x" * 65536)
        assert sent < 30_000_000


def test_a_client_that_opens_no_window_does_not_fill_memory(
    folder: Path, session: Authority, upstream: Authority
) -> None:
    """HTTP/2: the server may send 320 MB, the client has taken 64 KiB."""
    server = Http2Server(upstream.leaf(folder, "allowed.test"), broker_environment())
    client = """
import socket, ssl, sys, time
import h2.connection, h2.config
host, port, to, ca = sys.argv[1:]
sock = socket.create_connection((host, int(port)), timeout=10)
sock.sendall(f"CONNECT {to} HTTP/1.1\\r\\n\\r\\n".encode())
assert b" 200 " in sock.recv(4096)
context = ssl.create_default_context(cafile=ca)
context.set_alpn_protocols(["h2"])
sock = context.wrap_socket(sock, server_hostname="allowed.test")
here = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
here.initiate_connection()
head = {":method": "GET", ":scheme": "https", ":path": "/large", ":authority": to}
here.send_headers(1, list(head.items()), end_stream=True)
sock.sendall(here.data_to_send())
time.sleep(60)
"""
    to = f"allowed.test:{server.port}"
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",), tls=Tls.INSPECT)
    with running(folder, session, upstream.file(folder), allow) as broker:
        host, port = broker.proxy.removeprefix("http://").split(":")
        argv = [str(broker_environment() / "bin/python"), "-c", client, host, port, to, str(broker.ca)]
        with subprocess.Popen(argv) as guest:
            broker.event(kind=EgressKind.ALLOWED, path="/large", timeout=10)
            time.sleep(3)
            resident = Path(f"/proc/{broker.broker.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
            guest.kill()
        assert int(resident) < 160_000, resident  # kB; 55,000 at rest
    server.close()


def test_a_reader_that_takes_nothing_does_not_fill_memory(
    folder: Path, session: Authority, upstream: Authority
) -> None:
    """HTTP/1 to a client that never reads: the server is not read either."""
    server = Server()
    sent = [0]

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "500000000")
        handler.end_headers()
        handler.connection.settimeout(3)
        try:
            while sent[0] < 500_000_000:
                sent[0] += handler.connection.send(b"x" * 1_000_000)
        except OSError:
            pass

    server.answer = answer
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(folder, session, upstream.file(folder), allow) as broker, broker.connect() as sock:
        to = f"allowed.test:{server.port}"
        sock.sendall(f"GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\n\r\n".encode())
        time.sleep(2)
        assert 0 < sent[0] < 40_000_000
    server.close()
