"""What must not leave a guest is found in whatever encoding and part of a request."""

from __future__ import annotations

import base64
import gzip
import json
import re
import string
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from leaking import ENCODINGS, HEADS, TO, content_for, post

from vmsandbox.egress.canaries import decoy_files, new_canaries
from vmsandbox.egress.content import Content, Outgoing
from vmsandbox.egress.needles import Needles
from vmsandbox.egress.values import Destination, Dlp, EgressKind

VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F))
# On purpose without what would be the start of an escape: `\` before `u0041` is no escape any more.
AROUND = st.binary(max_size=60).map(lambda raw: raw.translate(None, b"\\%" + string.hexdigits.encode() + b"x"))


@pytest.mark.parametrize("name", ENCODINGS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=st.text(VISIBLE, min_size=10, max_size=70), before=AROUND, after=AROUND)
@example(value='a%41\\n"b\\\\c/d', before=b"", after=b"")
@example(value="aaaaaaaaaa", before=b"\n", after=b" ")
def test_a_secret_is_found_in_any_encoding_and_surroundings(name: str, value: str, before: bytes, after: bytes) -> None:
    # A line end on both sides of what is a text of its own: letters of base64 right beside would be part of it.
    body = before + b"\n" + ENCODINGS[name](value.encode()) + b"\n" + after
    found = post(content_for(value), body)
    assert found.decision.rule == "dlp" and not found.decision.allowed
    assert [event.kind for event in found.events] == [EgressKind.ALERT]
    assert value not in str(found)


@settings(max_examples=200, deadline=None)
@given(value=st.text(VISIBLE, min_size=8, max_size=70), before=st.binary(max_size=60), after=st.binary(max_size=60))
def test_a_secret_is_found_as_itself_and_in_base64_beside_anything(value: str, before: bytes, after: bytes) -> None:
    content = content_for(value)
    for encode in (bytes, base64.b64encode, base64.urlsafe_b64encode):
        assert not post(content, encode(before + value.encode() + after)).decision.allowed


@pytest.mark.parametrize("encoding", HEADS)
@settings(max_examples=30, deadline=None)
@given(value=st.text(VISIBLE, min_size=8, max_size=70), before=st.binary(max_size=500))
def test_a_secret_is_found_below_a_content_encoding(encoding: str, value: str, before: bytes) -> None:
    body = HEADS[encoding](before + b" " + value.encode() + b" tail")
    assert post(content_for(value), body, encoding).decision.rule == "dlp"


@pytest.mark.parametrize("encoding", HEADS)
def test_what_is_harmless_below_a_content_encoding_is_let_through(encoding: str) -> None:
    assert post(content_for(), HEADS[encoding](b"nothing of interest"), encoding).decision.allowed


@pytest.mark.parametrize("encoding", ["compress", "exi", "gzip, aes128gcm"])
def test_an_encoding_that_cannot_be_looked_into_is_refused(encoding: str) -> None:
    found = post(content_for(dlp=Dlp(freeze=True)), b"whatever", encoding)
    assert found.decision.rule == "dlp" and "cannot be looked through" in found.decision.reason
    assert not found.freeze


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_what_is_not_of_its_encoding_is_refused(encoding: str) -> None:
    assert not post(content_for(), b"\xff\xfe plain text", encoding).decision.allowed


@pytest.mark.parametrize(
    ("where", "send"),
    [
        ("path", lambda c, v: c.outgoing(TO, "GET", f"/a/{v}/b", [], b"")),
        ("path", lambda c, v: c.outgoing(TO, "GET", f"/a?q={v}", [], b"")),
        ("header X-Note", lambda c, v: c.outgoing(TO, "GET", "/", [("X-Note", f"see {v}")], b"")),
        ("header names", lambda c, v: c.outgoing(TO, "GET", "/", [(v, "x")], b"")),
        ("host", lambda c, v: c.outgoing(Destination(f"{v}.example.org".lower(), 443), "GET", "/", [], b"")),
        ("body", lambda c, v: c.outgoing(TO, "PUT", "/", [], v.encode())),
        ("path and headers", lambda c, v: c.outgoing(TO, v[:8], "/" + v[8:], [], b"")),
    ],
)  # fmt: skip
def test_every_part_of_a_request_is_looked_at_and_named(where: str, send: Callable[[Content, str], Outgoing]) -> None:
    value = "Qw8rTy2uIo5pAs6dFg1h"
    found = send(content_for(value), value)
    assert found.decision.rule == "dlp"
    assert found.events[0].more == {"what": "the value of the secret KEY", "where": where}
    assert value not in repr(found.events) + repr(found.decision)


def test_a_canary_is_found_whole_and_in_part_and_may_freeze() -> None:
    canaries = new_canaries(6)
    content = content_for(canaries=canaries, dlp=Dlp(freeze=True))
    for canary in canaries:
        for cut in (len(canary) // 2, len(canary) // 3, len(canary) - 4):
            longest = max(canary[:cut], canary[cut:], key=len)
            for body in (
                canary,
                longest,
                " ".join(canary),
                longest.encode().hex(),
                base64.b64encode(b"a" + longest.encode()).decode(),
            ):
                found = post(content, json.dumps({"text": f"see {body}"}).encode())
                assert found.freeze and found.events[0].more["what"].startswith("canary")
                assert canary not in found.decision.reason


def test_canaries_are_not_looked_for_where_the_policy_says_so() -> None:
    canary = new_canaries(2)[1]
    assert post(content_for(canaries=(canary,), dlp=Dlp(canaries=False)), canary.encode()).decision.allowed


def test_too_many_encodings_of_one_body_are_refused() -> None:
    body = b"harmless"
    for _ in range(5):
        body = gzip.compress(body)
    assert post(content_for(), gzip.decompress(body), "gzip, gzip, gzip, gzip").decision.allowed
    assert "too many Content-Encodings" in post(content_for(), body, "gzip, gzip, gzip, gzip, gzip").decision.reason


@pytest.mark.parametrize("before", range(3))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_value_is_found_in_the_middle_of_base64(before: int, encode: Callable[[bytes], bytes]) -> None:
    value = "~~~???>>>ooo"  # has letters 62 and 63 at each alignment
    text = encode(b"x" * before + value.encode() + b"yy")
    data = encode(b"1" * 300)[1:] + text[before:] + encode(b"2" * 300)
    assert Needles({"a": value}).find(data, b"") == "a"


def test_canaries_look_real_are_random_and_mislead_no_tool() -> None:
    canaries = new_canaries(6)
    assert len(set(canaries)) == 6 and new_canaries(6) != canaries and new_canaries(0) == ()
    looks = re.compile(r"AKIA[A-Z2-7]{16}|[A-Za-z0-9+/]{40}|ghp_[A-Za-z0-9]{36}")
    assert all(looks.fullmatch(one) for one in canaries)
    files = decoy_files(canaries)
    text = b"".join(files.values()).decode()
    assert all(one in text for one in canaries) and "[default]" not in text
    assert not {".netrc", ".npmrc", ".git-credentials", ".config/gh/hosts.yml", ".aws/config"} & files.keys()
    assert all(not path.startswith("/") and ".." not in path for path in files)
    assert decoy_files(()) == {}
