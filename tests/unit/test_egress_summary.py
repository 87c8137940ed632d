"""A session's network use in a few lines, whatever the guest did to make them many."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator

from vmsandbox.egress.summary import MOST_HOSTS, summarise
from vmsandbox.egress.values import EgressEvent, EgressKind

KIND = EgressKind


def event(kind: EgressKind, host: str = "pypi.org", port: int = 443, **rest: object) -> EgressEvent:
    return EgressEvent(kind, 1.0, host=host, port=port, **rest)  # type: ignore[arg-type]


SIX = {"ecosystem": "pypi", "name": "six", "version": "1.17.0", "digest": "sha256:ab", "index": "pypi.org"}
SESSION = [
    event(KIND.READY, ""),
    event(KIND.ALLOWED),
    event(KIND.ALLOWED),
    event(KIND.CLOSED, sent=100, received=3 << 20),
    event(KIND.CLOSED, sent=11, received=1),
    event(KIND.REFUSED, rule="network.rules[0]", reason="POST is not allowed", remedy='{"a": 1}'),
    event(KIND.REFUSED, "evil.example", rule="default-deny", reason="no rule allows evil.example", remedy="add it"),
    event(KIND.REFUSED, "evil.example", rule="default-deny", reason="no rule allows evil.example", remedy="add it"),
    event(KIND.FAILED, "down.example", reason="no answer"),
    event(KIND.LEARNED, "learned.example"),
    event(KIND.PACKAGE, more=SIX),
    event(KIND.PACKAGE, more=SIX),
    event(KIND.ALERT, rule="dlp", reason="r", more={"what": "canary 1", "where": "body"}),
    event(KIND.LIMIT),
]


def test_a_session_in_a_few_lines() -> None:
    assert summarise(SESSION).lines() == [
        "pypi.org:443: 2 requests, 111 B sent, 3.0 MiB received",
        "learned.example:443: 1 request, 0 B sent, 0 B received",
        "refused 2×: no rule allows evil.example (default-deny)",
        "  to allow it: add it",
        "refused 1×: POST is not allowed (network.rules[0])",
        '  to allow it: {"a": 1}',
        "failed: down.example:443, 1×",
        "fetched pypi:six 1.17.0 from pypi.org sha256:ab",
        "ALERT canary 1 in the body to pypi.org, 1×",
        "a limit was reached 1×",
    ]
    assert summarise([event(KIND.READY)]).lines() == ["network: nothing was asked for"]


def test_the_same_as_json() -> None:
    found = json.loads(json.dumps(summarise(SESSION).as_json()))
    assert found["reached"][0] == {
        "host": "pypi.org", "port": 443, "requests": 2, "sent": 111, "received": (3 << 20) + 1, "failed": 0,
        "refusals": [{"rule": "network.rules[0]", "reason": "POST is not allowed", "remedy": '{"a": 1}', "count": 1}],
    }  # fmt: skip
    assert [one["host"] for one in found["refused"]] == ["evil.example", "down.example"]
    assert found["packages"] == [SIX] and found["alerts"][0]["count"] == 1 and found["limits"] == 1


def test_a_flood_of_hosts_is_bounded_and_hides_nothing_that_was_reached() -> None:
    def flood() -> Iterator[EgressEvent]:
        for number in range(20_000):
            name = f"{number:06}." + "x" * 5000
            yield event(KIND.REFUSED, name, rule=f"r{number}" + "y" * 5000, reason="z" * 5000, remedy="w" * 5000)
            yield event(KIND.REFUSED, "same.example", rule=f"r{number}" + "y" * 5000, reason="z" * 5000)
            if number % 10 == 0:
                more = {"ecosystem": "pypi", "name": name, "what": name, "where": "body"}
                yield event(KIND.PACKAGE, more=more)
                yield event(KIND.ALERT, more=more)
        yield event(KIND.ALLOWED, "reached.example")
        yield event(KIND.CLOSED, "reached.example", sent=7)

    tracemalloc.start()
    found = summarise(flood())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20
    assert found.lines()[0] == "reached.example:443: 1 request, 7 B sent, 0 B received"
    assert (
        len(found.refused) == MOST_HOSTS
        and found.others > 20_000
        and found.more_packages == 0
        and found.more_alerts == 1900
    )
    assert len(found.lines()) < 150 and all(len(line) < 1100 for line in found.lines())


def test_what_a_guest_chose_cannot_act_on_a_terminal() -> None:
    bad = "\x1b]52;c;eA==\x07\u202eexe\n$ rm"
    more = dict.fromkeys(("ecosystem", "name", "version", "digest", "index", "what", "where"), bad)
    events = [event(kind, bad, rule=bad, reason=bad, remedy=bad, more=more) for kind in EgressKind]
    for line in summarise(events).lines():
        assert line.isprintable() and "\u202e" not in line


def test_a_host_that_was_refused_first_keeps_its_refusals_when_it_is_reached() -> None:
    found = summarise([event(KIND.REFUSED, rule="a", reason="b"), event(KIND.ALLOWED)])
    assert not found.refused and found.reached["pypi.org:443"].refused == 1
