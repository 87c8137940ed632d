"""A policy written as a file is the same policy when it is read again."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from whole_policies import policies

from vmsandbox.policy.format import words
from vmsandbox.policy.format.rendering import plain_duration, plain_policy, plain_size, render_policy
from vmsandbox.policy.load import load_layer, load_policy
from vmsandbox.policy.values import KernelPolicy, Policy, SeccompProfile


def readable(policy: Policy, folder: Path) -> Policy:
    """The same with profiles that are there."""
    profiles = tuple(SeccompProfile(folder / one.source.name, one.text) for one in policy.kernel.seccomp)
    for one in profiles:
        one.source.write_text(one.text)
    return replace(policy, kernel=replace(policy.kernel, seccomp=profiles), source=folder / "sandbox.yaml")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies)
def test_parse_render_parse_is_the_identity(drawn: Policy) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = readable(drawn, folder)
        assert policy.source is not None
        policy.source.write_text(render_policy(policy))
        layer = load_layer(policy.source)
        assert layer.policy == policy
        assert render_policy(layer.policy) == policy.source.read_text()
        assert {one for one in layer.said if "." not in one} == set(plain_policy(policy))


def test_what_is_the_default_is_not_written() -> None:
    assert render_policy(Policy()) == "sandbox: {}\n"


def test_a_profile_is_named_from_where_the_file_will_be(tmp_path: Path) -> None:
    profile = SeccompProfile(tmp_path / "sub/x.json", "{}")
    policy = Policy(kernel=KernelPolicy(seccomp=(profile,)))
    whole = f"{tmp_path}/sub/x.json"
    places = ((tmp_path, "./sub/x.json"), (tmp_path / "sub", "./x.json"), (None, whole), (tmp_path / "other", whole))
    for folder, expected in places:
        assert yaml.safe_load(render_policy(policy, folder))["sandbox"]["kernel"]["seccomp"] == [expected]


@given(st.integers(0, words.MAX_SIZE))
def test_sizes(size: int) -> None:
    assert words.size(plain_size(size)) == size


@given(st.integers(1, 10**8).map(lambda one: one / 4) | st.integers(1, 10**7).map(float))
def test_durations(seconds: float) -> None:
    if seconds <= words.MAX_SECONDS:
        assert words.duration(plain_duration(seconds)) == seconds


def test_a_policy_of_every_key_names_every_key(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(PROFILE)
    file = tmp_path / "sandbox.yaml"
    file.write_text(EVERY_KEY)
    policy = load_policy(file)
    again = tmp_path / "again.yaml"
    again.write_text(render_policy(policy))
    assert replace(load_policy(again), source=file) == policy
    assert plain_policy(policy) == yaml.safe_load(render_policy(policy))["sandbox"]
    assert set(plain_policy(policy)) == set(yaml.safe_load(EVERY_KEY)["sandbox"])


PROFILE = '{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}'
EVERY_KEY = """\
sandbox:
  image: python-dev
  isolation: separated
  filesystem:
    allowed_paths: [./src, ~/.cache, /tmp]
    denied_paths: [./secrets/, "*.pem"]
    project: read-only
    output: ./output/
    tmpfs: [{path: ~/.cache, size: 50m, exec: true}]
  network: {mode: proxy, allowed_hosts: ["@pypi"], rules: [{host: a.org, methods: [get]}], packages: {allow: [six]}}
  commands: {allowed: [git *], denied: [curl *], require_confirmation: [git push *], confirm_seconds: 2m}
  kernel: {seccomp: p.json, capabilities: [CAP_CHOWN], new_privileges: true, user_namespaces: true}
  resources: {vcpus: 3, memory: 1.5G, memory_reserved: 512MiB, disk: 4g, write_rate: 1m, processes: 100, output: 64k}
  session:
    time: 1h30m
    idle: 90
    environment: [LANG]
    variables: {A: "1"}
    post_create: [make, all]
    post_create_files: [Makefile, "setup/**"]
    healthcheck: {test: make check, interval: 1m, timeout: 2.5, retries: 5}
    schedule: daily
  push: {secrets: refuse, instructions: refuse, agent_configuration: refuse}
  return: {accept: none, denied_paths: [.github/], files: 1, bytes: 1k, deletions: 0}
"""
