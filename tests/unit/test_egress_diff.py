"""What a policy allows that another does not: empty if and only if no request tells them apart."""

from __future__ import annotations

import dataclasses

import pytest
from egress_policies import GLOBS, asked, networks, rules_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress import globsets
from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.diff import PolicyDiff, diff_networks, diff_policies
from vmsandbox.egress.globsets import wider
from vmsandbox.egress.paths import BadPathError, glob_matches, readings
from vmsandbox.policy.values import NetworkPolicy, NetworkRule, SecretSource


@settings(max_examples=60, deadline=None)
@given(networks, networks)
def test_empty_if_and_only_if_no_request_is_new(before: NetworkPolicy, after: NetworkPolicy) -> None:
    found = diff_policies(compile_policy(before), compile_policy(after))
    old, new = rules_of(before), rules_of(after)
    told = {(one.host, port) for one in found.wider for port in one.ports}
    for where, method, path in asked():
        if new.request(where, method, path).allowed and not old.request(where, method, path).allowed:
            assert told, (where, method, path)
    for one in found.wider:  # and each that is told can be seen
        if one.exact:
            where, method, path = one.example
            assert new.request(where, method, path).allowed and not old.request(where, method, path).allowed, one
            assert where.port in one.ports


@settings(max_examples=60, deadline=None)
@given(networks)
def test_nothing_is_wider_than_itself_and_everything_is_wider_than_nothing(network: NetworkPolicy) -> None:
    policy = compile_policy(network)
    assert not diff_policies(policy, policy)
    everything = compile_policy(
        dataclasses.replace(network, denied_hosts=(), rules=(), allowed_hosts=tuple(f"*:{p}" for p in (80, 443, 8443)))
    )
    assert not diff_policies(everything, policy).wider
    rules = rules_of(network)
    anything = any(rules.request(*one).allowed for one in asked())
    assert not anything or diff_policies(compile_policy(NetworkPolicy()), policy).wider


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("/x.*", max_size=5).map(lambda one: "/" + one), max_size=3),
       st.lists(st.text("/x.*", max_size=5).map(lambda one: "/" + one), max_size=3),
       st.text("/x.y", max_size=7).map(lambda one: "/" + one))  # fmt: skip
def test_sets_of_globs(after: list[str], before: list[str], path: str) -> None:
    found = wider(after, before)
    if found is not None:
        assert found.exact and any(glob_matches(one, found.reading) for one in after)
        assert not any(glob_matches(one, found.reading) for one in before)
        assert readings(found.reading) == (found.reading,)
        return
    try:
        readings(path)
    except BadPathError:
        return
    if any(glob_matches(one, path) for one in after):
        assert any(glob_matches(one, path) for one in before)


@settings(deadline=None)
@given(st.lists(st.sampled_from(GLOBS), max_size=4), st.lists(st.sampled_from(GLOBS), max_size=4))
def test_an_encoded_slash_never_hides_a_difference(after: list[str], before: list[str]) -> None:
    assert wider(["/x/y", "/x%2Fy"], ["/x/y"]) is not None
    for path in ("/x/y", "/x%2Fy", "/x", "/z/y", "/x/z%2Fy"):
        found = readings(path)
        new, old = ([any(glob_matches(g, one) for g in globs) for one in found] for globs in (after, before))
        if all(new) and not all(old):
            assert wider(after, before) is not None


def test_a_glob_that_no_path_matches_allows_nothing() -> None:
    for glob in ("/.;*", "/..;x", "/x/.;*"):
        assert wider([glob], []) is None
    assert wider(["/x;*"], []) is not None


def test_too_many_states_are_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wider(["/x/*/y"], ["/x*"]) is None
    monkeypatch.setattr(globsets, "_MOST_STATES", 2)
    found = wider(["/x/*/y"], ["/x*"])
    assert found is not None and not found.exact


def network(*hosts: str, deny: tuple[str, ...] = (), rules: tuple[NetworkRule, ...] = ()) -> NetworkPolicy:
    return NetworkPolicy(mode="restricted", allowed_hosts=hosts, denied_hosts=deny, rules=rules)


def diff(before: NetworkPolicy, after: NetworkPolicy) -> PolicyDiff:
    return diff_networks(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (network("*.a.org"), network("b.a.org", "*.c.a.org")),
        (network("*"), network("a.org", "*.b.org", "192.0.2.1")),
        (network("a.org"), network("a.org:443", "a.org:80")),
        (network("github.com", *["raw.githubusercontent.com", "codeload.github.com"]),
         network(rules=(NetworkRule("github.com", (443,), ("GET",), ("/x",)),))),
        (network("a.org"), network("a.org", deny=("*",))),
        (network(rules=(NetworkRule("a.org", paths=("/v1/*",)),)), network(rules=(NetworkRule("a.org",
        paths=("/v1/x", "/v1/*/y")),))),
        (network("a.org", "b.org"), network("b.org", "a.org")),
        (network("*.a.org", deny=("x.a.org",)), network("*.a.org", deny=("x.a.org", "*.y.a.org"))),
        (network("@pypi"), network(rules=(NetworkRule("@pypi", methods=("GET",)),))),
    ],
)  # fmt: skip
def test_what_is_no_wider(before: NetworkPolicy, after: NetworkPolicy) -> None:
    assert not diff(before, after)


@pytest.mark.parametrize(
    ("before", "after", "host", "ports", "methods", "paths"),
    [
        (network("b.a.org"), network("*.a.org"), "*.a.org", (80, 443), ("*",), ()),
        (network("a.org"), network("a.org", "a.org:8443"), "a.org", (8443,), ("*",), ()),
        (network("*", deny=("evil.org",)), network("*"), "evil.org", (80, 443), ("*",), ()),
        (network("*.a.org", deny=("*.b.a.org",)), network("*.a.org"), "*.b.a.org", (80, 443), ("*",), ()),
        (network(rules=(NetworkRule("a.org", (443,), ("GET",)),)), network(rules=(NetworkRule("a.org",
        (443,), ("GET", "PUT")),)),
         "a.org", (443,), ("PUT",), ()),
        (network(rules=(NetworkRule("a.org", (443,), ("GET",), ("/v1/*",)),)),
         network(rules=(NetworkRule("a.org", (443,), ("GET",), ("/v1/*", "/v1/x", "/v2/*")),)), "a.org",
         (443,), ("GET",), ("/v2/*",)),
        (network(rules=(NetworkRule("a.org", (443,), (), ("/*",)),)), network("a.org:443"), "a.org",
        (443,), ("*",), ()),
        # A narrowed name below an allowed suffix: to take it away is to widen.
        (network("*.a.org", rules=(NetworkRule("b.a.org", (443,), ("GET",)),)), network("*.a.org"), "b.a.org",
        (80, 443), ("*",), ()),
    ],
)  # fmt: skip
def test_what_is_wider(
    before: NetworkPolicy,
    after: NetworkPolicy,
    host: str,
    ports: tuple[int, ...],
    methods: tuple[str, ...],
    paths: tuple[str, ...],
) -> None:
    found = diff(before, after).wider
    assert any((one.host, one.ports, one.methods, one.paths) == (host, ports, methods, paths) for one in found), found
    assert {one.host for one in found} == {host}


def test_a_suffix_that_leaves_room_for_one_letter_is_compared_too() -> None:
    suffix = "*.a." + ".".join(["a" * 49] * 5)
    assert len(suffix) == 253
    assert [one.host for one in diff(network("*", deny=(suffix,)), network("*")).wider] == [suffix]


def test_what_else_is_looser() -> None:
    key = SecretSource("KEY", env="KEY", hosts=("api.org",), methods=("POST",))
    base = NetworkPolicy(mode="restricted",
    allowed_hosts=("a.org",), secrets=(key,), packages_allow=("six",), packages_deny=("evil*",),
                         packages_minimum_age_days=7, dlp_freeze=True, limits=(("connections",
                         10), ("bytes_per_second", 1000)))  # fmt: skip
    assert not diff(base, base)

    def change(**what: object) -> str:
        return "\n".join(diff(base, dataclasses.replace(base, **what)).looser)  # type: ignore[arg-type]

    def secret(**what: object) -> str:
        return change(secrets=(dataclasses.replace(key, **what),))  # type: ignore[arg-type]

    assert "sent to other.org" in secret(hosts=("api.org", "other.org"))
    assert "any method" in secret(methods=()) and "x-key" in secret(header="x-key")
    assert "the program" in secret(env=None, command=("cat", "/etc/shadow"))
    assert "runs a program" in change(secrets=(key, SecretSource("B", command=("x",), hosts=("b.org",))))
    assert "any package" in change(packages_allow=None) and "requests" in change(packages_allow=("six", "requests"))
    assert "evil" in change(packages_deny=()) and "3 days" in change(packages_minimum_age_days=3)
    assert "secrets are no longer" in change(dlp_secrets=False) and "freezes" in change(dlp_freeze=False)
    assert "connections is 20" in change(limits=(("connections", 20), ("bytes_per_second", 1000)))
    assert "bytes_per_second is gone" in change(limits=(("connections", 10),))
    assert not change(limits=(("connections", 5), ("bytes_per_second", 10)))
    assert "network card" in change(mode="filtered") and "resolved by 192.0.2.1" in change(resolver=("192.0.2.1",))
    assert "at all" in "\n".join(diff(dataclasses.replace(base, mode="none"), base).looser)
    assert not change(mode="none", secrets=(), packages_deny=("evil*", "more"), packages_minimum_age_days=30)
    private = NetworkRule("a.org", (443,), addresses=("10.0.0.1",))
    assert "dialled at 10.0.0.1" in change(rules=(private,))
    assert "wherever DNS says" in "\n".join(diff(dataclasses.replace(base, rules=(private,)), base).looser)
    assert "no longer looked into" in change(rules=(NetworkRule("a.org", tls="passthrough"),))
