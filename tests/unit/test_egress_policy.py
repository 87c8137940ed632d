"""`sandbox.network` in a policy file: what loads and what it becomes, what is refused and what is said then."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.decide import Rules
from vmsandbox.egress.hosts import parse_destination
from vmsandbox.egress.lint import lint
from vmsandbox.egress.values import Dlp, EgressLimits, HostRule, PackageRules, SecretUse, Tls
from vmsandbox.errors import UserInputError
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.values import NetworkPolicy, NetworkRule, SecretSource

FULL = """\
sandbox:
  network:
    mode: proxy
    allowed_hosts: ["@pypi", Example.ORG., "*.example.org:8443", "192.0.2.1", "[2001:DB8::1]:443", "bücher.example"]
    denied_hosts: ["*", "evil.example.org"]
    rules:
      - host: api.example.org
        ports: [443, 443]
        methods: [get, POST]
        paths: [/v1/*, "/caf%C3%A9"]
        addresses: [10.0.0.7, "[::ffff:10.0.0.8]"]
        tls: inspect
      - {host: "@npm", addresses: [10.0.0.9]}
      - {host: pinned.example.org, tls: passthrough}
    secrets:
      - {name: KEY, from: {env: MY_KEY}, hosts: [API.example.org, "@anthropic"], header: X-Api-Key, methods: [post]}
      - {name: TOKEN, from: {file: ~/.token}, hosts: ["*.example.org"], prefix: "Bearer "}
      - {name: OTHER, from: {command: [pass, show, other]}, hosts: [example.org]}
    packages: {allow: ["pypi:six", left-pad], deny: ["npm:evil*", "npm:@scope/*"], minimum_age_days: 7}
    dlp: {canaries: false, freeze: true}
    limits: {connections: 10, idle_seconds: 30, connect_seconds: 2.5, bytes_per_second: 0}
    resolver: ["127.0.0.1:5353", "192.0.2.53", "2001:db8::53", "[2001:db8::53]:5353"]
"""


def load(folder: Path, text: str) -> NetworkPolicy:
    path = folder / "sandbox.yaml"
    path.write_text(text)
    return load_policy(path).network


def section(folder: Path, text: str) -> NetworkPolicy:
    return load(folder, f"sandbox:\n  network:\n    {text}\n")


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    assert load(tmp_path, FULL) == NetworkPolicy(
        mode="proxy",
        allowed_hosts=(
            "@pypi",
            "example.org",
            "*.example.org:8443",
            "192.0.2.1",
            "[2001:db8::1]:443",
            "xn--bcher-kva.example",
        ),
        denied_hosts=("*", "evil.example.org"),
        rules=(
            NetworkRule(
                "api.example.org", (443,), ("GET", "POST"), ("/v1/*", "/café"), ("10.0.0.7", "10.0.0.8"), "inspect"
            ),
            NetworkRule("@npm", addresses=("10.0.0.9",)),
            NetworkRule("pinned.example.org", tls="passthrough"),
        ),
        secrets=(
            SecretSource(
                "KEY", env="MY_KEY", hosts=("api.example.org", "@anthropic"), header="x-api-key", methods=("POST",)
            ),
            SecretSource("TOKEN", file="~/.token", hosts=("*.example.org",), prefix="Bearer "),
            SecretSource("OTHER", command=("pass", "show", "other"), hosts=("example.org",)),
        ),
        packages_allow=("pypi:six", "left-pad"),
        packages_deny=("npm:evil*", "npm:@scope/*"),
        packages_minimum_age_days=7,
        dlp_canaries=False,
        dlp_freeze=True,
        limits=(("connections", 10), ("bytes_per_second", 0), ("connect_seconds", 2.5), ("idle_seconds", 30.0)),
        resolver=("127.0.0.1:5353", "192.0.2.53:53", "[2001:db8::53]:53", "[2001:db8::53]:5353"),
    )


def test_what_it_becomes(tmp_path: Path) -> None:
    network = load(tmp_path, FULL)
    policy = compile_policy(network, placeholders={"KEY": "p1", "TOKEN": "p2"}, learn=True)
    assert HostRule("*.example.org", (8443,), source="network.allowed_hosts[2]") in policy.allow
    assert HostRule("2001:db8::1", (443,), source="network.allowed_hosts[4]") in policy.allow
    assert HostRule("pypi.org", (443,), ("GET", "HEAD"), ("/simple/*", "/pypi/*"), source="@pypi") in policy.allow
    assert HostRule("pinned.example.org", tls=Tls.PASSTHROUGH, source="network.rules[2]") in policy.allow
    npm = [rule for rule in policy.allow if rule.pattern == "registry.npmjs.org"]
    assert npm == [
        HostRule("registry.npmjs.org", (443,), ("GET", "HEAD"), (), ("10.0.0.9",), source="network.rules[1] @npm")
    ]
    assert policy.deny == (
        HostRule("*", (), source="network.denied_hosts[0]"),
        HostRule("evil.example.org", (), source="network.denied_hosts[1]"),
    )
    assert policy.secrets == (
        SecretUse("KEY", "p1", ("api.example.org", "api.anthropic.com"), "x-api-key", "", ("POST",)),
        SecretUse("TOKEN", "p2", ("*.example.org",), "authorization", "Bearer ", ()),
    )
    assert policy.packages == PackageRules(("pypi:six", "left-pad"), ("npm:evil*", "npm:@scope/*"), 7)
    assert policy.dlp == Dlp(True, False, True) and policy.learn
    assert policy.limits == EgressLimits(connections=10, bytes_per_second=0, connect_seconds=2.5, idle_seconds=30)
    for server in policy.resolver:
        assert parse_destination(server).port in (53, 5353)


@pytest.mark.parametrize(
    "text",
    [
        "allowed_hosts:",
        "allowed_hosts: []",
        "denied_hosts: ['*']",
        "mode: proxy",
        "rules:",
        "secrets:",
        "packages:",
        "dlp:",
        "limits:",
        "resolver:",
    ],
)
def test_blank_denies_all(tmp_path: Path, text: str) -> None:
    rules = Rules(compile_policy(section(tmp_path, text)))
    for host in ("pypi.org", "192.0.2.1", "localhost"):
        assert not rules.host(parse_destination(host, 443)).allowed


def test_a_blank_list_of_packages_allows_none_and_no_list_any(tmp_path: Path) -> None:
    assert section(tmp_path, "packages: {allow: }").packages_allow == ()
    assert section(tmp_path, "packages: {deny: [x]}").packages_allow is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "allowed_hosts: ['https://pypi.org/simple']",
            ["line 3: sandbox.network.allowed_hosts[0]", "write the host alone: 'pypi.org'"],
        ),
        ("allowed_hosts: [pypi.org/simple]", ["write the host alone: 'pypi.org'"]),
        (
            "allowed_hosts:\n      - pypi.org\n      - '*pypi.org'",
            ["line 5: sandbox.network.allowed_hosts[1]", "stands alone or as *."],
        ),
        ("allowed_hosts: [.pypi.org]", ["'*.pypi.org'"]),
        ("allowed_hosts: ['@pipy']", ["did you mean '@pypi'"]),
        ("allowed_hosts: ['@PyPI']", ["did you mean '@pypi'"]),
        ("allowed_hosts: ['@nothing-like-it']", ["@github"]),
        ("allowed_hosts: ['127.1']", ["four decimal numbers"]),
        ("allowed_hosts: [straße.de]", ["more than one ASCII form"]),
        ("allowed_hosts: ['pypi.org:https']", ["port"]),
        ("allowed_hosts: [443]", ["allowed_hosts[0]"]),
        ("allowed_hosts: [a_b.example]", ["letters, digits and hyphens"]),
        ("allowed_hosts: pypi.org", ["line 3: sandbox.network.allowed_hosts"]),
        ("allowed_host: []", ["did you mean 'allowed_hosts'"]),
        ("denied_hosts: ['evil']\n    denied_hosts: []", ["already given in line 3"]),
        ("mode: filterd", ["did you mean 'filtered'"]),
        ("rules: [{hosts: a.org}]", ["sandbox.network.rules[0].hosts", "did you mean 'host'"]),
        ("rules: [{methods: [GET]}]", ["rules[0].host"]),
        (
            "rules:\n      - host: a.org\n        method: [GET]",
            ["line 5: sandbox.network.rules[0].method", "did you mean 'methods'"],
        ),
        ("rules: [{host: 'a.org:443'}]", ["rules[0].host", "ports: [443]"]),
        ("rules: [{host: a.org, ports: []}]", ["rules[0].ports"]),
        ("rules: [{host: a.org, ports: [0]}]", ["rules[0].ports[0]"]),
        ("rules: [{host: a.org, ports: [true]}]", ["rules[0].ports[0]"]),
        ("rules: [{host: a.org, methods: }]", ["rules[0].methods"]),
        ("rules: [{host: a.org, paths: , ports: [443]}]", ["rules[0].paths"]),
        ("rules: [{host: a.org, methods: []}]", ["rules[0].methods"]),
        ("rules: [{host: a.org, methods: [CONNECT]}]", ["rules[0].methods[0]"]),
        ("rules: [{host: a.org, methods: ['GET POST']}]", ["rules[0].methods[0]"]),
        ("rules: [{host: a.org, paths: [v1/x]}]", ["rules[0].paths[0]", "begins with /"]),
        ("rules: [{host: a.org, paths: ['/x?y=1']}]", ["rules[0].paths[0]"]),
        ("rules: [{host: a.org, paths: ['/x/../y']}]", ["rules[0].paths[0]"]),
        ("rules: [{host: a.org, paths: []}]", ["rules[0].paths"]),
        ("rules: [{host: a.org, addresses: [localhost]}]", ["rules[0].addresses[0]"]),
        ("rules: [{host: a.org, addresses: ['10.0.0.1:80']}]", ["rules[0].addresses[0]"]),
        ("rules: [{host: a.org, addresses: ['fe80::1%eth0']}]", ["rules[0].addresses[0]"]),
        ("rules: [{host: a.org, tls: passthru}]", ["rules[0].tls", "did you mean 'passthrough'"]),
        ("rules: [{host: a.org, tls: passthrough, paths: [/x]}]", ["rules[0]", "not seen"]),
        ("rules: [{host: '@pypi', paths: [/x]}]", ["rules[0]", "paths of its own"]),
        ("rules: [{host: '@pypi', methods: [POST]}]", ["rules[0]", "nothing of @pypi is left"]),
        ("rules: [{host: '@pypi', ports: [80]}]", ["rules[0]", "nothing of @pypi is left"]),
        ("secrets: [{name: K, from: {env: A, file: b}, hosts: [a.org]}]", ["secrets[0].from", "exactly one"]),
        ("secrets: [{name: K, from: {}, hosts: [a.org]}]", ["secrets[0].from", "exactly one"]),
        ("secrets: [{name: K, from: sk-live-1234, hosts: [a.org]}]", ["secrets[0].from"]),
        ("secrets: [{name: K, value: x, hosts: [a.org]}]", ["secrets[0].value"]),
        ("secrets: [{name: K, from: {env: A}, hosts: []}]", ["secrets[0].hosts"]),
        ("secrets: [{name: K, from: {env: A}, hosts: ['*']}]", ["secrets[0].hosts[0]", "named"]),
        ("secrets: [{name: 'K=x', from: {env: A}, hosts: [a.org]}]", ["secrets[0].name"]),
        ("secrets: [{name: K, from: {env: A}, hosts: [a.org], header: Host}]", ["secrets[0].header"]),
        ("secrets: [{name: K, from: {env: A}, hosts: [a.org], header: 'x: y'}]", ["secrets[0].header"]),
        ("secrets: [{name: K, from: {command: pass show x}, hosts: [a.org]}]", ["secrets[0].from.command"]),
        ('secrets: [{name: K, from: {env: A}, hosts: [a.org], prefix: "a\\r\\nb"}]', ["secrets[0].prefix"]),
        (
            "secrets: [{name: K, from: {env: A}, hosts: [a.org]}, {name: k, from: {env: B}, hosts: [a.org]}]",
            ["there twice"],
        ),
        ("packages: {allow: ['ruby:x']}", ["packages.allow[0]"]),
        ("packages: {minimum_age_days: -1}", ["minimum_age_days"]),
        ("dlp: {secret: true}", ["did you mean 'secrets'"]),
        ("dlp: {secrets: 'yes'}", ["dlp.secrets"]),
        ("limits: {connections: 0}", ["limits.connections"]),
        ("limits: {connection: 1}", ["did you mean 'connections'"]),
        ("limits: {idle_seconds: .inf}", ["limits.idle_seconds"]),
        ("limits: {idle_seconds: .nan}", ["limits.idle_seconds"]),
        ("resolver: [dns.example]", ["resolver[0]", "IP address"]),
        ("resolver: ['192.0.2.1:0']", ["resolver[0]"]),
        ("resolver: ['*']", ["resolver[0]"]),
    ],
)
def test_what_is_refused_and_where_it_is(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(UserInputError) as caught:
        section(tmp_path, text)
    told = caught.value.brief + caught.value.details
    assert str(tmp_path / "sandbox.yaml") in told
    for part in said:
        assert part in told, told


def test_a_secret_that_was_written_where_its_source_belongs_is_not_repeated(tmp_path: Path) -> None:
    for value in (
        "sk-live-" + "a1B2" * 20,
        "{value: sk-live-1234}",
        "sk-live-1234",
        "[sk-live-1234]",
        "{env: 'sk-live-1234'}",
    ):
        with pytest.raises(UserInputError) as caught:
            section(tmp_path, f"secrets: [{{name: K, from: {value}, hosts: [a.org]}}]")
        assert "sk-live" not in caught.value.brief + caught.value.details


# --- lint -------------------------------------------------------------------------------------------------------------


def found(*hosts: str, **more: object) -> str:
    network = NetworkPolicy(allowed_hosts=hosts, **more)  # type: ignore[arg-type]
    return "\n".join(f"{one.where} {'WARNING ' if one.warning else ''}{one.text}" for one in lint(network))


def test_what_is_odd_is_told() -> None:
    get = NetworkRule("a.org", (443,), ("GET",))
    assert "allowed_hosts[0] WARNING allows every host" in found("*")
    assert "allowed_hosts[0] WARNING allows nothing of a.org" in found("a.org", denied_hosts=("a.org",))
    assert "allowed_hosts[0] WARNING allows nothing of *.a.org" in found("*.a.org", denied_hosts=("*.a.org",))
    assert "allowed_hosts[1] allows a.org a second time" in found("a.org", "a.org")
    assert "denied_hosts[0] denies evil.org, which nothing allows" in found("a.org", denied_hosts=("evil.org",))
    assert "denied_hosts[0] denies a.org:22" in found("a.org", denied_hosts=("a.org:22",))
    assert "network.rules[0] narrows nothing" in found("a.org", rules=(get,))
    assert "allowed_hosts[1] WARNING allows all of github.com, so that @github" in found("@github", "github.com")
    assert "@github allows what the tool needs" in found("github.com")
    assert "has also files.pythonhosted.org" in found("pypi.org")
    assert "leaves b.a.org without port 80, 443, which *.a.org would allow" in found("*.a.org", "b.a.org:8443")
    assert "WARNING 10.0.0.1 is a private address" in found("10.0.0.1")
    assert "passes through unseen" in found(rules=(get, NetworkRule("a.org", tls="passthrough")))
    key = SecretSource("KEY", env="K", hosts=("api.org",))
    assert "secrets[0] WARNING KEY is for api.org, which nothing allows" in found("a.org", secrets=(key,))
    assert "which is passed through" in found(rules=(NetworkRule("api.org", tls="passthrough"),), secrets=(key,))


def test_what_is_right_is_not() -> None:
    key = SecretSource("KEY", env="K", hosts=("api.org",))
    rules = (NetworkRule("b.a.org", (443,), ("GET",)), NetworkRule("10.0.0.1", addresses=("10.0.0.1",)))
    hosts = ("@pypi", "@npm", "@github", "@debian", "@anthropic", "*.a.org", "api.org")
    assert found(*hosts, denied_hosts=("*", "x.a.org"), rules=rules, secrets=(key,)) == ""
    assert found("*.a.org", denied_hosts=("*.b.a.org",)) == ""
