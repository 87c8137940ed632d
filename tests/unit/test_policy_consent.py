"""A policy that lies in a project is its author's: what reaches into the host needs a person who names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsandbox.policy.load import load_policy
from vmsandbox.policy.merging.consent import reaches_into_host

HARMLESS = "mode: proxy, allowed_hosts: ['@pypi', example.org], rules: [{host: a.org, methods: [GET]}]"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("secrets: [{name: K, from: {env: HOME}, hosts: [a.org]}]", "network.secrets[0]: K from the host's env HOME"),
        ("secrets: [{name: K, from: {file: ~/.ssh/id_rsa}, hosts: [a.org]}]", "file ~/.ssh/id_rsa"),
        ("secrets: [{name: K, from: {command: [sh, -c, x]}, hosts: [a.org]}]", "command sh -c x"),
        ("rules: [{host: a.org, addresses: [10.0.0.1]}]", "network.rules[0].addresses: 10.0.0.1"),
        ("resolver: ['127.0.0.1:5353']", "network.resolver: 127.0.0.1:5353"),
    ],
)
def test_what_reaches_into_the_host_is_named(tmp_path: Path, asked: str, said: str) -> None:
    file = tmp_path / "sandbox.yaml"
    file.write_text(f"sandbox: {{network: {{mode: proxy, allowed_hosts: [a.org], {asked}}}}}")
    (one,) = reaches_into_host(load_policy(file))
    assert said in one


def test_public_hosts_do_not(tmp_path: Path) -> None:
    file = tmp_path / "sandbox.yaml"
    file.write_text(f"sandbox: {{network: {{{HARMLESS}}}}}")
    assert reaches_into_host(load_policy(file)) == []


def test_variables_of_the_host_are_a_persons_to_give(tmp_path: Path) -> None:
    file = tmp_path / "sandbox.yaml"
    file.write_text("sandbox: {session: {environment: [LANG, AWS_SECRET_ACCESS_KEY], variables: {A: b}}}")
    policy = load_policy(file)
    (one,) = reaches_into_host(policy, network=False)
    assert "session.environment" in one and "AWS_SECRET_ACCESS_KEY" in one
    file.write_text("sandbox: {network: {secrets: [{name: K, from: {env: HOME}, hosts: [a.org]}]}}")
    assert reaches_into_host(load_policy(file), network=False) == []  # no network: nothing is fetched
