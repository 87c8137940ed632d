"""Every key of a policy file beyond the network: what it becomes, and what is said of what is impossible."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmsandbox.errors import UserInputError
from vmsandbox.policy.format.model import PolicyFile
from vmsandbox.policy.load import load_layer, load_policy
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
    SessionPolicy,
    Tmpfs,
)

PROFILE = '{"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}], "defaultAction": "SCMP_ACT_ERRNO"}'
CANONICAL = '{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"action":"SCMP_ACT_ALLOW","names":["read"]}]}'
WHOLE = """\
sandbox:
  image: python-dev
  isolation: separated
  filesystem:
    allowed_paths: [./src/, src2//a, ~/.cache, /tmp//claude-work/., ./]
    denied_paths: [./secrets/, "*.pem", ~/.ssh/, "[x", ~root/x]
    project: read-only
    output: output/
    tmpfs: [{path: /tmp, size: 100m, exec: false}, {path: ~/.cache, size: 4096, exec: true}]
  commands: {allowed: ["git *"], denied: ["rm -rf /"], require_confirmation: ["pip install *"], confirm_seconds: 2m}
  kernel: {seccomp: sub/profile.json, capabilities: [CAP_CHOWN, SetUID, chown], new_privileges: true}
  resources: {vcpus: 3, memory: 1.5G, memory_reserved: 512MiB, disk: 4g, write_rate: 50 MB, processes: 99, output: 64k}
  session:
    time: 1h30m
    idle: 90
    environment: [LANG, LC_ALL]
    variables: {PORT: "8080", EMPTY_NOT: x}
    post_create: pip install -r requirements.txt
    post_create_files: [requirements/*.txt, ./setup.py]
    healthcheck: {test: [claude, --version], interval: 30s, timeout: 2.5, retries: 5}
    schedule: "*-*-* 02:00:00"
  push: {secrets: refuse, agent_configuration: refuse}
  return: {accept: safe, denied_paths: [.github/, "*.sh"], files: 500, bytes: 50M, deletions: 0}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/profile.json").write_text(PROFILE)
    return tmp_path / "sandbox.yaml"


def test_every_key(file: Path) -> None:
    file.write_text(WHOLE)
    assert load_policy(file) == Policy(
        image="python-dev",
        isolation="separated",
        filesystem=FilesystemPolicy(
            allowed_paths=("./src", "./src2/a", "~/.cache", "/tmp/claude-work", "./"),
            denied_paths=("./secrets/", "*.pem", "~/.ssh/", "[x", "~root/x"),
            read_only=True,
            output="./output",
            tmpfs=(Tmpfs("/tmp", 100 << 20), Tmpfs("/home/claude-worker/.cache", 4096, True)),
        ),
        commands=CommandsPolicy(("git *",), ("rm -rf /",), ("pip install *",), 120),
        kernel=KernelPolicy((SeccompProfile(file.parent / "sub/profile.json", CANONICAL),), ("chown", "setuid"), True),
        resources=ResourcesPolicy(3, 3 << 29, 512 << 20, 4 << 30, 50 << 20, 99, 64 << 10),
        session=SessionPolicy(
            time=5400,
            idle=90,
            environment=("LANG", "LC_ALL"),
            variables=(("PORT", "8080"), ("EMPTY_NOT", "x")),
            post_create=("sh", "-c", "pip install -r requirements.txt"),
            post_create_files=("requirements/*.txt", "./setup.py"),
            healthcheck=Healthcheck(("claude", "--version"), 30, 2.5, 5),
            schedule="*-*-* 02:00:00",
        ),
        push=PushPolicy("refuse", "warn", "refuse"),
        returns=ReturnPolicy("safe", (".github/", "*.sh"), 500, 50 << 20, 0),
        source=file,
    )


def test_the_keys_that_a_file_has_and_their_lines(file: Path) -> None:
    file.write_text(WHOLE)
    layer = load_layer(file)
    assert layer.says("filesystem.project") and layer.says("session.healthcheck.test") and layer.says("push.secrets")
    assert (
        not layer.says("network") and not layer.says("push.instructions") and not layer.says("kernel.user_namespaces")
    )
    assert layer.lines["sandbox", "session", "idle"] == 15
    assert [path.name for path, _ in layer.files] == ["sandbox.yaml", "profile.json"]
    assert layer.files[1][1] == PROFILE.encode()  # as it was read: a signature is over these bytes


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("imag", "base", "did you mean 'image'"),
        ("image", "Base Image", "not an image name"),
        ("isolation", "isolate", "did you mean 'isolated'"),
        ("filesystem.allowed_paths", "[]", "leave the key away"),
        ("filesystem.allowed_paths", "", "leave the key away"),
        ("filesystem.allowed_paths[0]", "['']", "at least 1 character"),
        ("filesystem.allowed_paths[0]", "['  ']", "an empty path"),
        ("filesystem.allowed_paths[1]", '[./a, "./b\\0c"]', "control characters"),
        ("filesystem.allowed_paths[0]", "['./src/*']", "not a glob"),
        ("filesystem.allowed_paths[0]", "[./../x]", "leaves the folder"),
        ("filesystem.allowed_paths[0]", "[~/../x]", "leaves the folder"),
        ("filesystem.allowed_paths[0]", "[/tmp/../etc]", "without .."),
        ("filesystem.allowed_paths[0]", "[~root/x]", "~/"),
        ("filesystem.allowed_paths[0]", f"[./{'x' * 256}]", "255 bytes"),
        ("filesystem.denied_paths[0]", f"[{'ü' * 128}]", "255 bytes"),
        ("filesystem.project", "readonly", "did you mean 'read-only'"),
        ("filesystem", "{output: ./o}", "no meaning without"),
        ("filesystem.output", "{project: read-only, output: ../o}", "leaves"),
        ("filesystem.output", "{project: read-only, output: /tmp}", "one of the project's"),
        ("filesystem.output", "{project: read-only, output: ./}", "not the project itself"),
        ("filesystem.output", "{project: read-only, output: .git/x}", "git's own"),
        ("filesystem.tmpfs[0].path", "[{path: /, size: 1m}]", "tmpfs on /"),
        ("filesystem.tmpfs[0].path", "[{path: //etc//x, size: 1m}]", "tmpfs in /etc"),
        ("filesystem.tmpfs[0].path", "[{path: ~/, size: 1m}]", "tmpfs on /home/claude-worker"),
        ("filesystem.tmpfs[0].path", "[{path: ~/projects/x, size: 1m}]", "tmpfs in /home/claude-worker/projects"),
        ("filesystem.tmpfs[0].path", "[{path: ./x, size: 1m}]", "outside the project"),
        ("filesystem.tmpfs[0].size", "[{path: /tmp, size: 100x}]", "such as 100m"),
        ("filesystem.tmpfs[0].size", "[{path: /tmp, size: 1}]", "4096"),
        ("filesystem.tmpfs[0].size", "[{path: /tmp}]", "required"),
        ("filesystem.tmpfs[0].exec", "[{path: /tmp, size: 1m, exec: 'yes'}]", "bool"),
        ("filesystem.tmpfs[0].noexec", "[{path: /tmp, size: 1m, noexec: true}]", "did you mean 'exec'"),
        ("filesystem", "{tmpfs: [{path: /tmp, size: 1m}, {path: /tmp/, size: 2m}]}", "two tmpfs"),
        ("commands.allowed", "[]", "leave the key away"),
        ("commands.denied[0]", "['it''s']", "not a command line"),
        ("commands.denied[0]", "[\"'' x\"]", "names no program"),
        ("commands.confirm_seconds", "2h", "3600"),
        ("kernel.seccomp", "./no.json", "cannot be read"),
        ("kernel.seccomp[0]", "[~/x.json]", "not ~"),
        ("kernel.seccomp", "./sub", "not a regular file"),
        ("kernel.capabilities[0]", "[chmod]", "did you mean"),
        ("kernel.capabilities[0]", "[ALL]", "not all"),
        ("kernel.new_privileges", "'false'", "bool"),
        ("resources.vcpus", "0", "greater than or equal to 1"),
        ("resources.vcpus", "2.0", "integer"),
        ("resources.memory", "64m", "greater than or equal"),
        ("resources.memory", "-1", "not a size"),
        ("resources.memory", "true", "not a size"),
        ("resources.memory", "'1e9'", "not a size"),
        ("resources.memory", "9999999999999t", "not a size"),
        ("resources", "{memory: 1G, memory_reserved: 2G}", "more than memory"),
        ("resources.processes", "1", "greater than or equal to 16"),
        ("session.time", "8 hours", "such as 30s or 8h"),
        ("session.time", "0", "not a time"),
        ("session.time", ".inf", "not a time"),
        ("session.time", "400d", "not a time"),
        ("session.environment[0]", "[LD_PRELOAD]", "before the guest's own safeguards"),
        ("session.environment[0]", "['A=b']", "not the name of a variable"),
        ("session.variables.VMSANDBOX_PLUMBING", "{VMSANDBOX_PLUMBING: '1'}", "before the guest's own safeguards"),
        ("session.variables.PORT", "{PORT: 8080}", "string"),
        ("session.post_create", "[]", "at least 1"),
        ("session.post_create_files[0]", "[/etc/x]", "within the project"),
        ("session.post_create_files[0]", "[a/../../x]", "within the project"),
        ("session.healthcheck.test", "{interval: 1s}", "required"),
        ("session.healthcheck.interval", "{test: x, interval: 10ms}", "not a time"),
        ("session.schedule", "'; reboot'", "calendar expression"),
        ("push.secrets", "deny", "warn, refuse"),
        ("return.accept", "everything", "none, safe, all"),
        ("return.denied_paths[0]", "[/etc]", "within the project"),
        ("return.denied_paths[0]", "[../x]", "within the project"),
        ("return.files", "-1", "greater than or equal to 0"),
        ("retrun", "{}", "did you mean 'return'"),
        ("signed", "{allowed_signers: /x}", "organisation's file"),
    ],
)
def test_what_is_impossible_is_said_with_file_line_and_key(file: Path, key: str, value: str, said: str) -> None:
    parts = key.partition("[")[0].split(".")
    if parts[-2:-1] == ["variables"] or (len(parts) == 3 and parts[1] in ("healthcheck", "variables")):
        parts = parts[:2]
    elif parts[-1] in ("output",) and "{" in value and parts[0] == "filesystem":
        parts = parts[:1]
    text = "sandbox:\n"
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        text += "  " * (depth + 1) + part + (f": {value}\n" if last else ":\n")
    file.write_text(text)
    with pytest.raises(UserInputError) as caught:
        load_policy(file)
    brief = caught.value.brief
    assert brief.startswith(f"the policy {file} is not valid: line {len(parts) + 1}: sandbox.{key}: "), brief
    assert said in brief, brief


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a seccomp profile"),
        ("[]", "no JSON object"),
        ('{"defaultAction": "SCMP_ACT_ERRNO", "defaultAction": "SCMP_ACT_ALLOW"}', "twice"),
        ('{"defaultAction": NaN}', "NaN"),
        ("[" * 100_000, "nested"),
        ('{"defaultAction": "SCMP_ACT_MAYBE"}', "SCMP_ACT_MAYBE"),
        (" " * 300_000, "too large"),
    ],
)
def test_a_profile_that_is_none(file: Path, content: str, said: str) -> None:
    (file.parent / "sub/profile.json").write_text(content)
    file.write_text("sandbox:\n  kernel:\n    seccomp: sub/profile.json\n")
    with pytest.raises(UserInputError) as caught:
        load_policy(file)
    assert "line 3: sandbox.kernel.seccomp" in caught.value.brief
    assert said in caught.value.brief + caught.value.details


def test_a_profile_that_would_block_is_refused(file: Path) -> None:
    (file.parent / "sub/profile.json").unlink()
    os.mkfifo(file.parent / "sub/profile.json")
    file.write_text(f"sandbox: {{kernel: {{seccomp: [{file.parent}/sub/profile.json]}}}}\n")
    with pytest.raises(UserInputError, match="not a regular file"):
        load_policy(file)


def test_all_problems_of_all_sections_at_once(file: Path) -> None:
    file.write_text("sandbox:\n  image: X\n  resources: {memry: 1}\n  push: {secrets: no}\n")
    with pytest.raises(UserInputError) as caught:
        load_policy(file)
    for part in ("line 2: sandbox.image", "line 3: sandbox.resources.memry", "line 4: sandbox.push.secrets"):
        assert part in caught.value.details


def test_the_schema_describes_every_key() -> None:
    schema = PolicyFile.model_json_schema(by_alias=True)
    keys = 0
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["additionalProperties"] is False
        for name, one in definition["properties"].items():
            keys += 1
            if "description" not in one:  # that of the section itself
                one = schema["$defs"][one["$ref"].rpartition("/")[2]]
            assert one.get("description", "").endswith("."), name
    assert keys > 80 and "return" in schema["$defs"]["Sandbox"]["properties"]
    sizes: Any = schema["$defs"]["Resources"]["properties"]["memory"]
    assert '"string"' in json.dumps(sizes) and '"integer"' in json.dumps(sizes)


def test_the_documentation_has_every_key_and_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/policy.md").read_text()
    example, signed = (block.partition("```")[0] for block in text.split("```yaml\n")[1:])
    (tmp_path / "seccomp.json").write_text(PROFILE)
    file = tmp_path / "sandbox.yaml"
    file.write_text(example)
    policy = load_policy(file)
    assert policy.session.healthcheck is not None and policy.network.limits
    file.write_text(signed)
    assert load_layer(file, organisation=True).signed is not None
    documented = json.dumps(yaml.safe_load(example)) + json.dumps(yaml.safe_load(signed))
    for definition in PolicyFile.model_json_schema(by_alias=True)["$defs"].values():
        for name in definition["properties"]:
            assert f'"{name}":' in documented, name
