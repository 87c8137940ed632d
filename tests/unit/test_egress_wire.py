"""Configuration and events as JSON: what is written is read, and nothing else is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress.values import (
    BrokerConfig,
    Dlp,
    EgressEvent,
    EgressKind,
    EgressPolicy,
    HostRule,
    PackageRules,
    SecretUse,
    Tls,
)
from vmsandbox.egress.wire import (
    MAX_EVENT,
    MAX_MORE,
    MAX_PATH,
    MAX_TEXT,
    WireError,
    config_from_json,
    config_to_json,
    event_to_json,
    parse_untrusted_event,
    policy_to_json,
)

texts = st.text(max_size=20)
names = st.lists(texts, max_size=3).map(tuple)
host_rules = st.builds(
    HostRule,
    texts,
    st.lists(st.integers(1, 65535), max_size=3).map(tuple),
    names,
    names,
    names,
    st.sampled_from(Tls),
    texts,
)
policies = st.builds(
    EgressPolicy,
    st.lists(host_rules, max_size=2).map(tuple),
    st.lists(host_rules, max_size=2).map(tuple),
    st.lists(st.builds(SecretUse, texts, texts, names, texts, texts, names), max_size=2).map(tuple),
    st.builds(PackageRules, st.none() | names, names, st.floats(0, 1e6)),
    st.builds(Dlp, st.booleans(), st.booleans(), st.booleans()),
    resolver=names,
    learn=st.booleans(),
)
configs = st.builds(
    BrokerConfig, texts, policies, st.dictionaries(texts, texts, max_size=3), names, texts, texts, names
)
events = st.builds(
    EgressEvent,
    st.sampled_from(EgressKind),
    st.floats(0, 1e10),
    *[texts, texts, st.integers(0, 65535), texts, texts, st.integers(0, 999), texts, texts, texts, texts],
    sent=st.integers(0, 1 << 50),
    received=st.integers(0, 1 << 50),
    seconds=st.floats(0, 1e6),
    more=st.dictionaries(texts, texts, max_size=5),
)
EVENT = EgressEvent(EgressKind.REFUSED, 1.5, "proxy", "a.org", 443, "GET", "/")


@settings(deadline=None)
@given(configs)
def test_a_configuration_comes_back_as_it_was(config: BrokerConfig) -> None:
    line = config_to_json(config)
    assert line.isascii() and line.count(b"\n") == 1 and config_from_json(line) == config
    assert json.dumps(policy_to_json(config.policy))


@settings(deadline=None)
@given(events)
def test_an_event_comes_back_as_it_was(event: EgressEvent) -> None:
    line = event_to_json(event)
    assert line.isascii() and line.count(b"\n") == 1 and line.endswith(b"\n") and parse_untrusted_event(line) == event


@settings(deadline=None)
@given(events, st.text(st.characters(), max_size=4), st.integers(0, 20_000), st.integers(0, 100))
def test_whatever_is_in_an_event_it_is_read_again_within_limits(
    event: EgressEvent, text: str, times: int, many: int
) -> None:
    long = text * times
    grown = dataclasses.replace(
        event,
        host=long,
        path=long,
        reason=long,
        remedy=long,
        time=float("nan"),
        seconds=float("inf"),
        more={f"{number}{long}": long for number in range(many)},
    )
    line = event_to_json(grown)
    assert len(line) <= MAX_EVENT
    found = parse_untrusted_event(line)
    assert len(found.host) <= MAX_TEXT and len(found.path) <= MAX_PATH and len(found.more) <= MAX_MORE
    json.dumps(dataclasses.asdict(found), ensure_ascii=False).encode("utf-8")  # no half characters


def line(**change: Any) -> bytes:
    plain = {**dataclasses.asdict(EVENT), **change}
    return json.dumps({key: value for key, value in plain.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "untrusted",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"{}",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"kind": "refused", "time": 1, "time": 2}',
        b"[" * 60_000,
        line() + b" " * MAX_EVENT,
        line(kind=...),
        line(kind="other"),
        line(kind=1),
        line(kind=None),
        line(kind=["refused"]),
        line(time=...),
        line(time="1"),
        line(time=True),
        line(time=-1),
        line(time=float("nan")),
        line(time=float("inf")),
        line(time=1e300),
        line(time=None),
        line(port=65536),
        line(port=-1),
        line(port=1.0),
        line(port="80"),
        line(port=True),
        line(port=10**400),
        line(status=-1),
        line(sent=-1),
        line(sent=1 << 63),
        line(received=1.5),
        line(seconds=-0.1),
        line(host=None),
        line(host=1),
        line(host=["a"]),
        line(host="a" * (MAX_TEXT + 1)),
        line(path="a" * (MAX_PATH + 1)),
        line(rule="a" * (MAX_TEXT + 1)),
        line(host="\ud800"),
        line(more=None),
        line(more=[]),
        line(more={"a": 1}),
        line(more={"a": {"b": "c"}}),
        line(more={"a" * 3000: ""}),
        line(more={"a": "b" * 3000}),
        line(more={str(number): "" for number in range(MAX_MORE + 1)}),
        line(more={"\udc00": ""}),
        line(unknown=1),
        line(__class__="x"),
        line(path="a" * 8000, reason="b" * 70_000),
        line() + b"x",
        line() + line(),
    ],
)
def test_what_is_no_event(untrusted: bytes) -> None:
    with pytest.raises(WireError) as caught:
        parse_untrusted_event(untrusted)
    assert caught.value.brief.isprintable() and len(caught.value.brief) < 200


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["kind", "time", "host", "more"]), inner, max_size=4)
        ),
    ).map(lambda one: json.dumps(one).encode())
)
def test_nothing_else_is_raised(untrusted: bytes) -> None:
    with contextlib.suppress(WireError):
        parse_untrusted_event(untrusted)


def test_a_wrong_configuration_is_refused_without_its_values() -> None:
    config = BrokerConfig("s", EgressPolicy(), {"KEY": "the-secret"}, (), "pem", "the-key")
    good = json.loads(config_to_json(config))
    for change in (
        {"secrets": {"KEY": 1}},
        {"ca_key": None},
        {"extra": "the-secret"},
        {"policy": {"allow": [{"pattern": 1}]}},
        {"policy": {"alow": []}},
        {"policy": {"learn": "yes"}},
        {"canaries": "abc"},
        {"policy": {"limits": {"connections": 1.5}}},
    ):
        with pytest.raises(WireError) as caught:
            config_from_json(json.dumps({**good, **change}))
        assert "the-" not in caught.value.brief + caught.value.details
    with pytest.raises(WireError):
        config_from_json(json.dumps({key: value for key, value in good.items() if key != "ca_key"}))
