"""Compose and devcontainer files become policies, and nothing of them is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from imported import left_of, of_devcontainer, of_service, sandbox_of

from vmsandbox.errors import UserInputError
from vmsandbox.policy.importing.devcontainer import DEVCONTAINER
from vmsandbox.policy.importing.document import mapping_page
from vmsandbox.policy.importing.jsonc import plain_json
from vmsandbox.policy.importing.options import OPTIONS
from vmsandbox.policy.importing.reading import import_files
from vmsandbox.policy.importing.table import SERVICE
from vmsandbox.policy.load import load_policy

DATA = Path(__file__).parent / "data/import"
PAGE = Path(__file__).parents[2] / "docs/policy-mapping.md"


def test_the_compose_file_that_people_have(tmp_path: Path) -> None:
    found = import_files([DATA / "docker-compose.security.yml"])
    assert sandbox_of(found) == {
        "kernel": {
            "new_privileges": False,
            "seccomp": ["./seccomp-claude.json"],
            "capabilities": ["chown", "setgid", "setuid"],
        },
        "filesystem": {
            "project": "read-only",
            "output": "./output",
            "allowed_paths": ["/tmp", "/home/claude-worker/.cache"],
            "tmpfs": [
                {"path": "/tmp", "size": "100M", "exec": False},
                {"path": "/home/claude-worker/.cache", "size": "50M", "exec": False},
            ],
        },
        "network": {"mode": "none"},
        "resources": {"vcpus": 2, "memory": "2G", "memory_reserved": "512M"},
        "session": {
            "healthcheck": {"test": ["claude", "--version"], "interval": "30s", "timeout": "10s", "retries": 3}
        },
    }
    assert {one.key.removeprefix("services.claude-secure.") for one in found.left} == {
        "image",
        "container_name",
        "deploy.resources.reservations.cpus",
        "volumes[2]",
        "networks.claude-isolated.driver",
    }
    (tmp_path / "seccomp-claude.json").write_bytes((DATA / "seccomp-claude.json").read_bytes())
    (tmp_path / "sandbox.yaml").write_text(found.text)
    policy = load_policy(tmp_path / "sandbox.yaml")
    assert policy.filesystem.read_only and policy.kernel.seccomp[0].source.name == "seccomp-claude.json"


def test_the_devcontainer_file_that_people_have() -> None:
    found = import_files([DATA / "devcontainer.json"])
    assert sandbox_of(found) == {
        "kernel": {"new_privileges": False},
        "filesystem": {"project": "writable"},
        "session": {"post_create": "pip install -r requirements.txt"},
    }
    assert [one.how for one in found.mapped if one.key == "postCreateCommand" and "allow @pypi" in one.how]
    assert {one.key for one in found.left} == {
        "name",
        "image",
        "features.ghcr.io/devcontainers/features/docker-in-docker:2",
        "customizations.vscode",
        "mounts[0] consistency",
    }
    assert {"remoteUser", "runArgs[0] --cap-drop[0]"} <= {one.key for one in found.mapped}


def test_both_at_once_with_the_stricter_value_of_each() -> None:
    found = import_files([DATA / "devcontainer.json", DATA / "docker-compose.security.yml"])
    assert sandbox_of(found)["filesystem"]["project"] == "read-only"
    assert all(one.key.startswith(("devcontainer.json: ", "docker-compose.security.yml: ")) for one in found.left)


def _leaves(value: Any, at: str) -> set[str]:
    if isinstance(value, dict) and value:
        return {one for key, inner in value.items() for one in _leaves(inner, f"{at}.{key}" if at else str(key))}
    return {at}


@pytest.mark.parametrize("name", ["docker-compose.security.yml", "devcontainer.json"])
def test_every_key_is_accounted_for(name: str) -> None:
    text = (DATA / name).read_text()
    data = yaml.safe_load(text) if name.endswith("yml") else json.loads(plain_json(text))
    found = import_files([DATA / name])
    told = [one.key for one in (*found.mapped, *found.left)]
    for leaf in _leaves(data, ""):
        parts = (f"{leaf}[", f"{leaf}.", f"{leaf} ")
        whole = any(leaf.startswith(f"{one.key}.") for one in found.left)
        assert whole or any(one == leaf or one.startswith(parts) for one in told), leaf


def test_an_unknown_key_is_listed_at_every_depth(tmp_path: Path) -> None:
    service = {
        "readonly": True,
        "deploy": {"resources": {"limits": {"cpu": 1}}},
        "x-note": 1,
        "healthcheck": {"test": "true", "start_period": "1s"},
    }
    found = of_service(tmp_path, service, nets={}, networks={"other": {}})
    left = left_of(found)
    assert left["readonly"] == left["deploy.resources.limits.cpu"] == left["nets"] == "unknown key"
    assert "x-note" in left and "healthcheck.start_period" in left and "networks.other" in left
    assert left_of(of_devcontainer(tmp_path, '{"runArgs": ["--frobnicate", "--memory"], "remoteuser": "x"}')) == {
        "runArgs[0]": "unknown option or one without its value: --frobnicate",
        "runArgs[1]": "unknown option or one without its value: --memory",
        "remoteuser": "unknown key",
    }


@pytest.mark.parametrize(
    ("service", "section", "expected"),
    [
        ({"security_opt": ["no-new-privileges"]}, "kernel", {"new_privileges": False}),
        ({"security_opt": ["no-new-privileges=false"]}, "kernel", {"new_privileges": True}),
        ({"security_opt": ["no-new-privileges:false", "no-new-privileges:true"]}, "kernel", {"new_privileges": False}),
        ({"cap_add": ["CAP_CHOWN", "NET_RAW"], "cap_drop": ["NET_RAW"]}, "kernel", {"capabilities": ["chown"]}),
        ({"tmpfs": "/tmp"}, "filesystem", {"tmpfs": [{"path": "/tmp", "size": "256M", "exec": False}]}),
        ({"tmpfs": ["/tmp:exec,size=1g"]}, "filesystem", {"tmpfs": [{"path": "/tmp", "size": "1G", "exec": True}]}),
        ({"shm_size": "64mb"}, "filesystem", {"tmpfs": [{"path": "/dev/shm", "size": "64M", "exec": False}]}),
        (
            {"volumes": [{"type": "tmpfs", "target": "/tmp", "tmpfs": {"size": 1048576}}]},
            "filesystem",
            {"tmpfs": [{"path": "/tmp", "size": "1M", "exec": False}]},
        ),
        ({"volumes": [".:/app"]}, "filesystem", {"project": "writable"}),
        ({"volumes": [".:/app:ro,z"]}, "filesystem", {"project": "read-only"}),
        (
            {"volumes": [{"type": "bind", "source": "./src", "target": "/w", "read_only": True}], "working_dir": "/w/"},
            "filesystem",
            {"project": "read-only"},
        ),
        ({"volumes": [".:/app"], "read_only": True}, "filesystem", {"project": "writable", "allowed_paths": ["./"]}),
        ({"read_only": "true"}, "filesystem", {"allowed_paths": ["/tmp"]}),
        ({"network_mode": "none"}, "network", {"mode": "none"}),
        ({"dns": "192.0.2.1"}, "network", {"resolver": ["192.0.2.1"]}),
        (
            {"cpus": 0.5, "mem_limit": "1g", "deploy": {"resources": {"limits": {"cpus": "3", "memory": "512M"}}}},
            "resources",
            {"vcpus": 1, "memory": "512M"},
        ),
        ({"pids_limit": 100, "ulimits": {"nproc": {"soft": 64, "hard": 128}}}, "resources", {"processes": 64}),
        ({"storage_opt": {"size": "4G"}}, "resources", {"disk": "4G"}),
        (
            {
                "blkio_config": {
                    "device_write_bps": [{"path": "/dev/sda", "rate": "12mb"}, {"path": "/dev/b", "rate": "1mb"}]
                }
            },
            "resources",
            {"write_rate": "1M"},
        ),
        (
            {"healthcheck": {"test": ["CMD-SHELL", "curl $$HOST"], "interval": "1m30s"}},
            "session",
            {"healthcheck": {"test": "curl $HOST", "interval": "90s"}},
        ),
        ({"healthcheck": {"test": "true", "retries": 2}}, "session", {"healthcheck": {"test": "true", "retries": 2}}),
        (
            {"environment": {"A": 1, "B": None, "C": True}},
            "session",
            {"variables": {"A": "1", "C": "true"}, "environment": ["B"]},
        ),
        (
            {"environment": ["A=b=c", "LANG", "D=${D}"]},
            "session",
            {"variables": {"A": "b=c"}, "environment": ["LANG", "D"]},
        ),
    ],
)
def test_keys_of_a_service(tmp_path: Path, service: dict[str, Any], section: str, expected: Any) -> None:
    assert sandbox_of(of_service(tmp_path, service)) == {section: expected}


@pytest.mark.parametrize(
    ("service", "key"),
    [
        ({"security_opt": ["seccomp:unconfined"]}, "security_opt[0]"),
        ({"security_opt": ["apparmor=x"]}, "security_opt[0]"),
        ({"security_opt": ["seccomp:${P}"]}, "security_opt[0]"),
        ({"cap_add": ["ALL"]}, "cap_add[0]"),
        ({"privileged": True}, "privileged"),
        ({"tmpfs": ["/usr/lib:size=1m"]}, "tmpfs[0]"),
        ({"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]}, "volumes[0]"),
        ({"volumes": ["data:/var/lib"]}, "volumes[0]"),
        ({"volumes": ["~/.ssh:/home/u/.ssh:ro"]}, "volumes[0]"),
        ({"networks": ["front"]}, "networks"),
        ({"network_mode": "host"}, "network_mode"),
        ({"mem_limit": "16m"}, "mem_limit"),
        ({"mem_limit": "${LIMIT}"}, "mem_limit"),
        ({"pids_limit": -1}, "pids_limit"),
        ({"ulimits": {"nofile": 1024}}, "ulimits.nofile"),
        ({"healthcheck": {"disable": True}}, "healthcheck"),
        ({"healthcheck": {"test": ["NONE"]}}, "healthcheck"),
        ({"healthcheck": {"interval": "5s"}}, "healthcheck"),
        ({"environment": {"LD_PRELOAD": "x"}}, "environment.LD_PRELOAD"),
        ({"environment": {"A": "x${B}"}}, "environment.A"),
        ({"environment": {"A": ""}}, "environment.A"),
        (
            {"user": "1000", "env_file": ".env", "ports": ["80:80"], "secrets": ["s"], "devices": ["/dev/kvm"]},
            "devices",
        ),
    ],
)
def test_what_has_no_counterpart_is_listed(tmp_path: Path, service: dict[str, Any], key: str) -> None:
    found = of_service(tmp_path, service)
    assert sandbox_of(found) == {} and key in left_of(found)


def test_the_socket_of_a_container_engine_is_named_for_what_it_is(tmp_path: Path) -> None:
    for source in ("/var/run/docker.sock", "./run/podman.sock"):
        found = of_service(tmp_path, {"volumes": [f"{source}:/run/x.sock", ".:/app"]})
        assert "root on the host" in left_of(found)["volumes[0]"]
        assert sandbox_of(found) == {"filesystem": {"project": "writable"}}


def test_no_secret_is_copied(tmp_path: Path) -> None:
    values = {
        "API_KEY": "abc",
        "DATABASE": "postgres://me:hunter2@db/x",
        "NEUTRAL": "ghp_0123456789abcdefghijklmnopqrst",
        "PLAIN": "value",
    }
    for environment in (values, [f"{name}={value}" for name, value in values.items()]):
        found = of_service(tmp_path, {"environment": environment})
        assert sandbox_of(found)["session"] == {
            "variables": {"PLAIN": "value"},
            "environment": ["API_KEY", "DATABASE", "NEUTRAL"],
        }
        everything = repr(found)
        assert not any(value in everything for name, value in values.items() if name != "PLAIN")


def test_several_services_have_to_be_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text("services: {web: {cpus: 1}, job: {cpus: 2}}\n")
    with pytest.raises(UserInputError) as error:
        import_files([path])
    assert "web, job" in error.value.details
    with pytest.raises(UserInputError):
        import_files([path], "none")
    found = import_files([path], "job")
    assert sandbox_of(found) == {"resources": {"vcpus": 2}} and "services.web" in {one.key for one in found.left}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("services: {a: {cpus: 1, cpus: 2}}", "already given"),
        ("a: &a [1]\nservices: {b: {cap_add: *a}}", "an alias"),
        ("services: {a: {cap_drop: [NOPE]}}", "services.a.cap_drop: no capability is called"),
        ("services: {a: {cap_add: 5}}", "services.a.cap_add: not a text"),
        ("services: {a: {read_only: perhaps}}", "services.a.read_only: neither true nor false"),
        ("services: {a: {mem_limit: lots}}", "services.a.mem_limit: not a size"),
        ("services: {a: {cpus: -1}}", "services.a.cpus: not a positive number"),
        ("services: {a: {healthcheck: {test: [RUN, x]}}}", "a test begins with CMD"),
        ("services: {a: []}", "services.a: not a mapping"),
        ("services: {}", "services"),
        ("[]", "is not valid"),
        ("x" * 300_000, "too large"),
    ],
)
def test_a_compose_file_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "compose.yml"
    path.write_text(text)
    with pytest.raises(UserInputError) as error:
        import_files([path])
    assert said in f"{error.value.brief}\n{error.value.details}"


def test_a_profile_is_named_from_where_the_policy_will_lie(tmp_path: Path) -> None:
    path = tmp_path / "compose.yml"
    path.write_text("services: {a: {security_opt: ['seccomp:./p.json']}}")
    found = import_files([path], folder=tmp_path / ".claude")
    assert sandbox_of(found)["kernel"]["seccomp"] == ["../p.json"]


def test_each_option_is_a_key_that_there_is() -> None:
    assert {one.key for one in OPTIONS.values()} <= set(SERVICE)
    for known in (*SERVICE.values(), *DEVCONTAINER.values()):
        assert known.take is not None or (known.text and not known.ours), "not mapped, without a reason"


def test_the_page_says_what_the_code_does() -> None:
    assert PAGE.read_text() == mapping_page(), (
        "python -c 'from vmsandbox.policy.importing.document import mapping_page; print(mapping_page(), end=\"\")' "
        "> docs/policy-mapping.md"
    )
