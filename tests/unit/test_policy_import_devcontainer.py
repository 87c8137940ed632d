"""devcontainer.json: JSON with comments, and what its keys become."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from imported import of_devcontainer, sandbox_of

from vmsandbox.errors import UserInputError
from vmsandbox.policy.importing.jsonc import plain_json


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1, "a": 2}', "[" * 100_000, "/*" * 100_000, '{"runArgs": 1}', "// "]
)
def test_a_devcontainer_file_that_is_wrong_is_refused_fast(tmp_path: Path, text: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserInputError):
        of_devcontainer(tmp_path, text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('{"a": "//no /* no */ , }"}', {"a": "//no /* no */ , }"}),
        ('{"a": [1, 2, /* x */ // y\n], }', {"a": [1, 2]}),
        ('{"a": "\\"//", /**/ "b": 1 /***/ }', {"a": '"//', "b": 1}),
        ('// one\n{"a": ",]"}', {"a": ",]"}),
    ],
)
def test_comments_and_trailing_commas(text: str, plain: Any) -> None:
    assert json.loads(plain_json(text)) == plain
    assert plain_json(text).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "sandbox"),
    [
        ('{"postCreateCommand": ["pip", "install", "a b"]}', {"session": {"post_create": "pip install 'a b'"}}),
        (
            '{"postCreateCommand": {"x": "one", "y": ["two", "3"]}, "onCreateCommand": "first"}',
            {"session": {"post_create": "first && one && two 3"}},
        ),
        (
            '{"mounts": ["source=${localWorkspaceFolder},target=/w,type=bind,readonly"], "workspaceFolder": "/w"}',
            {"filesystem": {"project": "read-only"}},
        ),
        (
            '{"workspaceMount": "source=${localWorkspaceFolder},target=/w,type=bind,readonly"}',
            {"filesystem": {"project": "read-only"}},
        ),
        (
            '{"mounts": [{"type": "tmpfs", "target": "/tmp"}]}',
            {"filesystem": {"tmpfs": [{"path": "/tmp", "size": "256M", "exec": False}]}},
        ),
        (
            '{"containerEnv": {"A": "1", "B": "${localEnv:B}", "C": "${localEnv:X}"}}',
            {"session": {"variables": {"A": "1"}, "environment": ["B"]}},
        ),
        (
            '{"capAdd": ["SYS_PTRACE"], "securityOpt": ["seccomp=p.json"]}',
            {"kernel": {"capabilities": ["sys_ptrace"], "seccomp": ["./p.json"]}},
        ),
        (
            '{"hostRequirements": {"cpus": 4, "memory": "8gb", "storage": "32gb"}}',
            {"resources": {"vcpus": 4, "memory": "8G", "disk": "32G"}},
        ),
        (
            '{"runArgs": ["-m", "1g", "--cpus=2", "--read-only", "--tmpfs", "/tmp:size=1m", "--network=none"]}',
            {
                "resources": {"memory": "1G", "vcpus": 2},
                "filesystem": {"tmpfs": [{"path": "/tmp", "size": "1M", "exec": False}], "allowed_paths": ["/tmp"]},
                "network": {"mode": "none"},
            },
        ),
        (
            '{"runArgs": ["--ulimit", "nproc=64:128", "-eA=1", "-e", "B",'
            '"--mount", "type=tmpfs,dst=/tmp,tmpfs-size=4096"]}',
            {
                "resources": {"processes": 64},
                "session": {"variables": {"A": "1"}, "environment": ["B"]},
                "filesystem": {"tmpfs": [{"path": "/tmp", "size": "4k", "exec": False}]},
            },
        ),
        (
            '{"runArgs": ["--health-cmd", "true", "--health-interval=5s", "--storage-opt", "size=4G",'
            '"--device-write-bps=/dev/sda:1mb"]}',
            {
                "session": {"healthcheck": {"test": "true", "interval": "5s"}},
                "resources": {"disk": "4G", "write_rate": "1M"},
            },
        ),
    ],
)
def test_keys_of_a_devcontainer(tmp_path: Path, text: str, sandbox: Any) -> None:
    assert sandbox_of(of_devcontainer(tmp_path, text)) == sandbox
