"""Hostile names and addresses at the broker's door: what a guest reaches, whatever it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_running import Authority, NameServer, Running, Server, one_answer, rule, running

from vmsandbox.egress.values import EgressKind, HostRule, Tls


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def secure(upstream: Authority, folder: Path) -> Iterator[Server]:
    server = Server(tls=upstream.leaf(folder, "allowed.test", "sub.allowed.test", "192.0.2.7"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    flips = iter(["192.0.2.80", *["127.0.0.1"] * 100])
    found = NameServer(
        {
            "private.test": ["10.1.2.3"],
            "loopback.test": ["127.0.0.1"],
            "metadata.test": ["169.254.169.254"],
            "mapped.test": ["::ffff:169.254.169.254"],
            "own.test": ["9.9.9.9"],
            "flips.test": lambda: [next(flips)],
            "empty.test": [],
        }
    )
    yield found
    found.close()


@pytest.fixture(scope="module")
def broker(
    folder: Path, session: Authority, upstream: Authority, server: Server, secure: Server, names: NameServer
) -> Iterator[Running]:
    ports = (server.port, secure.port)
    own = ["private", "loopback", "metadata", "mapped", "own", "flips", "empty", "nowhere"]
    allow = [
        rule("allowed.test", *ports, addresses=("127.0.0.1",), tls=Tls.INSPECT),
        rule("*.allowed.test", *ports, addresses=("127.0.0.1",)),
        rule("second.test", server.port, addresses=("127.0.0.1",)),
        rule("192.0.2.7", secure.port, addresses=("127.0.0.1",), tls=Tls.INSPECT),
        rule("read.test", server.port, addresses=("127.0.0.1",), methods=("GET",), paths=("/simple/*",)),
        *(rule(f"{name}.test", server.port, secure.port) for name in own),
    ]
    deny = (HostRule("denied.allowed.test", (), source="denied_hosts[0]"),)
    with running(
        folder, session, upstream.file(folder), *allow, deny=deny, resolver=(names.where,), own_addresses=("9.9.9.9",)
    ) as found:
        yield found


def test_an_allowed_host_is_reached_and_told_of(broker: Running, server: Server) -> None:
    code, body = broker.status(f"http://allowed.test:{server.port}/a?b=c")
    assert (code, body["line"]) == (200, "GET /a?b=c HTTP/1.1")
    event = broker.event(kind=EgressKind.ALLOWED, path="/a")
    assert (event.host, event.port, event.address, event.status) == ("allowed.test", server.port, "127.0.0.1", 200)
    closed = broker.event(kind=EgressKind.CLOSED, path="/a")
    assert closed.received == len(json.dumps(body))


def test_nothing_is_allowed_by_an_empty_policy(
    folder: Path, session: Authority, upstream: Authority, server: Server, secure: Server
) -> None:
    before = server.connections, secure.connections
    with running(folder, session, upstream.file(folder)) as blank:
        code, body = blank.status(f"http://127.0.0.1:{server.port}/")
        assert (code, body["rule"], body["error"]) == (403, "default-deny", "refused by vmsandbox")
        assert blank.status(f"https://allowed.test:{secure.port}/")[0] == 403
        event = blank.event(kind=EgressKind.REFUSED, host="allowed.test")
        assert "allowed.test" in event.remedy and event.method == "CONNECT"
    assert (server.connections, secure.connections) == before


def test_the_reason_is_in_the_first_line_for_tools_that_show_no_body(broker: Running, server: Server) -> None:
    for request in (f"GET http://no.test:{server.port}/ HTTP/1.1", f"CONNECT no.test:{server.port} HTTP/1.1"):
        with broker.connect() as sock:
            sock.sendall(f"{request}\r\nHost: no.test:{server.port}\r\nConnection: close\r\n\r\n".encode())
            line = sock.recv(4096).split(b"\r\n")[0]
        assert line == b"HTTP/1.1 403 Forbidden by vmsandbox: no rule allows no.test"


@pytest.mark.parametrize(
    "host",
    [
        "allowed.test.evil",
        "evilallowed.test",
        "denied.allowed.test",
        "test",
        "xn--llowed-2ve.test",
        "second.test.allowed.tes",
    ],
)
def test_a_host_that_only_looks_allowed_is_refused(broker: Running, server: Server, host: str) -> None:
    before = server.connections
    code, body = broker.status(f"http://{host}:{server.port}/")
    assert (code == 403 and body["host"] == host) or body["rule"] == "bad-request"
    assert server.connections == before


@pytest.mark.parametrize(
    "host",
    ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]",
     "[fe80::1%25lo]", "[fe80::1%lo]", "allowed.test.", "allowed.test\\@evil", "user@allowed.test",
     "allowed.test%00.evil",
     "all\x00owed.test", "ällowed.test", "*.allowed.test", "allowed..test", "-allowed.test"],
)  # fmt: skip
def test_a_spelling_that_could_mean_something_else_is_refused(broker: Running, server: Server, host: str) -> None:
    before = server.connections
    for request in (f"GET http://{host}:{server.port}/ HTTP/1.1", f"CONNECT {host}:{server.port} HTTP/1.1"):
        with broker.connect() as sock:
            sock.sendall(f"{request}\r\nHost: {host}:{server.port}\r\nConnection: close\r\n\r\n".encode())
            answer = one_answer(sock)
        assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), answer
        assert b"x-vmsandbox-rule" in answer
    assert server.connections == before


def test_case_does_not_matter_and_what_is_sent_is_canonical(broker: Running, server: Server) -> None:
    code, body = broker.status(f"http://ALLOWED.Test:{server.port}/case")
    assert (code, body["host"]) == (200, f"allowed.test:{server.port}")


def test_another_port_is_refused(broker: Running, server: Server) -> None:
    code, body = broker.status("http://allowed.test:1/")
    assert code == 403 and "port 1 " in str(body["reason"])
    assert broker.status("https://allowed.test:1/")[0] == 403


@pytest.mark.parametrize(
    ("host", "why"),
    [("private.test", "private"), ("loopback.test", "loopback"), ("metadata.test", "metadata"),
     ("mapped.test", "metadata"), ("own.test", "of this host")],
)  # fmt: skip
def test_an_allowed_name_at_a_forbidden_address_is_not_dialled(
    broker: Running, server: Server, host: str, why: str
) -> None:
    before = server.connections
    code, body = broker.status(f"http://{host}:{server.port}/")
    assert (code, body["rule"]) == (403, "private-address") and why in str(body["reason"])
    event = broker.event(kind=EgressKind.REFUSED, host=host)
    assert event.rule == "private-address"
    # TLS is completed, so that the tool can show the reason.
    assert server.connections == before


def test_a_name_is_resolved_once_and_that_address_is_dialled(
    broker: Running, server: Server, names: NameServer
) -> None:
    """The first answer is public (a documentation address, refused too), the next would be loopback."""
    before = server.connections
    code, body = broker.status(f"http://flips.test:{server.port}/")
    assert code == 403 and "192.0.2.80" in str(body["reason"])
    assert names.asked.count("flips.test") == 1
    code, body = broker.status(f"http://flips.test:{server.port}/")
    assert code == 403 and "127.0.0.1" in str(body["reason"])
    assert server.connections == before


def test_a_name_without_an_address_is_a_failure_that_says_so(broker: Running, server: Server) -> None:
    for name in ("empty.test", "nowhere.test"):
        code, body = broker.status(f"http://{name}:{server.port}/")
        assert (code, body["rule"]) == (502, "upstream-unknown")
        assert broker.event(kind=EgressKind.FAILED, host=name).status == 502


def test_a_redirect_is_a_new_request(broker: Running, server: Server) -> None:
    def redirect(handler: object) -> None:
        handler.send_response(302)  # type: ignore[attr-defined]
        handler.send_header("location", f"http://127.0.0.1:{server.port}/secret")  # type: ignore[attr-defined]
        handler.send_header("content-length", "0")  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]

    server.answer = redirect
    try:
        code, body = broker.status("-L", f"http://allowed.test:{server.port}/away")
    finally:
        server.answer = None
    assert (code, body["host"]) == (403, "127.0.0.1")
    assert not [line for line, _, _ in server.seen if "secret" in line]


def test_every_request_on_a_kept_connection_is_judged(broker: Running, server: Server) -> None:
    with broker.connect() as sock:
        for host, expected in (("allowed.test", b"200"), ("evil.test", b"403"), ("second.test", b"200")):
            sock.sendall(
                f"GET http://{host}:{server.port}/kept HTTP/1.1\r\nHost: {host}:{server.port}\r\n\r\n".encode()
            )
            answer = one_answer(sock)
            assert answer.split()[1] == expected, answer
    assert {host for line, host, _ in server.seen if "kept" in line} == {
        f"allowed.test:{server.port}", f"second.test:{server.port}"
    }  # fmt: skip


def test_two_pipelined_requests_are_judged_one_by_one(broker: Running, server: Server) -> None:
    with broker.connect() as sock:
        asked = [f"GET http://{host}:{server.port}/piped HTTP/1.1\r\nHost: {host}:{server.port}\r\n\r\n"
                 for host in ("allowed.test", "evil.test")]  # fmt: skip
        sock.sendall("".join(asked).encode())
        assert one_answer(sock).split()[1] == b"200"
        assert one_answer(sock).split()[1] == b"403"


def test_absolute_form_and_host_have_to_agree(broker: Running, server: Server) -> None:
    for host in ("second.test", "evil.test", "allowed.test:1"):
        with broker.connect() as sock:
            sock.sendall(f"GET http://allowed.test:{server.port}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = one_answer(sock)
            assert b" 403 " in answer and b"host-mismatch" in answer


def test_methods_and_paths_narrow_a_host(broker: Running, server: Server) -> None:
    assert broker.status(f"http://read.test:{server.port}/simple/six/")[0] == 200
    for argv in (["-X", "PUT"], ["-d", "x"]):
        assert broker.status(*argv, f"http://read.test:{server.port}/simple/six/")[0] == 403
    for path in ("/", "/admin", "/simple/..%2fadmin", "/simple//admin", "/simple/%252e%252e/admin"):
        assert broker.status("--path-as-is", f"http://read.test:{server.port}{path}")[0] == 403
    seen = [line for line, host, _ in server.seen if host.startswith("read.test")]
    assert seen == ["GET /simple/six/ HTTP/1.1"]


def test_learning_lets_through_and_tells(folder: Path, session: Authority, upstream: Authority, server: Server) -> None:
    names = NameServer({"new.test": ["127.0.0.1"]})
    with running(folder, session, upstream.file(folder), resolver=(names.where,), learn=True) as broker:
        code, body = broker.status(f"http://new.test:{server.port}/")
        # Learning is about names; a private address is refused all the same.
        assert (code, body["rule"]) == (403, "private-address")
    names.close()
