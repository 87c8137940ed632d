"""What a policy lets come back: denied places, what is taken without a person, limits; and whose word counts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_acceptance import OLD, Ended
from trees import File, Link, Tree, manifest_of, read_tree, review_of

from vmsandbox.errors import RefusedError
from vmsandbox.policy.merging.return_rules import narrowed
from vmsandbox.policy.values import Policy, ReturnPolicy
from vmsandbox.review.returning import DeniedReturns, over_limits, under
from vmsandbox.review.values import Choice, Selection
from vmsandbox.session.acceptance import accept, review_returned
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.spec import Accept


@pytest.mark.parametrize(
    ("pattern", "denied", "free"),
    [
        (".github/", [".github", ".github/a", ".github/w/b.yml", "sub/.github/x", ".GitHub/a", ".git\u200chub/a"],
         [".githubx"]),
        ("./secrets/", ["secrets", "secrets/a/b"], ["sub/secrets/a", "secrets.txt"]),
        ("config/*.yaml", ["config/a.yaml", "config/a.yaml/b"], ["config/a/b.yaml", "x/config/a.yaml", "config/a.yml"]),
        ("*.pem", ["a.pem", "x/b.PEM", "x.pem/a"], ["a.pem.txt"]),
        ("docs/**/*.sh", ["docs/a.sh", "docs/a/b/c.sh"], ["docs/a.md"]),
        ("/Makefile", ["Makefile", "makefile"], ["sub/Makefile"]),
        ("**/key", ["key", "a/b/key", "a/key/b"], ["keys"]),
        ("a b[1]", ["a b1"], ["a b2"]),
        (".", ["a", "a/b"], []),
    ],
)  # fmt: skip
def test_what_a_pattern_denies(pattern: str, denied: list[str], free: list[str]) -> None:
    rules = DeniedReturns((pattern,))
    assert [rules.rule(path) for path in denied] == [pattern] * len(denied)
    assert [rules.rule(path) for path in free] == [None] * len(free)


def blocked(old: Tree, new: Tree, *patterns: str) -> list[str]:
    review = under(review_of(old, new), ReturnPolicy(denied_paths=patterns), manifest_of(old), manifest_of(new))
    assert sorted(review.changes, key=lambda one: not one.blocked) == list(review.changes)
    return sorted(one.path for one in review.changes if one.blocked)


def test_each_kind_of_change_is_blocked() -> None:
    old: Tree = {"d/gone": File(b"1"), "d/changed": File(b"2"), "d/mode": File(b"3"), "d/kind": File(b"4"),
                 "d/moved": File(b"moved away"), "free": File(b"5")}  # fmt: skip
    new: Tree = {"d/changed": File(b"x"), "d/mode": File(b"3", 0o755), "d/kind": Link("mode"), "d/new": File(b"y"),
                 "moved": File(b"moved away"), "free": File(b"z")}  # fmt: skip
    assert blocked(old, new, "d/") == ["d/changed", "d/gone", "d/kind", "d/mode", "d/new", "moved"]


def test_a_link_is_no_way_into_a_denied_place() -> None:
    """`.github -> x` with `x/workflows/a` is `.github/workflows/a`, whether the link is new or was there before."""
    assert blocked({}, {".github": Link("x"), "x/workflows/a": File(b"1")}, ".github/workflows/") == [
        "x/workflows", "x/workflows/a",
    ]  # fmt: skip
    old: Tree = {".github": Link("x"), "x/workflows/a": File(b"1")}
    assert blocked(old, {**old, "x/workflows/a": File(b"2"), "x/b": File(b"3")}, ".github/workflows") == [
        "x/workflows/a"
    ]


def test_limits_count_what_is_no_folder() -> None:
    old: Tree = {
        "a/gone": File(b"1"),
        "emptied": File(b"2"),
        "link": File(b"3"),
        "same": File(b"4"),
        "old": File(b"name"),
    }
    new: Tree = {
        "emptied": File(b""),
        "link": Link("same"),
        "same": File(b"12345"),
        "b/c/new": File(b"67"),
        "name": File(b"name"),
    }
    review = review_of(old, new)
    assert over_limits(review, ReturnPolicy(files=5, bytes=7, deletions=3)) == []
    texts = over_limits(review, ReturnPolicy(files=4, bytes=6, deletions=2))
    assert [text.rpartition(", ")[0] for text in texts] == [
        "the policy's return.files: 5 came back", "the policy's return.bytes: 7 came back",
        "the policy's return.deletions: 3 came back",
    ]  # fmt: skip
    assert over_limits(review, ReturnPolicy()) == []


POLICIES = st.builds(
    ReturnPolicy,
    st.sampled_from([None, "none", "safe", "all"]),
    st.lists(st.sampled_from(["a/", "./b", "*.c"]), max_size=3).map(tuple),
    *(st.none() | st.integers(0, 5) for _ in range(3)),
)


@given(POLICIES, POLICIES)
def test_two_policies_together_never_allow_more_than_one(one: ReturnPolicy, other: ReturnPolicy) -> None:
    both = narrowed(one, other)
    rank = ["none", "safe", "all", None]
    for each in (one, other):
        assert rank.index(both.accept) <= rank.index(each.accept)
        assert set(each.denied_paths) <= set(both.denied_paths)
        for name in ("files", "bytes", "deletions"):
            limit, narrow = getattr(each, name), getattr(both, name)
            assert limit is None or (narrow is not None and narrow <= limit)
    assert narrowed(both, one) == both


# -- whose word counts ---------------------------------------------------------------------------------------


@pytest.fixture
def ended() -> Iterator[Ended]:
    with tempfile.TemporaryDirectory(prefix="vms-") as home:
        yield Ended(Path(home))


def held(ended: Ended, **rules: Any) -> None:
    ended.record.keep_returns(ReturnPolicy(**rules))


def everything(ended: Ended) -> Selection:
    review = review_returned(ended.record).review
    return Selection(review.digest, tuple(Choice(one.path) for one in review.changes))


def test_rules_are_the_records_and_only_narrow(ended: Ended) -> None:
    held(ended, accept="safe", denied_paths=("src/",), files=9)
    held(ended, accept="all", files=20, deletions=1)
    held(ended)
    assert ended.record.returns() == ReturnPolicy("safe", ("src/",), 9, None, 1)
    kinds = [event["kind"] for event in ended.record.events()]
    assert kinds.count("return.rules") == 2


def test_no_rule_is_cut_and_none_is_believed_that_was_changed(ended: Ended) -> None:
    """The journal cuts lists and long texts, so it has only the digest."""
    patterns = (*(f"folder-{number}/" for number in range(100)), "long" * 500)
    held(ended, denied_paths=patterns)
    assert ended.record.returns().denied_paths == patterns
    (path,) = ended.record.folder.glob("returns-*.json")
    path.write_bytes(path.read_bytes().replace(b"folder-99", b"folder-98"))
    ended("accept", "--all", status=125)
    path.unlink()
    ended("accept", "--all", status=125)


def test_what_the_project_says_now_counts_for_nothing(ended: Ended) -> None:
    """The guest returned a policy that allows more, and it was accepted."""
    held(ended, accept="none", denied_paths=("src/",))
    (ended.project / ".claude").mkdir()
    (ended.project / ".claude/sandbox.yaml").write_text("sandbox: {return: {accept: all}}\n")
    done = ended("accept", "--all", status=126)
    assert b"sandbox.return.accept: none" in done.stderr


@pytest.mark.parametrize(
    ("cap", "words", "status"),
    [
        ("none", ["--safe"], 126), ("none", ["--all"], 126), ("none", ["src/b.py"], 126), ("safe", ["--all"], 126),
        ("safe", ["--safe"], 0), ("safe", ["src/b.py"], 0), ("safe", ["src/conftest.py"], 126),
        ("safe", [".", "--all"], 126),
        ("all", ["--all"], 0), ("all", ["src/conftest.py"], 0), (None, ["--all"], 0),
    ],
)  # fmt: skip
def test_the_cap_holds_without_a_person(ended: Ended, cap: str | None, words: list[str], status: int) -> None:
    held(ended, accept=cap)
    before = read_tree(ended.project)
    done = ended("accept", *words, status=status)
    if status:
        assert b"return.accept" in done.stderr
        assert read_tree(ended.project) == before
    else:
        assert read_tree(ended.project) != before


def test_asking_for_more_is_refused_even_where_it_would_be_the_same() -> None:
    with tempfile.TemporaryDirectory(prefix="vms-") as home:
        plain = Ended(Path(home), new={**OLD, "plain": File(b"1\n")})
        held(plain, accept="safe")
        plain("accept", "--all", status=126)
        plain("accept", "--safe")


def test_a_person_may_take_more(ended: Ended) -> None:
    held(ended, accept="none", files=1)
    returned = review_returned(ended.record)
    some = Selection(returned.review.digest, (Choice("src/b.py"),))
    with pytest.raises(RefusedError):
        accept(returned, some, "paths")
    assert [one.text for one in returned.review.findings if "return.files" in one.text]
    assert accept(returned, some, "person", attended=True).paths


@pytest.mark.parametrize(
    ("limits", "words"), [({"files": 2}, ["--safe"]), ({"bytes": 3}, ["--all"]), ({"deletions": 0}, ["src/b.py"])]
)
def test_over_a_limit_nothing_is_taken_without_a_person(ended: Ended, limits: dict[str, int], words: list[str]) -> None:
    held(ended, **limits)
    before = read_tree(ended.project)
    done = ended("accept", *words, status=126)
    assert f"return.{next(iter(limits))}".encode() in done.stderr
    assert read_tree(ended.project) == before
    assert f"return.{next(iter(limits))}" in json.dumps(ended.json("changes"))


def test_a_denied_place_is_blocked_for_a_person_too(ended: Ended) -> None:
    held(ended, denied_paths=("src/",))
    done = ended("accept", "src/b.py", status=126)
    assert b"return.denied_paths has src/" in done.stderr
    returned = review_returned(ended.record)
    with pytest.raises(RefusedError):
        accept(returned, everything(ended), "person", attended=True)
    assert "a.txt" in ended.json("accept", "--all")["applied"]
    assert read_tree(ended.project)["src/b.py"] == OLD["src/b.py"]


def test_a_session_refuses_before_it_starts() -> None:
    policy = Policy(returns=ReturnPolicy(accept="safe"), source=Path("/p/sandbox.yaml"))
    with pytest.raises(RefusedError) as refused:
        SessionRequest(policy=policy, accept=Accept.ALL).check()
    assert "sandbox.return.accept: safe (/p/sandbox.yaml)" in refused.value.details
    SessionRequest(policy=policy, accept=Accept.SAFE).check()
    SessionRequest(policy=policy).check()
