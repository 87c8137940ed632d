"""What learning proposes: loads, allows all that was seen, and no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.hosts import parse_destination
from vmsandbox.egress.learn import MAX_HOSTS, propose
from vmsandbox.egress.values import Destination, EgressEvent, EgressKind
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.values import Policy


def learned(url: str, method: str = "GET", kind: EgressKind = EgressKind.LEARNED, rule: str = "learn") -> EgressEvent:
    host, slash, path = url.partition("/")
    to = parse_destination(host, 443)
    return EgressEvent(kind, 0, "proxy", to.host, to.port, method, slash + path, rule=rule)


def loaded(folder: Path, text: str) -> Policy:
    path = folder / "proposal.yaml"
    path.write_text(text)
    return load_policy(path)


def rules(folder: Path, text: str) -> Rules:
    return Rules(compile_policy(loaded(folder, text).network))


def test_the_smallest_policy(tmp_path: Path) -> None:
    found = propose([
        learned("a.org/x/1"), learned("a.org/x/2", "POST"), learned("a.org:8443/x/1"),
        *(learned(f"b.org/simple/{number}/?q={number}") for number in range(9)),
        *(learned(f"c.org/{number}/x") for number in range(9)),
        learned("d.org", ""), learned("e.org/", "CONNECT", EgressKind.REFUSED, "default-deny"),
        learned("[2001:4860::8]/"), learned("f.org/caf%C3%A9%20x/%25"),
        EgressEvent(EgressKind.REFUSED, 0, "dns", "g.org", rule="default-deny"),
    ])  # fmt: skip
    network = loaded(tmp_path, found.text).network
    assert network.allowed_hosts == ("d.org:443", "e.org:443", "g.org:443") and network.mode == "restricted"
    said = {one.host: (one.ports, one.methods, one.paths) for one in network.rules}
    assert said == {
        "a.org": ((443, 8443), ("GET", "POST"), ("/x/1", "/x/2")),
        "b.org": ((443,), ("GET",), ("/simple/*",)),
        "c.org": ((443,), ("GET",), ()),
        "2001:4860::8": ((443,), ("GET",), ("/",)),
        "f.org": ((443,), ("GET",), ("/café%20x/%".replace("%20", " "),)),
    }
    assert found.hosts == 8 and found.skipped == 0


def test_an_encoded_slash_is_learned_so_that_it_is_allowed(tmp_path: Path) -> None:
    found = rules(tmp_path, propose([learned("a.org/@types%2fnode")]).text)
    assert found.request(Destination("a.org", 443), "GET", "/@types%2fnode").allowed


def test_what_was_refused_on_purpose_or_allowed_anyway_is_not_proposed() -> None:
    assert propose([]).text == ""
    assert propose([learned("a.org/", kind=EgressKind.REFUSED, rule="network.denied_hosts[0]")]).text == ""
    assert propose([learned("a.org/", kind=EgressKind.ALLOWED, rule="network.allowed_hosts[0]")]).text == ""
    assert propose([learned("a.org/", kind=EgressKind.REFUSED, rule="private-address")]).text == ""
    assert propose([learned("a.org/", kind=EgressKind.CLOSED)]).text == ""


@pytest.mark.parametrize(
    "host", ["a.org\nevil", 'a".org', "127.1", "*", "*.org", "@pypi", "a.org.", "", "x" * 300, "\u202e.org", "::1%1"]
)
def test_a_host_that_is_none_gets_into_no_policy(host: str) -> None:
    found = propose([EgressEvent(EgressKind.LEARNED, 0, host=host, port=443, method="GET", path="/", rule="learn")])
    assert found.text == "" and found.skipped == 1


def test_a_flood_of_hosts_is_cut() -> None:
    found = propose(learned(f"h{number}.org/") for number in range(MAX_HOSTS + 5))
    assert found.hosts == MAX_HOSTS and found.truncated


PATHS = st.text("ab/.%2fF*;~: \"'\\\u00e9\U0001f600", max_size=12).map(lambda one: "/" + one) | st.just("")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a.org", "b.a.org", "2001:4860::8",
"8.8.8.8"]), st.sampled_from([80, 443, 8443]),
                          st.sampled_from(["GET", "POST", "M-SEARCH", "odd method",
                          ""]), PATHS), min_size=1, max_size=12))  # fmt: skip
def test_the_proposal_loads_and_allows_all_that_was_seen(
    tmp_path_factory: pytest.TempPathFactory, seen: list[tuple[str, int, str, str]]
) -> None:
    events = [EgressEvent(EgressKind.LEARNED, 0, "proxy", *one, rule="learn") for one in seen]
    found = rules(tmp_path_factory.mktemp("p"), propose(events).text)
    for host, port, method, path in seen:
        to = Destination(host, port)
        assert found.host(to).allowed
        if method in ("GET", "POST", "M-SEARCH"):
            assert found.request(to, method, path).allowed, (to, method, path)
    assert not found.host(Destination("x.b.a.org", 443)).allowed and not found.host(Destination("a.org", 22)).allowed
