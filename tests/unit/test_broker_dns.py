"""Names that a guest asks for: answered by the policy alone, and never by asking anybody."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest
from broker_running import NameServer, Running, authority, rule, running

from vmsandbox.broker.dnswire import BadMessage, parse_answer, parse_query, query, reply
from vmsandbox.egress.values import EgressKind

A, AAAA, TXT, HTTPS = 1, 28, 16, 65


@pytest.fixture(scope="module")
def asked() -> Iterator[NameServer]:
    server = NameServer({})
    yield server
    server.close()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, asked: NameServer) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("dns")
    allow = [rule("allowed.test"), rule("*.allowed.test"), rule("other.test", 8443), rule("192.0.2.7")]
    bundle = authority("upstream").file(folder)
    with running(folder, authority("session"), bundle, *allow, resolver=(asked.where,), dns=True) as found:
        yield found


def _ask(broker: Running, message: bytes, wait: float = 2) -> bytes | None:
    assert broker.dns is not None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(wait)
        sock.sendto(message, broker.dns)
        try:
            return sock.recv(4096)
        except TimeoutError:
            return None


def _status(answer: bytes | None) -> int:
    assert answer is not None
    return answer[3] & 0xF


@pytest.mark.parametrize("name", ["allowed.test", "a.b.allowed.test", "ALLOWED.test", "other.test"])
def test_an_allowed_name_is_at_the_broker(broker: Running, asked: NameServer, name: str) -> None:
    answer = _ask(broker, query(7, name, A))
    assert answer is not None and broker.dns is not None
    assert parse_answer(answer, 7, name.lower(), A).addresses == ("127.0.0.1",)
    for kind in (AAAA, TXT, HTTPS):
        answer = _ask(broker, query(8, name, kind))
        assert _status(answer) == 0 and answer is not None and answer[6:8] == b"\0\0"
    assert asked.asked == []


@pytest.mark.parametrize(
    "name", ["evil.test", "allowed.test.evil", "xallowed.test", "c2VjcmV0.tunnel.evil.test", "localhost",
             "1.0.0.127.in-addr.arpa",
             "192.0.2.7", "127.0.0.1", "under_score.allowed.test", "xn--a.allowed.test"]
)  # fmt: skip
def test_any_other_name_is_refused_and_told_of(broker: Running, asked: NameServer, name: str) -> None:
    for kind in (A, TXT):
        answer = _ask(broker, query(9, name, kind))
        assert _status(answer) == 5 and answer is not None and answer[6:8] == b"\0\0"
    assert broker.event(kind=EgressKind.REFUSED, via="dns", host=name.lower())
    assert asked.asked == []


def test_questions_over_tcp(broker: Running) -> None:
    assert broker.dns is not None
    with socket.create_connection(broker.dns, timeout=3) as sock:
        for name, status in (("allowed.test", 0), ("evil.test", 5)):
            message = query(11, name, A)
            sock.sendall(struct.pack("!H", len(message)) + message)
            (length,) = struct.unpack("!H", sock.recv(2))
            assert _status(sock.recv(length)) == status


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"", None),
        (b"\0\1", None),
        (query(1, "allowed.test", A)[:-3], 1),
        (query(1, "allowed.test", A)[:12] + b"\xc0\x0c\0\1\0\1", 1),
        (query(1, "allowed.test", A)[:12] + b"\x3f" + b"a" * 10, 1),
        (b"\0\1\x01\0\0\2\0\0\0\0\0\0" + query(1, "allowed.test", A)[12:] * 2, 1),
        (b"\0\1\x81\0" + query(1, "allowed.test", A)[4:], None),  # an answer is not answered
        (b"\0\1\x29\0" + query(1, "allowed.test", A)[4:], 4),  # an update
        (query(1, "allowed.test", A)[:-2] + b"\0\3", 5),  # CHAOS
        (b"\0\1\x01\0\0\1\0\0\0\0\0\0" + b"\x3fa" * 2000, 1),
    ],
)
def test_what_is_no_question_is_an_error_or_dropped(broker: Running, message: bytes, status: int | None) -> None:
    answer = _ask(broker, message, 0.3 if status is None else 2)
    assert (None if answer is None else answer[3] & 0xF) == status
    assert _status(_ask(broker, query(3, "allowed.test", A))) == 0  # still there


def test_refused_names_do_not_flood_the_records(broker: Running) -> None:
    before = len(broker.events)
    assert broker.dns is not None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(3000):
            sock.sendto(query(1, f"x{number}.evil.test", A), broker.dns)
            if number % 100 == 99:
                time.sleep(0.02)  # what comes faster than it is read, the kernel drops
    counted = broker.event(kind=EgressKind.REFUSED, host="", timeout=5)
    assert int(counted.more["count"]) > 0
    assert len(broker.events) - before < 600


def test_an_answer_is_only_taken_for_its_question() -> None:
    question = parse_query(query(5, "a.test", A))
    good = reply(question, 0, "192.0.2.1")
    assert parse_answer(good, 5, "a.test", A).addresses == ("192.0.2.1",)
    for number, name, kind in ((6, "a.test", A), (5, "b.test", A), (5, "a.test", AAAA)):
        with pytest.raises(BadMessage):
            parse_answer(good, number, name, kind)
    other = good.replace(b"\xc0\x0c", b"\x01b\x04test\x00")  # an address of another name
    assert parse_answer(other, 5, "a.test", A).addresses == ()
    for at in range(len(good)):
        with pytest.raises((BadMessage, struct.error)):
            parse_answer(good[:at], 5, "a.test", A)


def test_pointers_that_lead_in_circles_are_refused() -> None:
    head = struct.pack("!6H", 5, 0x8180, 1, 1, 0, 0)
    for name in (b"\xc0\x0c", b"\x01a\xc0\x0c", b"\xc0\x0e\xc0\x0c"):
        with pytest.raises(BadMessage):
            parse_answer(head + name + b"\0\1\0\1", 5, "a", A)
