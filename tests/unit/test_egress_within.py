"""A network policy within wider ones: each of them has to allow, whatever is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from egress_policies import HOSTS, METHODS, PORTS, asked, networks, rules_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.diff import diff_networks, diff_policies
from vmsandbox.egress.lint import lint
from vmsandbox.egress.paths import BadPathError, glob_matches, readings
from vmsandbox.egress.values import BrokerConfig, Destination
from vmsandbox.egress.wire import config_from_json, config_to_json
from vmsandbox.policy.values import NetworkPolicy, NetworkRule


def within(inner: NetworkPolicy, *outer: NetworkPolicy) -> NetworkPolicy:
    return replace(inner, within=outer)


@settings(max_examples=60, deadline=None)
@given(networks, networks, networks, st.booleans())
def test_a_request_is_allowed_if_and_only_if_each_policy_allows_it(
    inner: NetworkPolicy, middle: NetworkPolicy, outer: NetworkPolicy, learn: bool
) -> None:
    rules = rules_of(within(inner, middle, outer), learn)
    alone = [rules_of(inner, learn), rules_of(middle), rules_of(outer)]
    for where, method, path in asked():
        assert rules.host(where).allowed == all(one.host(where).allowed for one in alone)
        decision = rules.request(where, method, path)
        assert decision.allowed == all(one.request(where, method, path).allowed for one in alone)
        if not decision.allowed and alone[0].request(where, method, path).allowed:
            assert not decision.remedy and "above the project's" in decision.reason
        if any(one.inspects(where) for one in alone):
            assert rules.inspects(where)
    for host in HOSTS:
        ports = (22, 79, *PORTS, 8442)
        assert rules.name(host).allowed == any(rules.host(Destination(host, port)).allowed for port in ports)


@settings(max_examples=40, deadline=None)
@given(networks, networks, st.sampled_from(HOSTS), st.sampled_from(PORTS), st.sampled_from(METHODS))
def test_the_globs_are_those_of_each_policy(
    inner: NetworkPolicy, outer: NetworkPolicy, host: str, port: int, method: str
) -> None:
    rules, where = rules_of(within(inner, outer)), Destination(host, port)
    sets = rules.paths(where, method)
    for to, verb, path in asked():
        if (to, verb) == (where, method):
            try:
                found = readings(path)
            except BadPathError:
                continue
            expected = sets is not None and all(
                any(glob_matches(glob, reading) for glob in globs) for globs in sets for reading in found
            )
            assert rules.request(to, verb, path).allowed == expected


@settings(max_examples=40, deadline=None)
@given(networks, networks)
def test_within_another_nothing_is_new_and_a_difference_is_seen(inner: NetworkPolicy, outer: NetworkPolicy) -> None:
    both = within(inner, outer)
    for alone in (inner, outer):
        assert not [one for one in diff_policies(compile_policy(alone), compile_policy(both)).wider if one.exact]
    found = diff_policies(compile_policy(both), compile_policy(inner))
    rules, old = rules_of(inner), rules_of(both)
    for where, method, path in asked():
        if rules.request(where, method, path).allowed and not old.request(where, method, path).allowed:
            assert found.wider
    for one in found.wider:
        if one.exact:
            where, method, path = one.example
            assert rules.request(where, method, path).allowed and not old.request(where, method, path).allowed


def test_paths_of_two_policies_have_to_meet() -> None:
    inner = NetworkPolicy(rules=(NetworkRule("a.org", paths=("/x*",)),))
    outer = NetworkPolicy(rules=(NetworkRule("a.org", paths=("*y",)),))
    before, after = NetworkPolicy(rules=(NetworkRule("a.org", paths=("/xy",)),)), within(inner, outer)
    assert diff_networks(before, after).wider  # /xzy
    assert not diff_networks(inner, after).wider and not diff_networks(outer, after).wider


@pytest.mark.parametrize(
    ("inner", "outer", "dialled", "fine", "refused"),
    [
        # The wider one names none: a project cannot lead a name that is allowed to another place.
        (["203.0.113.66"], [], (), [], ["203.0.113.66", "10.0.0.1", "93.184.216.34"]),
        (["93.184.216.34"], [], (), ["93.184.216.34"], ["1.1.1.1"]),
        (["10.0.0.1"], [], (), [], ["10.0.0.1", "1.1.1.1"]),
        # The wider one names them: that holds for a project that names none.
        ([], ["10.0.0.1"], ("10.0.0.1",), ["10.0.0.1"], ["10.0.0.2", "1.1.1.1"]),
        (["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], ("10.0.0.1",), ["10.0.0.1"], ["10.0.0.2"]),
        (["10.0.0.3"], ["10.0.0.1"], ("10.0.0.1",), [], ["10.0.0.1", "10.0.0.3"]),
        ([], [], (), ["1.1.1.1"], ["10.0.0.1", "127.0.0.1"]),
    ],
)
def test_only_the_widest_policy_leads_a_name_elsewhere(
    inner: list[str], outer: list[str], dialled: tuple[str, ...], fine: list[str], refused: list[str]
) -> None:
    policies = [
        NetworkPolicy(rules=(NetworkRule("a.org", addresses=tuple(one)),))
        if one
        else NetworkPolicy(allowed_hosts=("a.org",))
        for one in (inner, outer)
    ]
    rules, to = rules_of(within(*policies)), Destination("a.org", 443)
    assert rules.addresses(to) == dialled
    for address in fine:
        assert rules.address(to, address, ()).allowed, address
    for address in refused:
        assert not rules.address(to, address, ()).allowed, address


def test_the_linter_says_what_a_wider_policy_takes_away() -> None:
    inner = NetworkPolicy(mode="proxy", allowed_hosts=("a.org", "*.b.org", "c.org"))
    found = lint(within(inner, NetworkPolicy(allowed_hosts=("a.org", "x.b.org"))))
    (said,) = [one for one in found if one.warning]
    assert said.where == "network.allowed_hosts[2]" and "above the project's" in said.text


def test_the_wire_carries_wider_policies() -> None:
    policy = compile_policy(within(NetworkPolicy(allowed_hosts=("*",)), NetworkPolicy(allowed_hosts=("a.org",))))
    config = BrokerConfig("s", policy, {}, (), "", "")
    assert config_from_json(config_to_json(config)) == config and policy.within[0].allow[0].pattern == "a.org"


def test_tls_is_looked_into_unless_every_policy_passes_it_through() -> None:
    unseen = NetworkPolicy(rules=(NetworkRule("a.org", tls="passthrough"),))
    seen, to = NetworkPolicy(allowed_hosts=("a.org",)), Destination("a.org", 443)
    assert not rules_of(within(unseen, unseen)).inspects(to)
    assert rules_of(within(unseen, seen)).inspects(to) and rules_of(within(seen, unseen)).inspects(to)
