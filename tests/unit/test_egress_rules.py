"""What the rules decide: precision, deny, narrowing, paths that are spelt otherwise, and what a refusal tells."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from egress_policies import HOSTS, METHODS, PATHS, PORTS, asked, networks, rules_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsandbox.egress.bundles import bundles
from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.hosts import parse_destination, pattern_matches, precision
from vmsandbox.egress.paths import BadPathError, glob_matches, parse_glob, readings
from vmsandbox.egress.values import Destination, Dlp, EgressPolicy, HostRule, Tls
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.values import NetworkPolicy, NetworkRule


def to(text: str) -> Destination:
    return parse_destination(text, 443)


def allowing(
    *hosts: str, deny: tuple[str, ...] = (), rules: tuple[NetworkRule, ...] = (), learn: bool = False
) -> Rules:
    return rules_of(NetworkPolicy(allowed_hosts=hosts, denied_hosts=deny, rules=rules), learn)


@pytest.mark.parametrize(
    "network", [NetworkPolicy(), NetworkPolicy(denied_hosts=("*",)), NetworkPolicy(mode="restricted")]
)
def test_nothing_allowed_is_everything_denied(network: NetworkPolicy) -> None:
    rules = rules_of(network)
    for where, method, path in asked():
        assert not rules.host(where).allowed and not rules.request(where, method, path).allowed
        assert not rules.name(where.host).allowed
    assert not Rules(EgressPolicy()).host(to("pypi.org")).allowed


@pytest.mark.parametrize(
    ("allow", "deny", "allowed", "refused"),
    [
        (["allowed.com"], [], ["allowed.com", "allowed.com:80"],
         ["allowed.com.evil", "evilallowed.com", "www.allowed.com", "com", "allowed.com:8443", "allowed.com:22"]),
        (["*.allowed.com"], [], ["a.allowed.com", "a.b.allowed.com"], ["allowed.com", "evilallowed.com"]),
        (["allowed.com:8443"], [], ["allowed.com:8443"], ["allowed.com", "allowed.com:80"]),
        (["allowed.com"], ["*"], ["allowed.com"], ["other.com"]),
        (["*"], ["evil.com"], ["other.com", "8.8.8.8"], ["evil.com", "evil.com:80", "evil.com:8443"]),
        (["*"], ["*"], [], ["other.com"]),
        (["*.a.org", "b.a.org"], ["*.a.org"], ["b.a.org"], ["c.a.org"]),
        (["*.a.org"], ["b.a.org"], ["c.a.org"], ["b.a.org"]),
        (["b.a.org"], ["b.a.org"], [], ["b.a.org"]),
        (["*.b.a.org"], ["*.a.org"], ["x.b.a.org"], ["b.a.org", "x.a.org"]),
        (["*.a.org"], ["*.b.a.org"], ["b.a.org", "x.a.org"], ["x.b.a.org"]),
        (["a.org"], ["a.org:80"], ["a.org"], ["a.org:80"]),
        (["192.0.2.1"], [], ["192.0.2.1"], ["192.0.2.2", "[::192.0.2.1]"]),
        (["[2001:db8::1]:443"], [], ["[2001:db8::1]"], ["[2001:db8::1]:80", "[2001:db8::2]"]),
        (["@pypi"], ["@pypi"], [], ["pypi.org", "files.pythonhosted.org"]),
        (["*"], ["@pypi"], ["other.org"], ["pypi.org", "pypi.org:80"]),
        (["*:8443"], ["@pypi", "evil.org"], ["other.org:8443"], ["pypi.org:8443", "evil.org:8443"]),
    ],
)  # fmt: skip
def test_which_hosts(allow: list[str], deny: list[str], allowed: list[str], refused: list[str]) -> None:
    rules = allowing(*allow, deny=tuple(deny))
    for text in allowed:
        decision = rules.host(to(text))
        assert decision.allowed and decision.matched is not None and rules.name(to(text).host).allowed, text
    for text in refused:
        decision = rules.host(to(text))
        assert not decision.allowed and decision.rule and decision.reason.isprintable(), text


@settings(deadline=None)
@given(networks, st.sampled_from(HOSTS), st.sampled_from(PORTS))
def test_deciding_is_as_it_is_written_down(network: NetworkPolicy, host: str, port: int) -> None:
    """The definition word for word, without an index: the most precise pattern decides, deny wins where equal."""
    policy = compile_policy(network)
    allow = [rule for rule in policy.allow if pattern_matches(rule.pattern, host)]
    best = max((precision(rule.pattern) for rule in allow), default=None)
    here = [rule for rule in allow if precision(rule.pattern) == best and port in rule.ports]
    deny = [
        rule for rule in policy.deny if pattern_matches(rule.pattern, host) and (not rule.ports or port in rule.ports)
    ]
    expected = bool(here) and not any(best is None or precision(rule.pattern) >= best for rule in deny)
    assert Rules(policy).host(Destination(host, port)).allowed is expected


@settings(deadline=None)
@given(networks, st.sampled_from(HOSTS), st.sampled_from(PORTS), st.sampled_from(METHODS), st.sampled_from(PATHS))
def test_a_request_needs_its_host_and_a_name_needs_a_port(
    network: NetworkPolicy, host: str, port: int, method: str, path: str
) -> None:
    rules = rules_of(network)
    where = Destination(host, port)
    if rules.request(where, method, path).allowed:
        assert rules.host(where).allowed
    assert rules.name(host).allowed == any(rules.host(Destination(host, one)).allowed for one in (22, 79, *PORTS, 8442))


def test_rules_narrow_and_add_up() -> None:
    rules = allowing(
        "*",
        rules=(
            NetworkRule("api.example.org", (443,), ("GET",), ("/v1/*",)),
            NetworkRule("api.example.org", (443,), ("POST",), ("/v1/messages",)),
        ),
    )
    where = to("api.example.org")
    assert (
        rules.request(where, "GET", "/v1/models?x=/y").allowed and rules.request(where, "POST", "/v1/messages").allowed
    )
    for method, path in [("POST", "/v1/files"), ("GET", "/v2"), ("DELETE", "/v1/messages"), ("get", "/v1/x")]:
        assert not rules.request(where, method, path).allowed, (method, path)
    assert not rules.host(to("api.example.org:80")).allowed  # `*` adds nothing to what is narrowed
    assert rules.request(to("other.org"), "DELETE", "/").allowed


def test_a_plain_allow_beside_a_rule_allows_both() -> None:
    rules = allowing("a.org", rules=(NetworkRule("a.org", (8443,), ("GET",)),))
    assert rules.request(to("a.org"), "DELETE", "/").allowed
    assert (
        rules.request(to("a.org:8443"), "GET", "/").allowed and not rules.request(to("a.org:8443"), "PUT", "/").allowed
    )


@pytest.mark.parametrize(
    "path",
    [
        "/simple/../admin", "/simple/..", "/simple/./x", "/simple/..;/admin", "/simple/..;x=1/admin", "/simple/.;/x",
        "/simple/%2e%2e/admin", "/simple/.%2E/admin", "/simple/..%2fadmin", "/simple/%2e%2e%2fadmin",
        "/simple/..%2Fadmin",
        "/simple/%252e%252e/admin", "/simple/%252fadmin", "/simple/%25%32%66", "/simple/..%5cadmin",
        "/simple\\..\\admin",
        "/simple//admin", "//simple/x", "/simple/%2fadmin", "/simple/x%2f%2fy", "/simple/%00", "/simple/\x00",
        "/simple/%0d%0aHost:",
        "/simple/%c0%af", "/simple/%ff", "/simple/%", "/simple/%2", "/simple/%zz", "/simple/%u002f", "/simple/x#y",
        "/simple/%23",
        "/simple/%3fx", "/simple/\u00e9", "/simple/ x", "simple/x", "", "*", "http://pypi.org/simple/", "?/simple/",
        "/simple",
        "/Simple/x", "/admin/simple/", "/simple%2fx", "/x/%2e%2e/simple/",
    ],
)  # fmt: skip
def test_a_rule_about_paths_cannot_be_dodged(path: str) -> None:
    rules = allowing(rules=(NetworkRule("pypi.org", paths=("/simple/*",)),))
    decision = rules.request(to("pypi.org"), "GET", path)
    assert not decision.allowed and decision.reason.isprintable()


@pytest.mark.parametrize("path", ["/simple/", "/simple/a/b", "/simple/%61", "/simple/a%20b", "/simple/...",
"/simple/.x", "/simple/a;b",
                                  "/simple/?x=/../y", "/simple/%C3%A9", "/%73imple/x", "/simple/a:b@c"])  # fmt: skip
def test_a_rule_about_paths_lets_its_paths_through(path: str) -> None:
    assert allowing(rules=(NetworkRule("pypi.org", paths=("/simple/*",)),)).request(to("pypi.org"), "GET", path).allowed


def test_where_no_path_is_asked_of_any_is_right() -> None:
    for path in ("/a%2fb", "/../x", "//", "*", "/@types%2fnode"):
        assert allowing("a.org").request(to("a.org"), "OPTIONS", path).allowed


def test_an_encoded_slash_is_allowed_where_both_its_meanings_are() -> None:
    path = "/@types%2fnode"
    for globs, expected in [
        (("/@types/*",), False),
        (("/@types%2f*",), False),
        (("/@types/*", "/@types%2F*"), True),
        (("/@*",), True),
    ]:
        rules = allowing(rules=(NetworkRule("npm.example", paths=tuple(map(parse_glob, globs))),))
        assert rules.request(to("npm.example"), "GET", path).allowed is expected, globs


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["/", "x", "y", ".", "..", "%2e", "%2F", "%25", "2f", ";", "*", "%"]), max_size=8).map(
        "".join
    )
)
def test_no_reading_can_be_read_on(path: str) -> None:
    try:
        found = readings("/" + path)
    except BadPathError:
        return
    for reading in found:
        segments = reading.replace("%2F", "/").split("/")
        assert "//" not in reading and not {".", ".."} & {one.partition(";")[0] for one in segments}
        if "%2F" not in reading:
            assert "%2" not in reading and "%25" not in reading


@settings(deadline=None)
@given(st.text("/xy*", max_size=6).map(lambda one: "/" + one), st.text("/xy", max_size=8))
def test_globs_match_as_a_regular_expression_would(glob: str, reading: str) -> None:
    import re

    pattern = "".join(".*" if char == "*" else re.escape(char) for char in glob)
    assert glob_matches(glob, reading) is (re.fullmatch(pattern, reading) is not None)


def test_globs_are_matched_in_linear_time() -> None:
    import time

    began = time.process_time()
    assert not glob_matches("*a" * 40 + "b", "a" * 60_000)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "glob", ["x", "", "/a b", "/a?b", "/a#", "/a//b", "/a/../b", "/a%2a", "/%zz/%2e%2e/", "/a\\b", "/%ff", "/%252f"]
)
def test_globs_that_are_none(glob: str) -> None:
    with pytest.raises(BadPathError):
        parse_glob(glob)


@pytest.mark.parametrize("method", ["", "GE T", "GET\r\n", "CONNECT", "connect", "TRACE", "G\x00", "É", "A" * 65])
def test_methods_that_are_not_passed_on(method: str) -> None:
    decision = allowing("a.org").request(to("a.org"), method, "/")
    assert not decision.allowed and decision.rule == "bad-method" and decision.reason.isascii()


# --- refusals ---------------------------------------------------------------------------------------------------------


def with_remedy(network: NetworkPolicy, remedy: str, folder: Path) -> NetworkPolicy:
    file = folder / "remedy.yaml"
    file.write_text(remedy)
    added = load_policy(file).network
    return dataclasses.replace(
        network, allowed_hosts=network.allowed_hosts + added.allowed_hosts, rules=network.rules + added.rules
    )


@settings(max_examples=150, deadline=None)
@given(network=networks, host=st.sampled_from(HOSTS), port=st.sampled_from(PORTS), method=st.sampled_from(METHODS),
       path=st.sampled_from(PATHS))  # fmt: skip
def test_what_a_refusal_tells_to_add_is_enough(
    tmp_path_factory: pytest.TempPathFactory, network: NetworkPolicy, host: str, port: int, method: str, path: str
) -> None:
    folder = tmp_path_factory.mktemp("remedy")
    where = Destination(host, port)
    for _ in range(2):  # first the host, then perhaps the method
        decision = rules_of(network).request(where, method, path)
        if decision.allowed:
            return
        assert decision.rule and decision.reason.isprintable() and decision.rule in decision.reason + "default-deny"
        if not decision.remedy:
            assert decision.rule == "ambiguous-path" or decision.rule.startswith("network.denied_hosts")
            return
        network = with_remedy(network, decision.remedy, folder)
    assert rules_of(network).request(where, method, path).allowed


def test_an_address_is_allowed_by_its_remedy_alone(tmp_path: Path) -> None:
    network = NetworkPolicy(allowed_hosts=("a.org", "192.168.1.5"))
    for host, address in [("a.org", "10.0.0.1"), ("a.org", "fd00::1"), ("192.168.1.5", "192.168.1.5")]:
        refused = rules_of(network).address(to(host), address, ())
        assert not refused.allowed and refused.rule == "private-address"
        rules = rules_of(with_remedy(network, refused.remedy, tmp_path))
        assert rules.address(to(host), address, ()).allowed and rules.addresses(to(host)) == (address,)
        assert not rules.address(to(host), "10.0.0.2", ()).allowed
        assert not rules.address(to(host), "8.8.8.8", ()).allowed  # what the policy names is all that is dialled


def test_addresses_are_judged_as_they_are_dialled() -> None:
    rules = allowing("a.org", learn=True)
    for address in (
        "127.0.0.1",
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "64:ff9b::a00:1",
        "fe80::1%eth0",
        "",
        "a.org",
    ):
        decision = rules.address(to("a.org"), address, ())
        assert not decision.allowed and decision.reason, address
    assert rules.address(to("a.org"), "151.101.0.223", ()).allowed
    assert not rules.address(to("a.org"), "151.101.0.223", ("151.101.0.223",)).allowed
    assert not allowing("*").address(to("10.0.0.1"), "10.0.0.1", ()).allowed
    assert not rules.address(to("unknown.org"), "127.0.0.1", ()).allowed  # learning never reaches addresses


def test_a_path_that_no_glob_can_name_has_no_remedy() -> None:
    rules = allowing(rules=(NetworkRule("a.org", paths=("/x",)),))
    for path in ("/a*b", "/a%2Ab", "/" + "a" * 600):
        decision = rules.request(to("a.org"), "GET", path)
        assert not decision.allowed and not decision.remedy


def test_the_default_written_down_is_the_default() -> None:
    assert allowing("a.org", deny=("*",)).host(to("b.org")).rule == "default-deny"
    assert allowing("*", deny=("*",)).host(to("b.org")).rule == "network.denied_hosts[0]"


# --- learning ---------------------------------------------------------------------------------------------------------


def test_learning_lets_through_what_only_the_default_refuses() -> None:
    narrowed = NetworkRule("narrow.org", (443,), ("GET",), ("/x",))
    rules = allowing("a.org", deny=("*", "evil.org", "*.bad.org", "*:25"), rules=(narrowed,), learn=True)
    for text in ("new.org", "new.org:8443", "8.8.8.8"):
        assert rules.host(to(text)).rule == "learn" and rules.request(to(text), "PUT", "/").allowed, text
        assert rules.name(to(text).host).allowed and rules.inspects(to(text))
    for text in ("evil.org", "evil.org:8443", "x.bad.org", "narrow.org:80", "a.org:8443"):
        assert not rules.host(to(text)).allowed, text
    assert (
        not rules.request(to("narrow.org"), "POST", "/x").allowed
        and not rules.request(to("narrow.org"), "GET", "/y").allowed
    )
    assert rules.host(to("a.org")).rule == "network.allowed_hosts[0]"


@settings(deadline=None)
@given(networks)
def test_learning_changes_nothing_that_a_rule_decides(network: NetworkPolicy) -> None:
    plain, learning = rules_of(network), rules_of(network, learn=True)
    for host, port in itertools.product(HOSTS, PORTS):
        before, after = plain.host(Destination(host, port)), learning.host(Destination(host, port))
        if before != after:
            by_default = before.rule == "default-deny" or before.reason.endswith("(*)")
            assert not before.allowed and after.rule == "learn" and by_default


# --- what is looked into ----------------------------------------------------------------------------------------------


def test_what_tls_is_looked_into() -> None:
    nothing = EgressPolicy(dlp=Dlp(secrets=False, canaries=False))

    def inspects(policy: EgressPolicy = nothing, **rule: object) -> bool:
        one = HostRule("a.org", **rule)  # type: ignore[arg-type]
        return Rules(dataclasses.replace(policy, allow=(one, *policy.allow))).inspects(to("a.org"))

    assert inspects(), "unseen, a request's Host could be any that the same server has"
    assert inspects(tls=Tls.INSPECT) and inspects(methods=("GET",)) and inspects(paths=("/x",))
    assert not inspects(tls=Tls.PASSTHROUGH) and not inspects(EgressPolicy(), tls=Tls.PASSTHROUGH)
    assert inspects(tls=Tls.PASSTHROUGH, paths=("/x",))  # what is narrowed is never passed through unseen
    other = dataclasses.replace(nothing, allow=(HostRule("a.org", tls=Tls.INSPECT),))
    assert inspects(other, tls=Tls.PASSTHROUGH)


# --- bundles ----------------------------------------------------------------------------------------------------------

INDEXES = ("pypi", "npm", "debian", "crates", "go", "rubygems")


def test_package_indexes_can_only_be_read() -> None:
    for name in INDEXES:
        rules = allowing(f"@{name}")
        for rule in bundles()[name]:
            assert set(rule.methods) == {"GET", "HEAD"} and rule.source == f"@{name}"
            for method, port in itertools.product(("POST", "PUT", "PATCH", "DELETE"), rule.ports):
                assert not rules.request(Destination(rule.pattern, port), method, "/simple/x").allowed


@pytest.mark.parametrize(
    ("bundle", "allowed", "refused"),
    [
        ("@pypi", ["GET pypi.org/simple/six/", "GET pypi.org/pypi/six/json",
        "GET files.pythonhosted.org/packages/x/six.whl"],
         ["POST upload.pypi.org/legacy/", "GET pypi.org/manage/account/", "POST pypi.org/simple/six/",
         "GET test.pypi.org/simple/"]),
        ("@npm", ["GET registry.npmjs.org/@types%2fnode", "GET registry.npmjs.org/left-pad/-/left-pad-1.0.0.tgz"],
         ["PUT registry.npmjs.org/evil", "GET npmjs.org/"]),
        ("@github", ["GET github.com/o/r/info/refs?service=git-upload-pack", "POST github.com/o/r/git-upload-pack",
                     "POST github.com/o/r.git/git-upload-pack", "GET github.com/o/r/releases/download/v1/x.tgz",
                     "GET raw.githubusercontent.com/o/r/main/C%23/x", "GET codeload.github.com/o/r/tar.gz/main",
                     "GET api.github.com/repos/o/r/releases/latest"],
         ["POST github.com/o/r/git-receive-pack", "POST github.com/git-upload-pack/../o/r/git-receive-pack",
          "POST github.com/o/r/git-receive-pack?/git-upload-pack",
          "POST github.com/o/r/git-receive-pack%3f/git-upload-pack",
          "POST github.com/session", "POST api.github.com/repos/o/r/issues", "PATCH api.github.com/gists/1",
          "GET api.github.com/user",
          "POST api.github.com/graphql", "POST uploads.github.com/repos/o/r/releases/1/assets",
          "PUT api.github.com/repos/o/r/contents/x",
          "GET gist.github.com/x"]),
        ("@gitlab", ["POST gitlab.com/g/s/p.git/git-upload-pack",
        "GET gitlab.com/g/p.git/info/refs?service=git-upload-pack"],
         ["POST gitlab.com/g/p.git/git-receive-pack", "POST gitlab.com/api/v4/projects/1/issues",
         "GET gitlab.com/api/v4/user"]),
        ("@anthropic", ["POST api.anthropic.com/v1/messages?beta=true",
        "POST api.anthropic.com/v1/messages/count_tokens",
                        "GET api.anthropic.com/v1/models"],
         ["POST api.anthropic.com/v1/files", "POST api.anthropic.com/v1/messages/batches",
         "GET console.anthropic.com/"]),
        ("@openai", ["POST api.openai.com/v1/responses", "POST api.openai.com/v1/chat/completions",
        "GET api.openai.com/v1/models"],
         ["POST api.openai.com/v1/files", "POST api.openai.com/v1/fine_tuning/jobs",
         "DELETE api.openai.com/v1/models/x"]),
        ("@crates", ["GET index.crates.io/si/x/six",
        "GET static.crates.io/crates/x/x-1.crate"], ["PUT crates.io/api/v1/crates/new"]),
        ("@go", ["GET proxy.golang.org/rsc.io/quote/@v/list",
        "GET sum.golang.org/lookup/x"], ["POST proxy.golang.org/x"]),
        ("@rubygems", ["GET rubygems.org/gems/x.gem",
        "GET index.rubygems.org/versions"], ["POST rubygems.org/api/v1/gems"]),
    ],
)  # fmt: skip
def test_what_a_bundle_is_for(bundle: str, allowed: list[str], refused: list[str]) -> None:
    rules = allowing(bundle, deny=("*",))
    for text in [*allowed, *refused]:
        method, _, url = text.partition(" ")
        host, slash, path = url.partition("/")
        assert rules.request(to(host), method, slash + path).allowed is (text in allowed), text


def test_debian_is_read_in_plain_text_too() -> None:
    rules = allowing("@debian")
    assert rules.request(to("deb.debian.org:80"), "GET", "/debian/dists/trixie/InRelease").allowed
    assert not rules.request(to("deb.debian.org:80"), "POST", "/debian/").allowed


def test_a_rule_narrows_a_bundle() -> None:
    rules = allowing(
        rules=(NetworkRule("@github", methods=("POST",)), NetworkRule("@debian", ports=(80,), addresses=("10.0.0.7",)))
    )
    assert rules.request(to("github.com"), "POST", "/o/r/git-upload-pack").allowed
    assert not rules.request(to("github.com"), "GET", "/o/r/info/refs").allowed
    assert not rules.host(to("codeload.github.com")).allowed and not rules.host(to("deb.debian.org")).allowed
    assert rules.addresses(to("deb.debian.org:80")) == ("10.0.0.7",)
