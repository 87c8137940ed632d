"""Secrets are put in where they belong and nowhere else; what a request with one becomes; secrets on the host."""

from __future__ import annotations

import base64
import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress.content import Content
from vmsandbox.egress.values import BrokerConfig, Destination, Dlp, EgressKind, EgressPolicy, SecretUse
from vmsandbox.errors import UserInputError
from vmsandbox.policy.values import SecretSource
from vmsandbox.process import Programs
from vmsandbox.session.network.secrets import read_secrets

API = Destination("api.example.org", 443)
GIT = Destination("git.example.org", 443)
KEY = SecretUse("API_KEY", "vmsb-placeholder-b1946ac92492d234", ("api.example.org",), "x-api-key", "", ("POST",))
TOKEN = SecretUse(
    "GIT_TOKEN", "ghp_placeholder0vmsb0e2fc714c4727ee9395", ("*.example.org",), "authorization", "Bearer "
)
VALUES = {"API_KEY": "sk-real-0123456789-value", "GIT_TOKEN": "real/token+98:76"}


def content(canaries: tuple[str, ...] = (), **changes: object) -> Content:
    policy = EgressPolicy(secrets=(KEY, TOKEN), dlp=Dlp(freeze=True))
    return Content(BrokerConfig("s", policy, {**VALUES, **changes}, canaries, "", ""), clock=lambda: 1.5)  # type: ignore[dict-item]


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


@pytest.mark.parametrize(
    ("to", "name", "sent", "becomes"),
    [
        (API, "X-Api-Key", KEY.placeholder, VALUES["API_KEY"]),
        (API, "x-api-key", f" {KEY.placeholder} ", VALUES["API_KEY"]),
        (GIT, "Authorization", f"Bearer {TOKEN.placeholder}", "Bearer " + VALUES["GIT_TOKEN"]),
        (GIT, "authorization", f"bearer {TOKEN.placeholder}", "Bearer " + VALUES["GIT_TOKEN"]),
        (GIT, "Authorization", basic(f"x-token:{TOKEN.placeholder}"), basic("x-token:" + VALUES["GIT_TOKEN"])),
        (GIT, "Authorization", basic(f"{TOKEN.placeholder}:"), basic(VALUES["GIT_TOKEN"] + ":")),
        (GIT, "Authorization", "Basic  " + basic(f"u:{TOKEN.placeholder}")[6:], basic("u:" + VALUES["GIT_TOKEN"])),
    ],
)  # fmt: skip
def test_a_secret_is_put_in_where_it_belongs(to: Destination, name: str, sent: str, becomes: str) -> None:
    found = content().outgoing(to, "POST", "/v1", [("Host", to.host), (name, sent), ("Accept", "*/*")], b"{}")
    assert found.decision.allowed and not found.events and not found.freeze
    assert found.headers == [("Host", to.host), (name, becomes), ("Accept", "*/*")]


BEARER = ("authorization", f"Bearer {TOKEN.placeholder}")
WRONG = {
    "another host": (Destination("api.example.com", 443), "POST", "/", [("x-api-key", KEY.placeholder)], b""),
    "a subdomain": (Destination("a.api.example.org", 443), "POST", "/", [("x-api-key", KEY.placeholder)], b""),
    "the name that * is below": (Destination("example.org", 443), "GET", "/", [BEARER], b""),
    "another header": (API, "POST", "/", [("x-api-key2", KEY.placeholder)], b""),
    "another method": (API, "GET", "/", [("x-api-key", KEY.placeholder)], b""),
    "something before it": (API, "POST", "/", [("x-api-key", f"a{KEY.placeholder}")], b""),
    "something behind it": (API, "POST", "/", [("x-api-key", f"{KEY.placeholder}, b")], b""),
    "without its prefix": (GIT, "GET", "/", [("authorization", TOKEN.placeholder)], b""),
    "another scheme": (GIT, "GET", "/", [("authorization", f"Digest {TOKEN.placeholder}")], b""),
    "part of a password": (GIT, "GET", "/", [("authorization", basic(f"u:x{TOKEN.placeholder}"))], b""),
    "once right, once wrong": (API, "POST", "/", [("x-api-key", KEY.placeholder), ("x-b", KEY.placeholder)], b""),
    "in the path": (API, "POST", f"/a/{KEY.placeholder}", [], b""),
    "in the query": (API, "POST", f"/a?k={KEY.placeholder}", [("x-api-key", KEY.placeholder)], b""),
    "in the query, encoded": (API, "POST", "/a?k=" + KEY.placeholder.replace("-", "%2D"), [], b""),
    "in the body": (GIT, "POST", "/", [], b'{"k": "' + KEY.placeholder.encode() + b'"}'),
    "in the body, packed": (GIT, "POST", "/", [("content-encoding", "gzip")], gzip.compress(KEY.placeholder.encode())),
    "in the body, base64": (GIT, "POST", "/", [], base64.b64encode(b"k:" + KEY.placeholder.encode())),
    "in the body, beside its own": (GIT, "POST", "/", [], f"{TOKEN.placeholder} {KEY.placeholder}".encode()),
    "in a cookie": (API, "POST", "/", [("cookie", f"a={KEY.placeholder}")], b""),
    "in a host name": (Destination(f"{KEY.placeholder}.example.org", 443), "GET", "/", [], b""),
}  # fmt: skip


@pytest.mark.parametrize("where", WRONG)
def test_a_placeholder_anywhere_else_is_refused_with_an_alert(where: str) -> None:
    to, method, path, headers, body = WRONG[where]
    found = content().outgoing(to, method, path, headers, body)
    assert not found.decision.allowed and found.decision.rule == "secret-outside"
    [event] = found.events
    assert event.kind is EgressKind.ALERT and event.time == 1.5 and event.host == to.host
    assert "placeholder of" in event.more["what"]
    assert not found.freeze  # a mistake is more likely than a leak
    assert not any(value in str(found) for value in VALUES.values())


def test_a_body_may_tell_a_host_of_its_own_secrets_placeholder() -> None:
    """An agent that printed its environment sends it to its model from then on."""
    body = b"env: " + KEY.placeholder.encode()
    found = content().outgoing(API, "POST", "/", [("x-api-key", KEY.placeholder)], body)
    assert found.decision.allowed and dict(found.headers)["x-api-key"] == VALUES["API_KEY"]
    zipped = content().outgoing(API, "POST", "/", [("content-encoding", "gzip")], gzip.compress(body))
    assert zipped.decision.allowed and not zipped.events


@pytest.mark.parametrize(
    ("to", "tls"),
    [(Destination("api.example.org", 80), None), (Destination("api.example.org", 8443), None), (API, False)],
)
def test_a_secret_is_never_sent_without_tls(to: Destination, tls: bool | None) -> None:
    found = content().outgoing(to, "POST", "/", [("x-api-key", KEY.placeholder)], b"", tls=tls)
    assert found.decision.rule == "secret-outside" and "never sent without TLS" in found.decision.reason
    assert VALUES["API_KEY"] not in str(found)


def test_a_secret_is_sent_to_another_port_over_tls() -> None:
    to = Destination("api.example.org", 8443)
    found = content().outgoing(to, "POST", "/", [("x-api-key", KEY.placeholder)], b"", tls=True)
    assert found.headers == [("x-api-key", VALUES["API_KEY"])]


def test_a_secret_without_a_value_is_refused_and_says_why() -> None:
    found = content(API_KEY="").outgoing(API, "POST", "/", [("x-api-key", KEY.placeholder)], b"")
    assert "no value on the host" in found.decision.reason and not found.decision.allowed


def test_what_stands_beside_a_placeholder_is_looked_at() -> None:
    for pair in (f"{VALUES['API_KEY']}:{TOKEN.placeholder}", f"{TOKEN.placeholder}:{VALUES['API_KEY']}"):
        found = content().outgoing(GIT, "GET", "/", [("authorization", basic(pair))], b"")
        assert found.decision.rule == "dlp" and found.freeze


def test_a_placeholder_does_not_hide_a_canary() -> None:
    body = KEY.placeholder.encode() + b" " + gzip.compress(b"a canary-4711-0815")
    found = content(canaries=("canary-4711-0815",)).outgoing(API, "POST", "/", [], body)
    assert found.decision.rule == "dlp" and found.freeze


def test_a_query_is_in_no_record() -> None:
    found = content().outgoing(GIT, "POST", "/a?signature=1", [], KEY.placeholder.encode())
    assert found.events[0].path == "/a"


@settings(max_examples=200, deadline=None)
@given(
    value=st.text("".join(map(chr, range(0x21, 0x7F))), min_size=8, max_size=60).map("^~{}".format),
    header=st.sampled_from(["x-api-key", "authorization", "cookie", "x-other"]),
    shape=st.sampled_from(["{}", "Bearer {}", "Basic {}", "a={}"]),
    host=st.sampled_from(["api.example.org", "git.example.org", "example.com"]),
    method=st.sampled_from(["GET", "POST"]),
    port=st.sampled_from([80, 443]),
)
def test_a_value_leaves_only_in_its_header_to_its_host(
    value: str, header: str, shape: str, host: str, method: str, port: int
) -> None:
    checked = content(API_KEY=value)
    found = checked.outgoing(Destination(host, port), method, "/", [(header, shape.format(KEY.placeholder))], b"")
    right = (host, port, header, shape, method) == ("api.example.org", 443, "x-api-key", "{}", "POST")
    assert found.decision.allowed is right
    assert (found.headers == [(header, value)]) is right
    assert value not in str(found.events) + str(found.decision)


def test_header_bytes_that_are_no_text_pass_unchanged() -> None:
    headers = [("x-a", b"\xff\xfe".decode("utf-8", "surrogateescape")), ("x-b", "é")]
    assert content().outgoing(API, "GET", "/\udcff", headers, b"\xff").headers == headers


# --- secrets on the host -----------------------------------------------------------------------------------------


def read(source: SecretSource, environ: dict[str, str], project: Path) -> str:
    return read_secrets([source], Programs(), environ, project)[source.name]


def test_secrets_come_from_the_environment_a_file_and_a_command(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    (tmp_path / "key").chmod(0o600)
    assert read(SecretSource("A", env="X"), {"X": "from-the-environment"}, tmp_path) == "from-the-environment"
    assert read(SecretSource("A", file="key"), {}, tmp_path) == "from-a-file"
    assert read(SecretSource("A", file=str(tmp_path / "key")), {}, Path("/")) == "from-a-file"
    assert (
        read(SecretSource("A", command=("printf", "%s\\r\\n", "$(id) from;a command")), {}, tmp_path)
        == "$(id) from;a command"
    )


@pytest.mark.parametrize(
    "value",
    ["", "\n", "shrt77", "two\nlines here", "a tab\there", "bell\x07bell", "ünïcode-key", " outside ", "x" * 20_000],
)
def test_values_that_cannot_stand_in_a_header_are_refused_and_never_quoted(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="the secret A cannot be used") as caught:
        read(SecretSource("A", env="X"), {"X": value}, tmp_path)
    said = caught.value.as_json()
    assert len(value.strip()) < 5 or not any(value.strip() in text for text in said.values())
    assert all(len(text) < 500 for text in said.values())


def test_a_missing_secret_says_which(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="the environment has no X"):
        read(SecretSource("A", env="X"), {}, tmp_path)
    with pytest.raises(UserInputError, match="cannot be read"):
        read(SecretSource("A", file="none"), {}, tmp_path)
    with pytest.raises(UserInputError, match="not installed"):
        read(SecretSource("A", command=("no-such-program-here",)), {}, tmp_path)


@pytest.mark.parametrize(
    ("mode", "fine"), [(0o600, True), (0o644, True), (0o620, False), (0o602, False), (0o666, False)]
)
def test_a_file_that_others_can_write_is_refused(mode: int, fine: bool, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the-value-of-it")
    (tmp_path / "key").chmod(mode)
    if fine:
        assert read(SecretSource("A", file="key"), {}, tmp_path) == "the-value-of-it"
        return
    with pytest.raises(UserInputError, match="others can write") as caught:
        read(SecretSource("A", file="key"), {}, tmp_path)
    assert "the-value-of-it" not in str(caught.value.as_json())


def test_a_file_of_another_user_a_folder_and_a_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(UserInputError, match="is no file"):
            read(SecretSource("A", file=name), {}, tmp_path)
    (tmp_path / "key").write_text("the-value-of-it")
    if os.geteuid() == 0:
        os.chown(tmp_path / "key", 12345, 12345)
        with pytest.raises(UserInputError, match="belongs to another user"):
            read(SecretSource("A", file="key"), {}, tmp_path)


def test_a_failing_command_is_not_quoted(tmp_path: Path) -> None:
    script = "echo the-secret-value; echo the-secret-value >&2; exit 3"
    with pytest.raises(UserInputError, match="ended with status 3") as caught:
        read(SecretSource("A", command=("sh", "-c", script)), {}, tmp_path)
    assert "the-secret-value" not in str(caught.value.as_json())
