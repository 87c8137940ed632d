"""DNS messages as bytes, as little of them as is needed here (RFC 1035 4). Strict: what is odd is an error.

One question, addresses and aliases as answers. Nothing is read twice: a name's pointers only lead backwards.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

A, CNAME, AAAA, OPT = 1, 5, 28, 41
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
_RESPONSE, _TRUNCATED, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0200, 0x0100, 0x0080
_ANSWERS = 64  # records of an answer that are read


class BadMessage(Exception):
    """Not a DNS message that is understood here."""


@dataclass(frozen=True)
class Question:
    """One question. name: as it was asked, lower case, without the root's dot. asked: its bytes, for the answer."""

    id: int
    flags: int
    name: str
    kind: int
    klass: int
    asked: bytes

    @property
    def opcode(self) -> int:
        """0: a standard query."""
        return self.flags >> 11 & 0xF


@dataclass(frozen=True)
class Answer:
    """What a resolver said. status: NOERROR, NXDOMAIN …; truncated: ask again over TCP."""

    status: int
    truncated: bool
    addresses: tuple[str, ...]


def query(number: int, name: str, kind: int) -> bytes:
    """A question for a resolver, which is to find the answer itself."""
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
    return struct.pack("!6H", number, _RECURSION_DESIRED, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, IN)


def parse_query(untrusted: bytes) -> Question:
    """One question of a client; raises BadMessage."""
    if len(untrusted) < 12:
        raise BadMessage("short")
    number, flags, questions, answers, authority, _ = struct.unpack_from("!6H", untrusted)
    if flags & _RESPONSE or questions != 1 or answers or authority:
        raise BadMessage("not one question")
    name, at = _name(untrusted, 12, pointers=False)
    if at + 4 > len(untrusted):
        raise BadMessage("short")
    kind, klass = struct.unpack_from("!2H", untrusted, at)
    return Question(number, flags, name, kind, klass, untrusted[12 : at + 4])


def reply(question: Question, status: int, address: str | None = None, seconds: int = 30) -> bytes:
    """An answer with at most one address."""
    flags = _RESPONSE | question.opcode << 11 | question.flags & _RECURSION_DESIRED | _RECURSION_AVAILABLE | status
    head = struct.pack("!6H", question.id, flags, 1, 0 if address is None else 1, 0, 0)
    record = b""
    if address is not None:
        packed = ipaddress.ip_address(address).packed
        record = b"\xc0\x0c" + struct.pack("!2HIH", question.kind, IN, seconds, len(packed)) + packed
    return head + question.asked + record


def refuse_unread(untrusted: bytes) -> bytes | None:
    """FORMERR for what could not be read; None for what has not even a head, or is an answer."""
    if len(untrusted) < 12 or untrusted[2] & 0x80:
        return None
    return untrusted[:2] + struct.pack("!5H", _RESPONSE | FORMERR, 0, 0, 0, 0)


def parse_answer(untrusted: bytes, number: int, name: str, kind: int) -> Answer:
    """The addresses of `name` in a resolver's answer, through its aliases; raises BadMessage if it is none."""
    if len(untrusted) < 12:
        raise BadMessage("short")
    got, flags, questions, answers, _, _ = struct.unpack_from("!6H", untrusted)
    if got != number or not flags & _RESPONSE or questions != 1:
        raise BadMessage("not the answer")
    asked, at = _name(untrusted, 12)
    if asked != name or struct.unpack_from("!2H", untrusted + b"\0" * 4, at) != (kind, IN):
        raise BadMessage("not the question")
    at += 4
    aliases: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for _ in range(min(answers, _ANSWERS)):
        owner, at = _name(untrusted, at)
        if at + 10 > len(untrusted):
            raise BadMessage("short")
        record, klass, _, length = struct.unpack_from("!2HIH", untrusted, at)
        at += 10
        if at + length > len(untrusted):
            raise BadMessage("short")
        if klass == IN and record == CNAME:
            aliases[owner] = _name(untrusted, at)[0]
        elif klass == IN and record == kind and length == (4 if kind == A else 16):
            found.setdefault(owner, []).append(str(ipaddress.ip_address(untrusted[at : at + length])))
        at += length
    for _ in range(len(aliases)):
        if name in found or name not in aliases:
            break
        name = aliases[name]
    return Answer(flags & 0xF, bool(flags & _TRUNCATED), tuple(found.get(name, ())))


def _name(message: bytes, at: int, pointers: bool = True) -> tuple[str, int]:
    """A name and where it ends. A pointer has to lead to before everything read so far."""
    labels: list[str] = []
    end, lowest, size = -1, at, 0
    while True:
        if at >= len(message):
            raise BadMessage("short")
        length = message[at]
        if length >= 0xC0:
            if not pointers or at + 1 >= len(message):
                raise BadMessage("pointer")
            target = (length & 0x3F) << 8 | message[at + 1]
            end = at + 2 if end < 0 else end
            if target >= lowest:
                raise BadMessage("pointer")
            at = lowest = target
            continue
        if length > 63:
            raise BadMessage("label")
        at += 1
        if length == 0:
            break
        size += length + 1
        if at + length > len(message) or size > 254:
            raise BadMessage("long")
        # latin-1 keeps every byte apart; what is no host's name is refused by the one parser of them.
        label = message[at : at + length].decode("latin-1")
        if "." in label:
            raise BadMessage("dot")
        labels.append(label.lower())
        at += length
    return ".".join(labels), at if end < 0 else end
