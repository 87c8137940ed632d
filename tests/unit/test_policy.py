"""The policy file: what loads, what is refused, and how exactly an error points at the place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.policy.load import MAX_BYTES, find_policy, load_policy
from vmsandbox.policy.tree.denied import DeniedPaths
from vmsandbox.policy.tree.globs import translate
from vmsandbox.policy.tree.secrets import built_in
from vmsandbox.policy.values import CommandsPolicy, FilesystemPolicy, NetworkPolicy, Policy

SAMPLE = """\
# The policy file that users already keep in their repositories, as .claude/sandbox.yaml
sandbox:
  filesystem:
    allowed_paths:
      - ./src
      - ./tests
      - /tmp/claude-work
    denied_paths:
      - ./secrets/
      - ~/.ssh/
      - /etc/
  network:
    mode: restricted
    allowed_hosts:
      - pypi.org
      - npmjs.org
      - github.com
    denied_hosts:
      - "*"
  commands:
    allowed:
      - python
      - pytest
      - black
      - git
    denied:
      - rm -rf /
      - curl *
      - wget *
    require_confirmation:
      - pip install *
      - npm install *
      - docker *
"""


def policy_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "sandbox.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes) -> UserInputError:
    with pytest.raises(UserInputError) as caught:
        load_policy(policy_file(folder, text))
    assert str(folder / "sandbox.yaml") in caught.value.brief
    return caught.value


def test_the_format_people_already_use_loads_as_it_is(tmp_path: Path) -> None:
    path = policy_file(tmp_path, SAMPLE)
    assert load_policy(path) == Policy(
        filesystem=FilesystemPolicy(
            allowed_paths=("./src", "./tests", "/tmp/claude-work"),
            denied_paths=("./secrets/", "~/.ssh/", "/etc/"),
        ),
        network=NetworkPolicy(
            mode="restricted", allowed_hosts=("pypi.org", "npmjs.org", "github.com"), denied_hosts=("*",)
        ),
        commands=CommandsPolicy(
            allowed=("python", "pytest", "black", "git"),
            denied=("rm -rf /", "curl *", "wget *"),
            require_confirmation=("pip install *", "npm install *", "docker *"),
        ),
        source=path,
    )


def test_blank_lists_and_sections_are_empty(tmp_path: Path) -> None:
    policy = load_policy(policy_file(tmp_path, "sandbox:\n  network:\n    allowed_hosts:\n  commands:\n"))
    assert policy.network == NetworkPolicy()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sandbox:\n  filesystem:\n    denied_path: [a]\n", ["line 3: sandbox.filesystem.denied_path",
        "'denied_paths'"]),
        ("sandbox:\n  netwrok: {}\n", ["line 2: sandbox.netwrok", "did you mean 'network'"]),
        ("sandbox:\n  network:\n    mode: restrictd\n", ["line 3: sandbox.network.mode", "'restricted'"]),
        ("sandbox:\n  network:\n    mode: off\n", ["line 3: sandbox.network.mode"]),
        ("sandbox:\n  commands:\n    denied:\n      - ok\n      - 7\n",
        ["line 5: sandbox.commands.denied[1]"]),
        ("sandbox:\n  commands:\n    denied: curl\n", ["line 3: sandbox.commands.denied"]),
        ("sandbox:\n  network: {}\n  network: {}\n", ["line 3: sandbox.network", "already given in line 2"]),
        ("sandbox:\n  commands:\n    denied:\n      - *\n", ["line 4"]),
        ("a: &a [x]\nsandbox: *a\n", ["line 2: an alias"]),
        ("sandbox: !!python/object/apply:os.system [id]\n", ["line 1"]),
        ("sandbox: [\n", ["line 2"]),
        ("sandbox: {}\n---\nsandbox: {}\n", ["line 2"]),
        ("sandbox: 2024-99-99\n", ["ValueError"]),
        ("sandbox: " + "[" * 5000 + "]" * 5000, ["RecursionError"]),
        ('sandbox: {filesystem: {denied_paths: ["a\\0b"]}}\n', ["control characters"]),
        ("sandbox: {filesystem: {denied_paths: ['']}}\n", ["denied_paths[0]"]),
        ("", ["empty"]),
        ("# nothing\n", ["empty"]),
        ("just text\n", ["line 1"]),
        ("other: 1\nsandbox: {}\n", ["line 1: other: unknown key"]),
        (b"sandbox:\n  \xff: 1\n", ["line 2: not UTF-8"]),
    ],
)  # fmt: skip
def test_an_error_names_line_and_key(tmp_path: Path, text: str | bytes, said: list[str]) -> None:
    error = refusal(tmp_path, text)
    for part in said:
        assert part in error.brief + error.details


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    error = refusal(tmp_path, "sandbox:\n  netwrok: {}\n  commands:\n    deny: []\n")
    assert "netwrok" in error.details and "commands.deny" in error.details


def test_what_is_no_small_regular_file_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "missing"):
        with pytest.raises(UserInputError):
            load_policy(path)
    assert "too large" in refusal(tmp_path, "#" * (MAX_BYTES + 1)).brief


def test_find_policy_takes_the_first_and_never_overlooks_one(tmp_path: Path) -> None:
    assert find_policy(tmp_path) is None
    (tmp_path / ".vmsandbox.yaml").write_text("sandbox: {}")
    assert find_policy(tmp_path) == tmp_path / ".vmsandbox.yaml"
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude/sandbox.yaml").symlink_to("nowhere")
    assert find_policy(tmp_path) == tmp_path / ".claude/sandbox.yaml"  # dangling: an error later, not a default


def test_the_policy_value_needs_no_validation_library() -> None:
    code = "import sys, vmsandbox.policy.values, vmsandbox.guest.walk; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("pattern", "denied", "kept"),
    [
        ("./secrets/", ["secrets"], ["sub/secrets", "secrets2"]),
        ("secrets", ["secrets", "sub/secrets"], ["secrets.md"]),
        ("*.secret", ["a.secret", "x/y/b.secret"], ["a.secrets"]),
        ("./config/*.yaml", ["config/a.yaml"], ["config/x/a.yaml", "a.yaml"]),
        ("config/**/*.yaml", ["config/a.yaml", "config/x/y/a.yaml"], ["a.yaml"]),
        ("./data/[!a]*", ["data/b", "data/\n"], ["data/a", "data"]),
        ("**/private/", ["private", "x/private", "new\nline/private"], ["x/private.txt"]),
        ("./a/../b", ["b"], ["a"]),
        ("!odd", ["!odd"], ["odd"]),
        ("# x ", ["# x "], ["# x", "x"]),
        ("./[z-a]", ["[z-a]", "z"], ["y"]),
        ("./[", ["["], ["x"]),
    ],
)
def test_what_a_denied_path_means(tmp_path: Path, pattern: str, denied: list[str], kept: list[str]) -> None:
    root = tmp_path / "proj[ect]*"  # the project's own name is no glob
    root.mkdir()
    rules = DeniedPaths([pattern], root.resolve())
    if pattern == "./[z-a]":  # malformed: its members, whatever they mean
        denied = ["z"]
    for path in denied:
        assert rules.match(path, path.rpartition("/")[2]), path
    for path in kept:
        assert rules.match(path, path.rpartition("/")[2]) is None, path


def test_host_paths_matter_when_the_project_contains_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path.resolve() / "home"
    (home / "real-ssh").mkdir(parents=True)
    (home / ".ssh").symlink_to("real-ssh")
    monkeypatch.setenv("HOME", str(home))
    rules = DeniedPaths(["~/.ssh/", "~/.a*/"], home)
    assert rules.match(".ssh", ".ssh") and rules.match("real-ssh", "real-ssh") and rules.match(".aws", ".aws")
    assert rules.match("src/.ssh", ".ssh") is None


@pytest.mark.parametrize("pattern", ["{home}/", "~/", "{home}/proj", "./", ".", "/", "{home}/p*/", "{link}/proj"])
def test_a_project_inside_a_denied_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    home = tmp_path.resolve() / "home"
    (home / "proj/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(RefusedError) as caught:
        DeniedPaths([pattern.format(home=home, link=tmp_path / "link")], home / "proj")
    assert caught.value.exit_code == 126


def test_an_unknown_home_is_an_error_and_not_a_rule_that_never_matches(tmp_path: Path) -> None:
    with pytest.raises(UserInputError):
        DeniedPaths(["~no-such-user-here/x"], tmp_path)


def test_secret_names() -> None:
    names = built_in()
    for path in (
        ".env", ".ENV", ".env.local", "prod.env", "deep/er/server.pem", "id_rsa", "ID_ED25519", ".netrc",
        ".git-credentials", ".docker/config.json", "a/.docker/config.json", "new\nline/.docker/config.json",
        "vault.kdbx", "cert.p12", "cert.pfx", "kubeconfig", ".pypirc",
    ):  # fmt: skip
        assert names.match(path, path.rpartition("/")[2], False), path
    for path in (".ssh", "x/.aws", ".gnupg"):
        assert names.match(path, path.rpartition("/")[2], True), path
    for path in (
        ".env.example", ".env.sample", ".env.template", "id_rsa.pub", "environment.py", "keys.py",
        "config.json",
        "docker/config.json", "monkey", ".envoy",
    ):  # fmt: skip
        assert not names.match(path, path.rpartition("/")[2], False), path


def test_a_star_does_not_run_over_slashes() -> None:
    import re

    assert re.fullmatch(translate("a/*"), "a/b") and not re.fullmatch(translate("a/*"), "a/b/c")
    assert not re.fullmatch(translate("a[!x]b"), "a/b") and not re.fullmatch(translate("a[.-0]b"), "a/b")
