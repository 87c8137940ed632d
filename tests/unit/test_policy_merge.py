"""Policies that hold together: what is allowed then is allowed by each of them that says anything of it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from egress_policies import asked, rules_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from whole_policies import PATHS, layers, said

from vmsandbox.egress.packages import Fetch, Part, by_name, canonical
from vmsandbox.egress.values import PackageRules
from vmsandbox.errors import RefusedError
from vmsandbox.policy.layer import Layer, layer_of
from vmsandbox.policy.merging.merge import merge, merge_two, says_commands
from vmsandbox.policy.merging.merge_network import says_hosts
from vmsandbox.policy.places import common, covers, inside, mount_over
from vmsandbox.policy.values import (
    FilesystemPolicy,
    KernelPolicy,
    NetworkPolicy,
    NetworkRule,
    Policy,
    PushPolicy,
    SecretSource,
    SessionPolicy,
    Tmpfs,
)

GRADES = (None, "emulated", "separated", "isolated")
MODES = {"none": 0, "proxy": 1, "restricted": 2, "filtered": 2}
ACCEPTED = ("none", "safe", "all")
LEAST = (
    "vcpus", "memory", "memory_reserved", "disk", "write_rate", "processes", "output", "time", "idle", "files", "bytes",
    "deletions",
)  # fmt: skip
few = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def merged(*several: Layer) -> Layer:
    """As one; examples that have no path in common are left out."""
    found = several[0]
    for one in several[1:]:
        try:
            found = merge_two(found, one)
        except RefusedError:
            assume(False)
    return found


def may_write(layer: Layer, path: str) -> bool:
    """Whether a file lets a path be written, taken alone; what it says nothing about, it lets be."""
    section = layer.policy.filesystem
    if any(inside(path, one.path) for one in section.tmpfs):
        return True
    if section.read_only and inside(path, "./"):
        return section.output is not None and inside(path, section.output)
    return not section.allowed_paths or any(inside(path, one) for one in section.allowed_paths)


@few
@given(layers, layers)
def test_no_path_can_be_written_that_one_of_them_keeps(outer: Layer, inner: Layer) -> None:
    both = merged(outer, inner)
    for path in (*PATHS, "./other", "./src/a/b", "./output/x/y", "/tmp/x/y", "/usr", "~/.cache/y"):
        if may_write(both, path):
            assert may_write(outer, path) and may_write(inner, path), path
    for one in (outer, inner):
        for mount in both.policy.filesystem.tmpfs:
            if like := mount_over(mount.path, one.policy.filesystem.tmpfs):
                assert mount.size <= like.size and (like.exec or not mount.exec)
        for mount in one.policy.filesystem.tmpfs:  # what is not mounted any more lies in one as narrow, or is no place
            now = mount_over(mount.path, both.policy.filesystem.tmpfs)
            if now is None:
                assert not may_write(both, mount.path)
            else:
                assert now.size <= mount.size and (mount.exec or not now.exec)
        assert set(one.policy.filesystem.denied_paths) <= set(both.policy.filesystem.denied_paths)


@few
@given(layers, layers)
def test_a_request_is_let_through_by_each_file_that_names_hosts(outer: Layer, inner: Layer) -> None:
    both = merged(outer, inner)
    rules = rules_of(both.policy.network)
    alone = [rules_of(one.policy.network) for one in (outer, inner) if says_hosts(one)]
    for where, method, path in asked():
        expected = bool(alone) and all(one.request(where, method, path).allowed for one in alone)
        assert rules.request(where, method, path).allowed == expected, (where, method, path)


@few
@given(layers, layers)
def test_a_command_is_asked_of_each_file_that_names_any(outer: Layer, inner: Layer) -> None:
    commands = merged(outer, inner).policy.commands
    asked_of = [replace(one, within=(), confirm_seconds=60) for one in (commands, *commands.within)]
    for one in (outer, inner):
        if says_commands(one):
            assert replace(one.policy.commands, confirm_seconds=60) in asked_of
    assert not any(one.within for one in commands.within)


@few
@given(layers, layers)
def test_secrets_and_what_is_looked_for(outer: Layer, inner: Layer) -> None:
    both = merged(outer, inner)
    network = both.policy.network
    for one in (outer, inner):
        theirs = one.policy.network
        if one.says("network.secrets"):
            known = {secret.name: secret for secret in theirs.secrets}
            for secret in network.secrets:
                like = known[secret.name]
                assert set(secret.hosts) <= set(like.hosts) and secret.hosts
                assert not like.methods or (secret.methods and set(secret.methods) <= set(like.methods))
                assert (secret.env, secret.header, secret.prefix) == (like.env, like.header, like.prefix)
        for what in ("secrets", "canaries"):
            if one.says(f"network.dlp.{what}") and getattr(theirs, f"dlp_{what}"):
                assert getattr(network, f"dlp_{what}")
        assert network.dlp_freeze or not theirs.dlp_freeze
        assert network.packages_minimum_age_days >= theirs.packages_minimum_age_days
        for name, value in theirs.limits:
            assert 0 < dict(network.limits)[name] <= value
        if theirs.mode is not None:
            assert MODES[network.mode or "none"] <= MODES[theirs.mode]
    if outer.policy.network.resolver:
        assert network.resolver and set(network.resolver) <= set(outer.policy.network.resolver)


@few
@given(
    layers,
    layers,
    st.sampled_from(["pypi", "npm", "debian"]),
    st.sampled_from(["six", "s-x", "s__X", "left-pad", "@a/b"]),
)
def test_a_package_is_let_through_by_each_file(outer: Layer, inner: Layer, kind: str, name: str) -> None:
    fetch = Fetch(kind, Part.FILE, canonical(kind, name), "1")

    def allowed(network: NetworkPolicy) -> bool:
        return by_name(PackageRules(network.packages_allow, network.packages_deny), fetch) is None

    if allowed(merged(outer, inner).policy.network):
        assert allowed(outer.policy.network) and allowed(inner.policy.network)


@few
@given(layers, layers)
def test_numbers_grades_and_switches_are_the_strictest(outer: Layer, inner: Layer) -> None:
    policy = merged(outer, inner).policy
    for one in (outer, inner):
        theirs = one.policy
        assert GRADES.index(policy.isolation) >= GRADES.index(theirs.isolation)
        for section in ("resources", "returns", "session"):
            for name in LEAST:
                value = getattr(getattr(theirs, section), name, None)
                if value is not None:
                    assert getattr(getattr(policy, section), name) <= value, name
        if theirs.returns.accept is not None:
            assert policy.returns.accept in ACCEPTED[: ACCEPTED.index(theirs.returns.accept) + 1]
        assert set(theirs.returns.denied_paths) <= set(policy.returns.denied_paths)
        assert set(theirs.kernel.seccomp) <= set(policy.kernel.seccomp)
        for field in fields(PushPolicy):
            assert "refuse" in (
                getattr(policy.push, field.name),
                "refuse" * (getattr(theirs.push, field.name) == "warn"),
            )
        for key in ("capabilities", "new_privileges", "user_namespaces"):
            if one.says(f"kernel.{key}"):
                mine, other = getattr(policy.kernel, key), getattr(theirs.kernel, key)
                assert (mine <= other) if isinstance(mine, bool) else set(mine) <= set(other)
        if one.says("session.environment"):
            assert set(policy.session.environment) <= set(theirs.session.environment)
        if one.says("commands.confirm_seconds"):
            assert policy.commands.confirm_seconds <= theirs.commands.confirm_seconds
        if policy.resources.memory and policy.resources.memory_reserved:
            assert policy.resources.memory_reserved <= policy.resources.memory


@few
@given(layers)
def test_with_itself_it_is_itself(layer: Layer) -> None:
    assert merge([layer]) == layer.policy
    both = merge_two(layer, layer)
    assert both.policy == replace(layer.policy, outer=()) and both.said == layer.said


@few
@given(layers, layers, layers)
def test_it_does_not_matter_which_two_are_merged_first(one: Layer, two: Layer, three: Layer) -> None:
    left = merged(merged(one, two), three).policy
    right = merged(one, merged(two, three)).policy
    places = [tuple(sorted(set(policy.filesystem.allowed_paths))) for policy in (left, right)]
    assert places[0] == places[1]

    def plain(policy: Policy) -> Policy:
        # What is mounted or written in a narrow case depends on the order; never for the wider (see above).
        section = replace(policy.filesystem, allowed_paths=(), output=None, tmpfs=())
        network = replace(policy.network, packages_allow=None, secrets=tuple(sorted(policy.network.secrets, key=str)))
        return replace(policy, filesystem=section, network=network, outer=(), source=None)

    assert plain(left) == plain(right)


@few
@given(layers)
def test_a_file_that_says_nothing_changes_nothing(layer: Layer) -> None:
    nothing = layer_of(Policy())
    assert merge([nothing, layer]) == layer.policy == replace(merge([layer, nothing]), source=layer.source, outer=())
    assert merge([]) == Policy()


def network(*hosts: str, **more: object) -> Policy:
    return Policy(network=NetworkPolicy(allowed_hosts=hosts, **more))  # type: ignore[arg-type]


def together(*several: Policy, extra: frozenset[str] = frozenset()) -> Policy:
    return merge([said(one, extra) for one in several])


def test_a_mode_without_hosts_lets_no_host_through_in_a_wider_file_either() -> None:
    both = together(Policy(network=NetworkPolicy(mode="restricted")), network("*", mode="proxy"))
    assert not any(rules_of(both.network).request(*one).allowed for one in asked())
    assert both.network.mode == "proxy"


def test_a_wider_deny_holds_against_a_more_precise_allow() -> None:
    both = together(network("*", denied_hosts=("*.a.org",)), network("b.a.org", "y.org", mode="proxy"))
    allowed = {where.host for where, *rest in asked() if rules_of(both.network).host(where).allowed}
    assert allowed == {"y.org"}
    alone = together(network("b.a.org", denied_hosts=("*.a.org",)))
    assert any(rules_of(alone.network).host(where).allowed for where, *_ in asked())


def test_a_project_leads_no_name_elsewhere() -> None:
    rule = NetworkRule("a.org", addresses=("198.18.0.1",))
    both = together(network("a.org"), Policy(network=NetworkPolicy(rules=(rule,))))
    where = next(one for one, *_ in asked() if one == ("a.org", 443))
    assert not rules_of(both.network).address(where, "198.18.0.1", ()).allowed


def test_a_person_gives_a_secret_that_a_project_cannot_redirect() -> None:
    mine = SecretSource("KEY", env="KEY", hosts=("a.org",))
    theirs = replace(mine, hosts=("a.org", "evil.org"))
    outer = Policy(network=NetworkPolicy(secrets=(mine,)))
    assert together(outer, Policy(network=NetworkPolicy(secrets=(theirs,)))).network.secrets == (mine,)
    for other in (replace(mine, file="x", env=None), replace(mine, hosts=("evil.org",)), replace(mine, header="x-a")):
        assert together(outer, Policy(network=NetworkPolicy(secrets=(other,)))).network.secrets == ()
    assert together(outer, network("a.org")).network.secrets == (mine,)


def test_nothing_in_common_is_refused_and_never_the_default() -> None:
    with pytest.raises(RefusedError) as caught:
        together(Policy(filesystem=FilesystemPolicy(("./src",))), Policy(filesystem=FilesystemPolicy(("./tests",))))
    assert caught.value.exit_code == 126 and "./tests" in caught.value.details


def test_a_writable_folder_of_one_is_not_that_of_another() -> None:
    wide = Policy(filesystem=FilesystemPolicy(("./src", "~/")))
    narrow = Policy(filesystem=FilesystemPolicy(read_only=True, output="./output"))
    both = together(Policy(filesystem=FilesystemPolicy(("./src",))), narrow).filesystem
    assert both.read_only and both.output is None
    assert together(wide, narrow).filesystem.output == "./output"  # the project lies in the worker's home
    assert together(narrow, wide).filesystem.read_only
    mounts = Policy(filesystem=FilesystemPolicy(tmpfs=(Tmpfs("/tmp", 4096), Tmpfs("/opt/x", 4096, True))))
    hole = Policy(filesystem=FilesystemPolicy(tmpfs=(Tmpfs("/tmp/x", 1 << 30, True), Tmpfs("/tmp", 1 << 30, True))))
    assert together(mounts, hole).filesystem.tmpfs == (*mounts.filesystem.tmpfs, Tmpfs("/tmp/x", 4096))


def test_where_nothing_can_be_combined_the_wider_file_wins() -> None:
    def one(name: str) -> Policy:
        return Policy(
            image=name,
            session=SessionPolicy(post_create=(name,), schedule=name, variables=(("A", name), (name, "1"))),
            source=Path(name),
        )

    both = together(one("wide"), one("narrow"), one("own"))
    assert both.image == "wide" and both.session.post_create == ("wide",) and both.session.schedule == "wide"
    assert dict(both.session.variables) == {"A": "wide", "wide": "1", "narrow": "1", "own": "1"}
    assert both.source == Path("own") and both.outer == (Path("wide"), Path("narrow"))


def test_what_a_file_says_explicitly_holds_also_if_it_is_the_default() -> None:
    asks = Policy(
        kernel=KernelPolicy(capabilities=("chown",), new_privileges=True), session=SessionPolicy(environment=("A",))
    )
    assert together(Policy(), asks).kernel == asks.kernel
    strict = said(Policy(), frozenset({"kernel.capabilities", "kernel.new_privileges", "session.environment"}))
    both = merge([strict, said(asks)])
    assert both.kernel == KernelPolicy() and both.session.environment == ()
    assert both == replace(merge([said(asks), strict]), source=None)


@pytest.mark.parametrize(
    ("path", "folder", "is_inside"),
    [
        ("./src", "./", True), ("./", "./src", False), ("./src2", "./src", False), ("./src", "~/", True),
        ("~/x", "/home/claude-worker", True), ("/home/claude-worker/.cache", "~/.cache", True), ("~/", "/", True),
        ("/home/claude-worker/projects/x", "./", False), ("/tmp", "/tmp/x", False), ("/tmpx", "/tmp", False),
    ],
)  # fmt: skip
def test_which_path_lies_in_which(path: str, folder: str, is_inside: bool) -> None:
    assert inside(path, folder) is is_inside


@given(
    st.lists(st.sampled_from(PATHS), max_size=3), st.lists(st.sampled_from(PATHS), max_size=3), st.sampled_from(PATHS)
)
def test_the_common_paths_are_those_of_both(ours: list[str], theirs: list[str], path: str) -> None:
    both = any(inside(path, one) for one in ours) and any(inside(path, one) for one in theirs)
    assert any(inside(path, one) for one in common(ours, theirs)) == both


@given(st.text("ab*", max_size=5), st.text("ab*", max_size=5), st.text("ab", max_size=6))
def test_what_a_pattern_covers_it_matches(wider: str, narrower: str, word: str) -> None:
    if covers(wider, narrower) and covers(narrower, word):
        assert covers(wider, word)
    assert covers("git push *", "git push origin*") and not covers("git push *", "git pu*")


@pytest.mark.parametrize(
    ("wider", "narrower", "both"),
    [
        ("*", "pypi:six", ("pypi:six",)), ("pypi:*", "six", ()), ("pypi:six", "six", ("pypi:six",)),
        ("s*", "six", ("six",)), ("s*x", "s*", ("s*x",)), ("npm:six", "pypi:six", ()),
        ("a-*-b", "a--b", ()),  # one name with a-b in some ecosystems, which a-*-b is not
    ],
)  # fmt: skip
def test_packages_of_both(wider: str, narrower: str, both: tuple[str, ...]) -> None:
    for one, other in ((wider, narrower), (narrower, wider)):
        assert together(network(packages_allow=(one,)), network(packages_allow=(other,))).network.packages_allow == both


def test_no_limit_on_a_rate_is_more_than_any_limit() -> None:
    unlimited, limited = network(limits=(("bytes_per_second", 0),)), network(limits=(("bytes_per_second", 9),))
    for both in (together(unlimited, limited), together(limited, unlimited)):
        assert both.network.limits == (("bytes_per_second", 9),)
    assert together(unlimited, unlimited).network.limits == (("bytes_per_second", 0),)


def test_a_command_that_runs_once_goes_with_its_own_files() -> None:
    wide = SessionPolicy(post_create=("wide",))
    own = SessionPolicy(post_create=("own",), post_create_files=("own/*",))
    both = merge([layer_of(Policy(session=wide)), layer_of(Policy(session=own))])
    assert (both.session.post_create, both.session.post_create_files) == (("wide",), ())
    both = merge([layer_of(Policy()), layer_of(Policy(session=own))])
    assert (both.session.post_create, both.session.post_create_files) == (("own",), ("own/*",))
