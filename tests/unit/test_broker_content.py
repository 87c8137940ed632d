"""What the broker sees inside: secrets put in, leaks refused, packages written down; and none of it in the records."""

from __future__ import annotations

import email.utils
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from broker_running import Authority, Running, Server, authority, broker_environment, rule, told

from vmsandbox.broker.start import Listeners, start_broker
from vmsandbox.egress.values import (
    BrokerConfig,
    Dlp,
    EgressEvent,
    EgressKind,
    EgressPolicy,
    PackageRules,
    SecretUse,
    Tls,
)
from vmsandbox.process import Programs

VALUE = "sk-real-0123456789-abcdefghij"
PLACEHOLDER = "vmsandbox-placeholder-API_KEY-6f2b8c1d9e"
CANARY = "vmsandboxcanary7c9e2f4a1b6d8035"


@pytest.fixture(scope="module")
def upstream() -> Authority:
    return authority("upstream")


@pytest.fixture(scope="module")
def server(upstream: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tls=upstream.leaf(tmp_path_factory.mktemp("leaf"), "api.test", "other.test", "pypi.test"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def talk() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture(scope="module")
def broker(
    upstream: Authority, server: Server, talk: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:

    folder = tmp_path_factory.mktemp("broker")
    session = authority("session")
    here = ("127.0.0.1",)
    policy = EgressPolicy(
        allow=tuple(rule(f"{name}.test", server.port, talk.getsockname()[1], addresses=here, tls=Tls.INSPECT)
                    for name in ("api", "other", "pypi")),
        secrets=(SecretUse("API_KEY", PLACEHOLDER, ("api.test",), "x-api-key"),),
        packages=PackageRules(deny=("pypi:evil*",), minimum_age_days=7),
        dlp=Dlp(freeze=True),
    )  # fmt: skip
    config = BrokerConfig("test", policy, {"API_KEY": VALUE}, (CANARY,), session.certificate, session.key)
    door = socket.create_server(("127.0.0.1", 0), backlog=64)
    events: list[EgressEvent] = []
    bundle = upstream.file(folder)
    running = start_broker(config, Listeners(door), broker_environment(), Programs(), events.append, ca_bundle=bundle)
    assert running.wait_ready(30), running._said
    yield Running(running, events, folder, session.file(folder), f"http://127.0.0.1:{door.getsockname()[1]}")
    running.stop()
    door.close()
    assert VALUE not in repr(events) and CANARY not in repr(events)


def _key_seen(server: Server) -> list[str]:
    keys: list[str] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        keys.append(handler.headers.get("x-api-key", ""))
        handler.send_response(204)
        handler.end_headers()

    server.answer = answer
    return keys


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_the_placeholder_becomes_the_secret_for_its_host_alone(broker: Running, server: Server, version: str) -> None:
    keys = _key_seen(server)
    try:
        argv = [version, "-H", f"X-Api-Key: {PLACEHOLDER}"]
        assert broker.status(*argv, f"https://api.test:{server.port}/v1?x=1")[0] == 204
        assert keys == [VALUE]
        code, body = broker.status(*argv, f"https://other.test:{server.port}/v1")
        assert code == 403 and body["rule"] == "secret-outside"
        assert keys == [VALUE]
    finally:
        server.answer = None
    assert broker.event(kind=EgressKind.ALERT, host="other.test").via == "proxy"


def test_a_canary_or_a_secret_in_a_body_is_refused_and_asks_for_a_freeze(broker: Running, server: Server) -> None:
    before = len(server.seen)
    for body in (f"a={CANARY}", f"key is {VALUE} "):
        code, answer = broker.status("-d", body, f"https://other.test:{server.port}/leak")
        assert code == 403 and answer["rule"] in ("dlp", "canary")
    alert = broker.event(kind=EgressKind.ALERT, path="/leak")
    assert alert.more["freeze"] == "yes"
    assert len(server.seen) == before


def test_what_is_found_in_a_path_is_not_written_down(broker: Running, server: Server) -> None:
    assert broker.status(f"https://other.test:{server.port}/{CANARY}")[0] == 403
    assert broker.status(f"https://other.test:{server.port}/x?y={CANARY}")[0] == 403
    assert CANARY not in repr(broker.events)


def test_a_leak_over_a_websocket_is_refused(broker: Running, talk: socket.socket) -> None:
    """Each message is looked into; the one that leaks ends the connection and does not arrive."""
    got = bytearray()

    def serve() -> None:
        sock, _ = talk.accept()
        with sock, suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            sock.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
            )
            while data := sock.recv(4096):
                mask = data[2:6]
                got.extend(byte ^ mask[at % 4] for at, byte in enumerate(data[6:]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    to = f"api.test:{talk.getsockname()[1]}"
    with broker.connect() as sock:
        sock.sendall(
            f"GET http://{to}/live HTTP/1.1\r\nHost: {to}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert b" 101 " in sock.recv(4096)
        for text in (b"harmless", CANARY.encode()):
            sock.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
            time.sleep(0.3)
        told(sock)
    thread.join(5)
    assert bytes(got[:8]) == b"harmless" and CANARY.encode() not in bytes(got)
    assert broker.event(kind=EgressKind.REFUSED, path="", host="api.test")


def test_a_package_that_turns_out_too_young_does_not_reach_the_guest(broker: Running, server: Server) -> None:
    """Known by the answer's head alone: the answer is replaced while it begins."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("last-modified", email.utils.formatdate(usegmt=True))
        handler.send_header("content-length", "5")
        handler.end_headers()
        handler.wfile.write(b"young")

    server.answer = answer
    try:
        for version in ("--http1.1", "--http2"):
            url = f"https://pypi.test:{server.port}/packages/aa/fresh-1.0-py3-none-any.whl"
            done = broker.curl("-w", "%{http_code}", version, url)
            assert done.stdout.endswith(b"403") and b"young" not in done.stdout
    finally:
        server.answer = None


def test_a_package_is_written_down_and_a_denied_one_refused(broker: Running, server: Server) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "5")
        handler.end_headers()
        handler.wfile.write(b"wheel")

    server.answer = answer
    try:
        base = f"https://pypi.test:{server.port}"
        assert broker.curl(f"{base}/packages/aa/six-1.16.0-py2.py3-none-any.whl").stdout == b"wheel"
        code, _ = broker.status(f"{base}/packages/aa/evilthing-1.0-py3-none-any.whl")
        assert code == 403
    finally:
        server.answer = None
    event = broker.event(kind=EgressKind.PACKAGE)
    assert (event.more["name"], event.more["version"], event.via) == ("six", "1.16.0", "proxy")
    assert event.more["digest"].startswith("sha256:")


def test_a_package_whose_answer_breaks_off_has_no_digest(broker: Running, server: Server) -> None:
    """Chunked: no length says that something is missing. A digest of half a file would be a false one."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nwheel\r\n")  # and no last chunk
        handler.close_connection = True

    server.answer = answer
    try:
        broker.curl("--http1.1", f"https://pypi.test:{server.port}/packages/aa/broken-1.0-py3-none-any.whl")
    finally:
        server.answer = None
    broker.event(kind=EgressKind.CLOSED, path="/packages/aa/broken-1.0-py3-none-any.whl")
    [package] = [one for one in broker.events if one.more.get("name") == "broken"]
    assert package.more["partial"] == "yes" and "digest" not in package.more
