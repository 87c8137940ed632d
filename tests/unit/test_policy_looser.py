"""What one policy allows that another does not, beside the network: as sets where sets can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from whole_policies import layers

from vmsandbox.errors import RefusedError
from vmsandbox.policy.layer import Layer
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.looser import covers_command, looser_policy
from vmsandbox.policy.merging.merge import merge_two
from vmsandbox.policy.values import Policy

UNCOMPARED = (
    "commands",
    "image",
    "session.variables",
    "session.post_create",
    "session.post_create_files",
    "session.healthcheck",
    "session.schedule",
)


def policy(folder: Path, text: str) -> Policy:
    path = folder / "sandbox.yaml"
    path.write_text(f"sandbox: {{{text}}}\n")
    return load_policy(path)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("filesystem: {allowed_paths: [./src]}", "filesystem: {allowed_paths: [./src/a]}", []),
        ("filesystem: {allowed_paths: [./src]}", "filesystem: {allowed_paths: [./src, /opt]}", ["/opt may be written"]),
        ("filesystem: {allowed_paths: [./src]}", "", ["all that the worker owns may be written"]),
        ("filesystem: {allowed_paths: [./, ~/, /tmp]}", "", ["all that the worker owns"]),
        ("filesystem: {allowed_paths: [/]}", "", []),
        ("", "filesystem: {allowed_paths: [./src, ~/x, /tmp/y]}", []),
        ("filesystem: {project: read-only}", "filesystem: {project: read-only, output: ./o}", ["./o may be written"]),
        ("filesystem: {project: read-only}", "", ["./ may be written"]),
        ("filesystem: {project: read-only}", "filesystem: {allowed_paths: [~/]}", ["the project may be written"]),
        ("", "filesystem: {project: read-only, output: ./o}", []),
        ("filesystem: {denied_paths: [./a/b, '*.pem']}", "filesystem: {denied_paths: [./a/, '*.pem']}", []),
        ("filesystem: {denied_paths: [./a, ./b]}", "filesystem: {denied_paths: [./a]}", ["./b is no longer denied"]),
        ("filesystem: {denied_paths: [/etc/]}", "filesystem: {denied_paths: [./etc/]}", ["/etc/ is no longer denied"]),
        ("filesystem: {tmpfs: [{path: /tmp, size: 1m}]}", "filesystem: {tmpfs: [{path: /tmp, size: 2m, exec: true}]}",
         ["2M, no longer 1M", "programs in /tmp may run"]),
        ("filesystem: {tmpfs: [{path: /tmp, size: 1m}]}", "", ["no longer limited", "may run"]),
        ("commands: {allowed: [git, pip *]}", "commands: {allowed: [git push, pip install x]}", []),
        ("commands: {allowed: [git push *]}", "commands: {allowed: [git *, curl]}", ["'git *'", "'curl'"]),
        ("commands: {allowed: [git]}", "", ["any command"]),
        ("", "commands: {allowed: [git], require_confirmation: [curl]}", []),
        ("commands: {allowed: [git]}", "commands: {allowed: [git], require_confirmation: [curl]}", ["if a person"]),
        ("commands: {denied: [curl x]}", "commands: {denied: [curl]}", []),
        ("commands: {denied: [curl]}", "commands: {denied: [curl x]}", ["'curl' is no longer denied"]),
        ("commands: {require_confirmation: [pip install *]}", "commands: {denied: [pip]}", []),
        ("commands: {require_confirmation: [pip]}", "", ["no longer asked"]),
        ("kernel: {capabilities: [chown]}", "kernel: {capabilities: [chown, kill], new_privileges: true}",
         ["capabilities: kill", "new_privileges"]),
        ("resources: {memory: 1G, vcpus: 2}", "resources: {memory: 2G}", ["vcpus", "memory: 2G, no longer 1G"]),
        ("resources: {memory: 2G}", "resources: {memory: 1G, vcpus: 2}", []),
        ("session: {time: 1h}", "session: {time: 2h, environment: [A]}", ["2h, no longer 1h", "host's A"]),
        ("", "session: {post_create: make, variables: {A: b}}", ["'b'", "make"]),
        ("push: {secrets: refuse}", "", ["push.secrets"]),
        ("return: {accept: safe, files: 5, denied_paths: [a]}", "return: {accept: all, files: 6}",
         ["all, no longer safe", "a may come back", "6, no longer 5"]),
        ("isolation: isolated", "isolation: separated", ["separated is enough"]),
        ("image: base", "image: other", ["other, no longer base"]),
        ("", "image: base, isolation: isolated", []),
    ],
)  # fmt: skip
def test_what_is_looser(tmp_path: Path, before: str, after: str, said: list[str]) -> None:
    found = looser_policy(policy(tmp_path, before), policy(tmp_path, after))
    assert len(found) == len(said), found
    for text, part in zip(found, said, strict=True):
        assert part in text


def test_another_profile_is_a_looser_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}')
    strict = policy(tmp_path, "kernel: {seccomp: ./a.json}")
    (tmp_path / "a.json").write_text('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}')
    other = policy(tmp_path, "kernel: {seccomp: ./a.json}")
    assert "a.json" in looser_policy(strict, other)[0] and not looser_policy(strict, strict)


@pytest.mark.parametrize(
    ("wider", "narrower", "expected"),
    [
        ("git", "git push origin", True), ("git push *", "git push", True), ("git push *", "git push a b", True),
        ("git push *", "git pull", False), ("git push", "git push -f", False), ("*", "/usr/bin/x y", True),
        ("py*", "python3", True), ("g*", "/g/x", False), ("python", "/usr/bin/python", False), ("[ab]", "a", False),
        ("'a b' c", "'a b' c", True),
    ],
)  # fmt: skip
def test_which_pattern_covers_which(wider: str, narrower: str, expected: bool) -> None:
    assert covers_command(wider, narrower) is expected


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(layers, layers)
def test_nothing_is_looser_than_itself_and_a_merged_one_is_not_looser(outer: Layer, inner: Layer) -> None:
    assert looser_policy(outer.policy, outer.policy) == ()
    try:
        both = merge_two(outer, inner).policy
    except RefusedError:
        return
    for one in (outer, inner):
        # Only what the file says; of commands the wider file is asked apart, and of some keys the wider one's holds.
        said = (one.said - {"filesystem"}) | ({"filesystem"} if one.says("filesystem.allowed_paths") else set())
        told = [text for text in looser_policy(one.policy, both) if text.partition(":")[0] in said]
        assert [text for text in told if not text.startswith(UNCOMPARED)] == []
