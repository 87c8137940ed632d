"""Whole policies, drawn so that two of them often meet, and the files that they would be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from egress_policies import networks
from hypothesis import strategies as st

from vmsandbox.policy.layer import Layer, layer_of
from vmsandbox.policy.places import common
from vmsandbox.policy.values import (
    CommandsPolicy,
    FilesystemPolicy,
    Healthcheck,
    KernelPolicy,
    Policy,
    PushPolicy,
    ResourcesPolicy,
    ReturnPolicy,
    SeccompProfile,
    SecretSource,
    SessionPolicy,
    Tmpfs,
)

PATHS = ("./", "./src", "./src/a", "./output", "./output/x", "~/", "~/.cache", "/tmp", "/tmp/x", "/opt/work", "/")
MOUNTS = ("/tmp", "/tmp/x", "/home/claude-worker/.cache", "/opt/work")
COMMANDS = ("git", "git *", "git push *", "rm -rf /", "curl *", "python", "pip install *", "*")
PACKAGES = ("six", "pypi:six", "s*", "*", "npm:left-pad", "pypi:s-_x", "s-*x", "npm:@a/*")
PROFILE = '{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"action":"SCMP_ACT_ALLOW","names":["%s"]}]}'
LIMITS = ("connections", "request_bytes", "bytes_per_second")  # in the order of the format
# Keys that a file may have although they say what is the default.
EXTRA = (
    "filesystem.project", "network.mode", "network.allowed_hosts", "network.secrets", "network.dlp.secrets",
    "network.dlp.canaries", "commands.denied", "commands.confirm_seconds", "kernel.capabilities",
    "kernel.new_privileges", "kernel.user_namespaces", "session.environment", "filesystem.denied_paths",
)  # fmt: skip


def some(values: tuple[str, ...], most: int = 3) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


def maybe(*values: object) -> st.SearchStrategy[object]:
    return st.sampled_from([None, *values])


def sizes(least: int) -> st.SearchStrategy[object]:
    return maybe(least, least + 1, least * 2, least * 3)


tmpfs = st.builds(Tmpfs, st.sampled_from(MOUNTS), st.sampled_from([4096, 5000, 100 << 20]), st.booleans())
filesystems = st.builds(
    FilesystemPolicy,
    allowed_paths=some(PATHS).map(lambda paths: common(paths, paths)),
    denied_paths=some(("./secrets/", "*.pem", "~/.ssh/", "/etc/", "[x]", "it's")),
    read_only=st.booleans(),
    output=maybe("./output", "./output/x"),
    tmpfs=st.lists(tmpfs, max_size=3, unique_by=lambda one: one.path).map(tuple),
).map(lambda one: one if one.read_only else replace(one, output=None))
secrets = st.builds(
    SecretSource,
    name=st.sampled_from(["KEY", "TOKEN"]),
    env=st.sampled_from(["A", "B"]),
    hosts=st.lists(st.sampled_from(["a.org", "*.b.org", "@pypi"]), min_size=1, max_size=2, unique=True).map(tuple),
    header=st.sampled_from(["authorization", "x-key"]),
    prefix=st.sampled_from(["", "Bearer "]),
    methods=some(("GET", "POST")),
)
sections = st.builds(
    lambda network, more: replace(network, **more),
    networks,
    st.fixed_dictionaries(
        {
            "mode": maybe("none", "restricted", "proxy", "filtered"),
            "secrets": st.lists(secrets, max_size=2, unique_by=lambda one: one.name).map(tuple),
            "packages_allow": st.none() | some(PACKAGES),
            "packages_deny": some(PACKAGES),
            "packages_minimum_age_days": st.sampled_from([0, 1.5, 7]),
            "dlp_secrets": st.booleans(),
            "dlp_canaries": st.booleans(),
            "dlp_freeze": st.booleans(),
            "limits": st.tuples(*[st.sampled_from([None, 1, 5, 9])] * 3).map(
                lambda values: tuple(one for one in zip(LIMITS, values, strict=True) if one[1] is not None)
            ),
            "resolver": some(("192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:5353")),
        }
    ),
)
commands = st.builds(
    CommandsPolicy,
    allowed=some(COMMANDS),
    denied=some(COMMANDS),
    require_confirmation=some(COMMANDS),
    confirm_seconds=st.sampled_from([60.0, 30.0, 90.0, 1.5]),
)
resources = st.builds(
    ResourcesPolicy,
    vcpus=maybe(1, 2, 4),
    memory=sizes(256 << 20),
    memory_reserved=maybe(256 << 20, 300 << 20),
    disk=sizes(128 << 20),
    write_rate=sizes(1 << 20),
    processes=maybe(16, 100),
    output=sizes(1024),
).map(lambda one: one if (one.memory_reserved or 0) <= (one.memory or 1 << 40) else replace(one, memory_reserved=None))
argv = st.sampled_from([("sh", "-c", "make all"), ("true",), ("a b", 'c"d', "ünï")])
sessions = st.builds(
    SessionPolicy,
    time=maybe(60.0, 3600.0, 90.5, 86400.0),
    idle=maybe(61.0, 1800.0),
    environment=some(("LANG", "TERM", "A_B")),
    variables=st.dictionaries(st.sampled_from(["X", "Y"]), st.sampled_from(["1", "no", "a: b # c", "ü"])).map(
        lambda one: tuple(one.items())
    ),
    post_create=st.just(()) | argv,
    post_create_files=some(("setup/*", "a.txt")),
    healthcheck=st.none() | st.builds(Healthcheck, argv, st.sampled_from([30.0, 5.0]), st.just(1.5), st.just(2)),
    schedule=maybe("*-*-* 02:00:00", "daily"),
)
reactions = st.sampled_from(["warn", "refuse"])
policies = st.builds(
    Policy,
    image=maybe("base", "python-dev"),
    isolation=maybe("emulated", "separated", "isolated"),
    filesystem=filesystems,
    network=sections,
    commands=commands,
    kernel=st.builds(
        KernelPolicy,
        seccomp=some(("read", "write"), 2).map(
            lambda names: tuple(SeccompProfile(Path(f"/p/{name}.json"), PROFILE % name) for name in names)
        ),
        capabilities=some(("chown", "kill", "setuid")),
        new_privileges=st.booleans(),
        user_namespaces=st.booleans(),
    ),
    resources=resources,
    session=sessions,
    push=st.builds(PushPolicy, reactions, reactions, reactions),
    returns=st.builds(
        ReturnPolicy,
        accept=maybe("none", "safe", "all"),
        denied_paths=some((".github/", "*.sh", "./x")),
        files=maybe(0, 10),
        bytes=maybe(0, 1000, 1 << 20),
        deletions=maybe(0, 5),
    ),
    source=st.sampled_from([Path("/p/one.yaml"), Path("/p/two.yaml"), Path("/p/three.yaml")]),
)
layers = st.builds(lambda policy, extra: said(policy, extra), policies, st.sets(st.sampled_from(EXTRA)))


def said(policy: Policy, extra: set[str] | frozenset[str] = frozenset()) -> Layer:
    """A layer of a file that has these keys too, although they say what is the default."""
    layer = layer_of(policy)
    return replace(layer, said=layer.said | extra)
