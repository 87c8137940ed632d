"""Which files hold at once, where a value is from, and what of a project's policy comes to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vmsandbox.cli.policy_text import policy_lines, wider_lines
from vmsandbox.errors import HostError, UserInputError
from vmsandbox.policy.format.rendering import plain_policy
from vmsandbox.policy.lint import Finding, lint_policy, lint_within
from vmsandbox.policy.load import load_policy
from vmsandbox.policy.merging.effective import ORGANISATION, Effective, effective_policy
from vmsandbox.policy.merging.provenance import dotted, origins
from vmsandbox.policy.values import Policy

ORGANISATIONS = """\
sandbox:
  image: base
  filesystem: {denied_paths: [./secrets/], tmpfs: [{path: /tmp, size: 100m}]}
  network:
    mode: restricted
    allowed_hosts: ["@pypi", "*.example.org"]
    denied_hosts: [evil.example.org]
  commands: {denied: [curl *]}
  kernel: {new_privileges: false}
  resources: {memory: 1G}
  session: {environment: [LANG, TERM]}
"""
PROJECTS = """\
sandbox:
  image: python-dev
  filesystem:
    allowed_paths: [./src]
    tmpfs: [{path: /tmp, size: 200m, exec: true}]
  network:
    mode: proxy
    allowed_hosts: [evil.example.org, good.example.org, other.org]
  commands:
    allowed: [python, curl *]
  kernel: {new_privileges: true}
  resources:
    memory: 2G
    vcpus: 2
  session: {environment: [LANG, SECRET], post_create: make}
"""


class Files:
    def __init__(self, folder: Path) -> None:
        self.organisation, self.user, self.own = (folder / f"{name}.yaml" for name in ("organisation", "user", "own"))

    def read(self, organisation: str = "", user: str = "", own: str = "") -> Effective:
        for path, text in ((self.organisation, organisation), (self.user, user), (self.own, own)):
            path.unlink(missing_ok=True)
            if text:
                path.write_text(text)
                path.chmod(0o644)
        return effective_policy(self.own if own else None, organisation=self.organisation, user=self.user)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_all_files_that_are_there_hold(files: Files) -> None:
    assert files.read() == Effective(Policy())
    found = files.read(ORGANISATIONS, "sandbox: {resources: {memory: 512M, vcpus: 4}}\n", PROJECTS)
    policy = found.policy
    assert [layer.source for layer in found.layers] == [files.organisation, files.user, files.own]
    assert found.own is found.layers[2] and policy.source == files.own
    assert policy.outer == (files.organisation, files.user)
    assert (policy.image, policy.resources.memory, policy.resources.vcpus) == ("base", 512 << 20, 2)
    assert policy.session.environment == ("LANG",) and not policy.kernel.new_privileges
    assert [(one.size, one.exec) for one in policy.filesystem.tmpfs] == [(100 << 20, False)]
    without = files.read(ORGANISATIONS)
    assert without.own is None and without.policy.image == "base" and without.policy.network.mode == "restricted"


def test_one_that_cannot_be_read_is_never_skipped(files: Files) -> None:
    for wrong in ("sandbox: {netwrok: {}}\n", "x"):
        with pytest.raises(UserInputError, match=r"organisation\.yaml"):
            files.read(wrong, own=PROJECTS)
        with pytest.raises(UserInputError, match=r"user\.yaml"):
            files.read(user=wrong, own=PROJECTS)
    files.read()
    files.organisation.symlink_to("nowhere")
    with pytest.raises(HostError, match=r"organisation\.yaml"):
        effective_policy(None, organisation=files.organisation, user=files.user)


def test_the_organisations_file_is_where_no_variable_leads_elsewhere() -> None:
    assert Path("/etc/vmsandbox/policy.yaml") == ORGANISATION


def test_without_a_policy_nothing_is_imported_for_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vmsandbox.policy.merging.effective import effective_policy; "
        f"effective_policy(None, organisation=Path({str(tmp_path / 'a')!r}), user=Path({str(tmp_path / 'b')!r})); "
        "sys.exit('pydantic' in sys.modules or 'yaml' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_value_has_its_place(files: Files) -> None:
    found = files.read(ORGANISATIONS, "", PROJECTS)
    places = {dotted(where): " ".join(told) for where, told in origins(found.policy, found.layers).items()}
    organisation, own = str(files.organisation), str(files.own)
    assert places["image"] == f"{organisation}:2"
    assert places["resources.memory"] == f"{organisation}:10"
    assert places["resources.vcpus"] == f"{own}:14"
    assert places["filesystem.allowed_paths[0]"] == f"{own}:4"
    assert places["filesystem.denied_paths[0]"] == f"{organisation}:3"
    assert places["filesystem.tmpfs[0]"] == f"{organisation}:3"
    assert places["session.environment[0]"] == f"{organisation}:11 {own}:15"
    assert places["session.post_create"] == f"{own}:15" and "session.post_create[0]" not in places
    assert places["network.allowed_hosts[1]"] == f"{own}:8"
    assert places["push.secrets"] == "default" and places["kernel.capabilities"] == "default"


def test_what_is_shown_is_a_policy_too(files: Files, tmp_path: Path) -> None:
    found = files.read(ORGANISATIONS, "", PROJECTS)
    plain, places = plain_policy(found.policy, complete=True), origins(found.policy, found.layers)
    lines = policy_lines(plain, places)
    shown = tmp_path / "shown.yaml"
    shown.write_text("\n".join(lines))
    again = load_policy(shown)
    assert plain_policy(again, complete=True) == plain
    assert yaml.safe_load(shown.read_text())["sandbox"]["image"] == "base"
    assert any(line.startswith("    memory: 1G") and line.endswith(f"# {files.organisation}:10") for line in lines)
    assert list(wider_lines(found)) == [
        f"each request has to be allowed by {files.organisation} too",
        f"each command has to be allowed by {files.organisation} too",
    ]


def test_what_of_a_project_comes_to_nothing_is_said(files: Files) -> None:
    found = files.read(ORGANISATIONS, "", PROJECTS)
    assert found.own is not None
    said = {one.where: one.text for one in lint_within(found.own, found.policy, found.layers[:1])}
    assert set(said) == {
        "filesystem.tmpfs[0]", "resources.memory", "kernel.new_privileges", "session.environment[1]",
        "commands.allowed[1]", "image",
    }  # fmt: skip
    assert "1G" in said["resources.memory"] and str(files.organisation) in said["resources.memory"]
    nothing = files.read("sandbox: {network: {mode: restricted}}\n", "", "sandbox: {resources: {vcpus: 1}}\n")
    assert nothing.own is not None
    (one,) = lint_within(nothing.own, nothing.policy, nothing.layers[:1])
    assert one.where == "network" and "no host" in one.text
    calm = files.read(ORGANISATIONS, "", "sandbox: {resources: {memory: 512M}, session: {environment: [LANG]}}\n")
    assert calm.own is not None and lint_within(calm.own, calm.policy, calm.layers[:1]) == ()


@pytest.mark.parametrize(
    ("section", "where", "text"),
    [
        ("filesystem: {allowed_paths: [./secrets/x], denied_paths: [./secrets]}", "filesystem.allowed_paths[0]",
         "denied"),
        ("filesystem: {allowed_paths: [~/.ssh], denied_paths: [~/.ssh/]}", "filesystem.allowed_paths[0]", "denied"),
        ("filesystem: {allowed_paths: [/etc/x]}", "filesystem.allowed_paths[0]", "the guest's system"),
        ("filesystem: {allowed_paths: [./src, ./src/a]}", "filesystem.allowed_paths[1]", "second time"),
        ("filesystem: {allowed_paths: [./src], project: read-only}", "filesystem.allowed_paths[0]", "read-only"),
        ("filesystem: {project: read-only, output: ./o/p, denied_paths: [./o]}", "filesystem.output", "denied"),
        ("filesystem: {denied_paths: [./]}", "filesystem.denied_paths[0]", "the project itself"),
        ("commands: {allowed: [curl x], denied: [curl]}", "commands.allowed[0]", "denies"),
        ("commands: {allowed: [git], denied: [curl *]}", "commands.denied[0]", "nothing allows"),
        ("commands: {denied: [pip], require_confirmation: [pip install *]}", "commands.require_confirmation[0]",
         "denies"),
        ("commands: {allowed: ['*']}", "commands.allowed[0]", "every program"),
        ("commands: {allowed: [git push], require_confirmation: [git *]}", "commands.allowed[0]", "asks about"),
        ("kernel: {capabilities: [chown, sys_admin]}", "kernel.capabilities[1]", "root"),
        ("network: {allowed_hosts: [a.org]}", "network.mode", "no host is reached"),
        ("session: {post_create: 'cd x;/usr/bin/pip install -r r.txt'}", "session.post_create", '["@pypi"]'),
    ],
)  # fmt: skip
def test_what_is_odd_is_found(files: Files, section: str, where: str, text: str) -> None:
    files.own.write_text(f"sandbox: {{{section}}}\n")
    found = lint_policy(load_policy(files.own))
    assert [one.where for one in found] == [where] and text in found[0].text
    assert isinstance(found[0], Finding)


def test_what_is_not_odd_is_not_found(files: Files) -> None:
    files.own.write_text(
        "sandbox: {filesystem: {allowed_paths: [./src, /tmp/x, /var/tmp/x], denied_paths: [./secrets/, /etc/]}, "
        "commands: {allowed: [git], denied: [git push *, 'g?t x'], require_confirmation: [pip install *]}, "
        "kernel: {capabilities: [chown]}, network: {mode: proxy, allowed_hosts: [a.org]}, "
        "session: {post_create: pip install x}}\n"
    )
    assert lint_policy(load_policy(files.own)) == ()
