"""TLS at the broker's door: one name in CONNECT, SNI, Host and :authority; what is looked into and what is not."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broker_running import Authority, Http2Server, Running, Server, authority, broker_environment, rule, running, told

from vmsandbox.egress.values import EgressKind, Tls

H2 = """
import socket, ssl, sys, json
import h2.connection, h2.events, h2.config
host, port, to, sni, ca, requests = sys.argv[1:]
port, requests = int(port), json.loads(requests)
sock = socket.create_connection((host, port), timeout=10)
sock.sendall(f"CONNECT {to} HTTP/1.1\\r\\nHost: {to}\\r\\n\\r\\n".encode())
answer = sock.recv(4096)
assert b" 200 " in answer, answer
context = ssl.create_default_context(cafile=ca)
context.set_alpn_protocols(["h2"])
sock = context.wrap_socket(sock, server_hostname=sni)
assert sock.selected_alpn_protocol() == "h2", sock.selected_alpn_protocol()
h2c = h2.connection.H2Connection(h2.config.H2Configuration(
    validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding="utf-8"))
h2c.initiate_connection()
answers, bodies, over = {}, {}, set()
for number, headers in enumerate(requests):
    h2c.send_headers(1 + 2 * number, [tuple(pair) for pair in headers], end_stream=True)
sock.sendall(h2c.data_to_send())
broken = ""
while len(over) < len(requests) and not broken:
    data = sock.recv(65536)
    if not data:
        broken = "closed"
        break
    for event in h2c.receive_data(data):
        if isinstance(event, h2.events.ResponseReceived):
            answers[event.stream_id] = dict(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            bodies[event.stream_id] = bodies.get(event.stream_id, "") + event.data.decode()
        elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
            over.add(event.stream_id)
        elif isinstance(event, h2.events.ConnectionTerminated):
            broken = "terminated"
    sock.sendall(h2c.data_to_send())
print(json.dumps({"answers": [answers.get(1 + 2 * n, {}).get(":status") for n in range(len(requests))],
                  "bodies": [bodies.get(1 + 2 * n) for n in range(len(requests))], "broken": broken}))
"""


@pytest.fixture(scope="module")
def secure(upstream: Authority, folder: Path) -> Iterator[Server]:
    server = Server(tls=upstream.leaf(folder, "allowed.test", "second.test", "passed.test", "192.0.2.7"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def other(upstream: Authority, folder: Path) -> Iterator[Server]:
    server = Server(tls=upstream.leaf(folder, "other.test"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def http2(upstream: Authority, folder: Path) -> Iterator[Http2Server]:
    server = Http2Server(upstream.leaf(folder, "allowed.test"), broker_environment())
    yield server
    server.close()


@pytest.fixture(scope="module")
def broker(
    folder: Path, session: Authority, upstream: Authority, secure: Server, other: Server, http2: Http2Server
) -> Iterator[Running]:
    here = {"addresses": ("127.0.0.1",)}
    allow = [
        rule("allowed.test", secure.port, other.port, http2.port, 1, 443, tls=Tls.INSPECT, **here),
        rule("second.test", secure.port, 443, tls=Tls.INSPECT, **here),
        rule("192.0.2.7", secure.port, tls=Tls.INSPECT, **here),
        rule("passed.test", secure.port, 443, tls=Tls.PASSTHROUGH, **here),
    ]
    with running(folder, session, upstream.file(folder), *allow, transparent=(80, 443)) as found:
        yield found


def _tls(broker: Running, to: str, sni: str | None, request: bytes = b"", ca: Path | None = None) -> bytes:
    """CONNECT, TLS with that SNI, one request; all that comes back. Raises ssl.SSLError."""
    with broker.connect() as sock:
        sock.sendall(f"CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n".encode())
        answer = sock.recv(4096)
        assert b" 200 " in answer, answer
        context = ssl.create_default_context(cafile=str(ca or broker.ca))
        context.check_hostname = False
        with context.wrap_socket(sock, server_hostname=sni) as inside:
            inside.sendall(request)
            return told(inside)


def _get(host: str, path: str = "/") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def test_the_host_of_connect_may_leave_out_its_port_and_name_no_other(broker: Running, secure: Server) -> None:
    to = f"allowed.test:{secure.port}"
    for host, status in (("allowed.test", b"200"), (to, b"200"), ("allowed.test:1", b"403"), ("second.test", b"403")):
        with broker.connect() as sock:
            sock.sendall(f"CONNECT {to} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert sock.recv(4096).split()[1] == status, host


def test_a_request_inside_tls_reaches_its_server(broker: Running, secure: Server) -> None:
    for version in ("--http1.1", "--http2"):
        code, body = broker.status(version, f"https://allowed.test:{secure.port}/inside{version}")
        assert (code, body["host"]) == (200, f"allowed.test:{secure.port}")
        assert broker.event(kind=EgressKind.ALLOWED, path=f"/inside{version}").address == "127.0.0.1"


def test_an_allowed_address_needs_no_sni(broker: Running, secure: Server) -> None:
    assert broker.status(f"https://192.0.2.7:{secure.port}/")[0] == 200


def test_sni_and_connect_have_to_be_one_name(broker: Running, secure: Server) -> None:
    before = secure.connections
    for sni in ("second.test", "evil.test"):
        answer = _tls(broker, f"allowed.test:{secure.port}", sni, _get(f"{sni}:{secure.port}"))
        assert answer.startswith(b"HTTP/1.1 403") and b'"sni-mismatch"' in answer
    assert broker.event(kind=EgressKind.REFUSED, rule="sni-mismatch").host == "allowed.test"
    assert secure.connections == before  # nothing was dialled for it


def test_sni_and_connect_have_to_be_one_name_without_a_look_inside(broker: Running, secure: Server) -> None:
    before = secure.connections
    answer = _tls(broker, f"passed.test:{secure.port}", "evil.test", _get("evil.test"))
    assert b'"sni-mismatch"' in answer and secure.connections == before


def test_tls_without_a_name_is_refused(broker: Running, secure: Server) -> None:
    before = secure.connections
    for host in ("allowed.test", "passed.test"):
        with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"):
            _tls(broker, f"{host}:{secure.port}", None)
    assert broker.event(kind=EgressKind.REFUSED, rule="no-sni").host in ("allowed.test", "passed.test")
    assert secure.connections == before


def hello_with(more: Callable[[bytes], bytes]) -> tuple[bytes, bytes]:
    """A ClientHello to passed.test, and the same with one more extension, made from the one that names the server."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="passed.test").do_handshake()
    hello = outgoing.read()
    name = hello[hello.index(b"passed.test") - 9 :][: 9 + len("passed.test")]  # the whole extension
    added = more(name)
    longer = hello.replace(name, name + added)
    for at, size in ((3, 2), (6, 3)):  # the record's length, the message's
        length = int.from_bytes(hello[at : at + size], "big") + len(added)
        longer = longer[:at] + length.to_bytes(size, "big") + longer[at + size :]
    at = 5 + 4 + 2 + 32 + 1 + hello[43]
    at += 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 1 + hello[at]
    length = int.from_bytes(hello[at : at + 2], "big") + len(added)
    return hello, longer[:at] + length.to_bytes(2, "big") + longer[at + 2 :]


def tunnelled(broker: Running, port: int, words: bytes) -> bytes:
    """The first answer to bytes in a tunnel to passed.test."""
    with broker.connect() as sock:
        sock.sendall(f"CONNECT passed.test:{port} HTTP/1.1\r\n\r\n".encode())
        assert b" 200 " in sock.recv(4096)
        sock.sendall(words)
        return sock.recv(4096)


def test_two_names_in_one_hello_are_refused(broker: Running, secure: Server) -> None:
    """The first is allowed; another program could take the second."""
    hello, doubled = hello_with(lambda name: name.replace(b"passed.test", b"evil1.test1"))
    before = secure.connections
    assert tunnelled(broker, secure.port, hello)[:1] == b"\x16"
    assert tunnelled(broker, secure.port, doubled) == b"\x15\x03\x03\x00\x02\x02\x32"
    assert secure.connections == before + 1


def test_a_name_that_is_encrypted_is_not_passed_through(broker: Running, secure: Server) -> None:
    """What can be read is only the name of whoever takes the real one in (RFC 9849): any site of the same house."""
    _, encrypted = hello_with(lambda _name: b"\xfe\x0d\x00\x04\x00\x01\x00\x01")
    before = secure.connections
    tunnelled(broker, secure.port, encrypted)
    assert broker.event(kind=EgressKind.REFUSED, rule="encrypted-client-hello").host == "passed.test"
    assert secure.connections == before


@pytest.mark.parametrize("host", ["allowed.test", "passed.test"])
def test_a_tunnel_carries_nothing_but_tls(broker: Running, secure: Server, host: str) -> None:
    before = secure.connections
    for words in (b"SSH-2.0-x\r\n", _get(host), b"\x00\x01\x02\x03", b"\x16\x03junk that never is a record" * 4,
                  b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):  # fmt: skip
        with broker.connect() as sock:
            sock.sendall(f"CONNECT {host}:{secure.port} HTTP/1.1\r\nHost: {host}:{secure.port}\r\n\r\n".encode())
            assert b" 200 " in sock.recv(4096)
            sock.sendall(words)
            answer = told(sock)
            assert b"not-tls" in answer or answer.startswith(b"\x15\x03\x03"), answer
    assert secure.connections == before
    assert broker.event(kind=EgressKind.REFUSED, rule="not-tls").port == secure.port


def test_host_inside_tls_has_to_be_the_server(broker: Running, secure: Server) -> None:
    before = len(secure.seen)
    for host in ("second.test", "evil.test", "allowed.test:1", "127.0.0.1", f"allowed.test:{secure.port}.evil", ""):
        answer = _tls(broker, f"allowed.test:{secure.port}", "allowed.test", _get(host))
        assert answer.split()[1] in (b"403", b"400"), answer
        assert b"x-vmsandbox-rule: host-mismatch" in answer or b"x-vmsandbox-rule: bad-host" in answer, answer
    for lines in ("", "Host: allowed.test\r\nHost: second.test\r\n", "Host: allowed.test\r\nHost: allowed.test\r\n"):
        request = f"GET / HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode()
        assert b"host-mismatch" in _tls(broker, f"allowed.test:{secure.port}", "allowed.test", request)
    absolute = _get("allowed.test").replace(b"GET /", b"GET https://second.test/")
    assert b"host-mismatch" in _tls(broker, f"allowed.test:{secure.port}", "allowed.test", absolute)
    assert len(secure.seen) == before


def test_a_second_request_inside_tls_is_judged_too(broker: Running, secure: Server) -> None:
    request = _get(f"allowed.test:{secure.port}", "/first").replace(b"Connection: close\r\n", b"") + _get("second.test")
    answer = _tls(broker, f"allowed.test:{secure.port}", "allowed.test", request)
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 403" in answer


def test_http2_is_spoken_on_both_sides(broker: Running, http2: Http2Server) -> None:
    argv = ["--http2", "-w", "\n%{http_version}", "-d", "12345", f"https://allowed.test:{http2.port}/both"]
    done = broker.curl(*argv)
    body, _, version = done.stdout.decode().rpartition("\n")
    assert version == "2" and json.loads(body)[":authority"] == f"allowed.test:{http2.port}"
    assert json.loads(body)["bytes"] == 5


def test_authority_in_http2_has_to_be_the_server(broker: Running, http2: Http2Server) -> None:
    to = f"allowed.test:{http2.port}"

    def head(*more: tuple[str, str], authority: str = to, path: str = "/h2", method: str = "GET") -> list[object]:
        return [[":method", method], [":scheme", "https"], [":path", path], [":authority", authority], *map(list, more)]

    before = len(http2.seen)
    asked = [
        head(),
        head(authority="second.test"),
        head(authority="evil.test"),
        head(("host", "evil.test")),
        head(path="http://evil.test/"),
        head(path="/a b HTTP/1.1\r\nX: y"),
        head(("x", "a\r\nHost: evil.test")),
        head(*((f"x{number}", "y" * 4000) for number in range(20))),
        [[":method", "CONNECT"], [":authority", "evil.test:443"]],
    ]
    for number, one in enumerate(asked):
        argv = [broker_environment() / "bin/python", "-c", H2, *broker.proxy.removeprefix("http://").split(":"), to,
                "allowed.test", broker.ca, json.dumps([one])]  # fmt: skip
        done = subprocess.run([str(word) for word in argv], capture_output=True, timeout=20)
        assert done.returncode == 0, done.stderr.decode()
        found = json.loads(done.stdout)
        if number == 0:
            assert found["answers"] == ["200"]
        else:
            assert found["answers"][0] in ("403", "400") or found["broken"] or found["answers"] == [None], (one, found)
    assert [one[":path"] for one in http2.seen[before:]] == ["/h2"]
    argv[-1] = json.dumps([asked[0], asked[1], asked[0], asked[2]])
    found = json.loads(subprocess.run([str(word) for word in argv], capture_output=True, timeout=20).stdout)
    assert found["answers"] == ["200", "403", "200", "403"]
    assert json.loads(found["bodies"][1])["rule"] == "host-mismatch"


def test_what_is_passed_through_has_the_servers_own_certificate(
    broker: Running, secure: Server, upstream: Authority, folder: Path
) -> None:
    ca = upstream.file(folder)
    answer = _tls(broker, f"passed.test:{secure.port}", "passed.test", _get("passed.test", "/passed"), ca)
    assert answer.startswith(b"HTTP/1.1 200")
    opened = broker.event(kind=EgressKind.ALLOWED, host="passed.test")
    assert (opened.method, opened.path, opened.address) == ("CONNECT", "", "127.0.0.1")
    closed = broker.event(kind=EgressKind.CLOSED, host="passed.test")
    assert closed.sent > 300 and closed.received > 300


def test_why_there_is_no_tunnel_can_be_read_too(broker: Running) -> None:
    """Nothing listens on 443 there; the second is the same through the transparent door."""
    host, port = broker.transparent[443]
    for argv, proxy in (([], True), (["--connect-to", f"::{host}:{port}"], False)):
        code, body = broker.status(*argv, "https://passed.test/", proxy=proxy)
        assert (code, body["rule"]) == (502, "upstream-failed")


def test_a_client_that_pins_certificates_is_told_of_with_a_remedy(
    broker: Running, secure: Server, upstream: Authority, folder: Path
) -> None:
    with pytest.raises(ssl.SSLError):
        _tls(broker, f"second.test:{secure.port}", "second.test", ca=upstream.file(folder))
    event = broker.event(kind=EgressKind.REFUSED, rule="client-rejects-ca")
    assert event.host == "second.test" and '"passthrough"' in event.remedy


def test_a_server_with_the_wrong_certificate_is_not_talked_to(broker: Running, other: Server) -> None:
    before = len(other.seen)
    code, body = broker.status(f"https://allowed.test:{other.port}/secret")
    assert (code, body["rule"]) == (502, "upstream-certificate") and len(other.seen) == before
    assert broker.event(kind=EgressKind.FAILED, rule="upstream-certificate").port == other.port


def test_a_server_that_nobody_vouches_for_is_not_talked_to(folder: Path, session: Authority, secure: Server) -> None:
    unknown = authority("unknown").file(folder)
    allow = rule("allowed.test", secure.port, addresses=("127.0.0.1",), tls=Tls.INSPECT)
    with running(folder, session, unknown, allow) as broker:
        code, body = broker.status(f"https://allowed.test:{secure.port}/")
        assert (code, body["rule"]) == (502, "upstream-certificate")


def test_transparent_tls_goes_where_sni_says(broker: Running) -> None:
    """The server's port is 443 to the broker here: it is not reached, but dialled where the rule says."""
    host, port = broker.transparent[443]
    argv = ["--connect-to", f"::{host}:{port}"]
    code, body = broker.status(*argv, "https://allowed.test/", proxy=False)
    assert (code, body["rule"], body["port"]) == (502, "upstream-failed", 443)
    code, body = broker.status(*argv, "https://evil.test/", proxy=False)
    assert (code, body["rule"], body["host"]) == (403, "default-deny", "evil.test")
    assert broker.event(kind=EgressKind.REFUSED, via="transparent", host="evil.test").port == 443
    code, body = broker.status(*argv, "-H", "Host: second.test", "https://allowed.test/", proxy=False)
    assert code in (403, 502) and body["rule"] in ("host-mismatch", "upstream-failed")


def test_transparent_tls_without_a_name_is_refused(broker: Running) -> None:
    context = ssl.create_default_context(cafile=str(broker.ca))
    context.check_hostname = False
    with socket.create_connection(broker.transparent[443], timeout=5) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)
    with socket.create_connection(broker.transparent[443], timeout=5) as sock:
        sock.sendall(_get("allowed.test"))
        assert b"not-tls" in told(sock)


def test_transparent_http_goes_where_host_says(broker: Running) -> None:
    def ask(request: bytes) -> bytes:
        with socket.create_connection(broker.transparent[80], timeout=5) as sock:
            sock.sendall(request)
            return told(sock)

    assert b'"default-deny"' in ask(_get("evil.test"))
    assert b'"host-mismatch"' in ask(_get("allowed.test:1"))
    assert ask(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert ask(b"CONNECT allowed.test:443 HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 400")
