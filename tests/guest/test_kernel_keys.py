"""`kernel.new_privileges`, and several seccomp profiles at once, in real guests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from confined import Inside, project_with_secrets
from harness import Cli

from vmsandbox.policy.values import FilesystemPolicy, KernelPolicy, Policy, SeccompProfile
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.sandbox import Sandbox


def profile(name: str, *calls: str, error: int) -> SeccompProfile:
    """All but these calls, which fail with this error."""
    rule = {"names": list(calls), "action": "SCMP_ACT_ERRNO", "errnoRet": error}
    text = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [rule]}
    return SeccompProfile(Path(name), json.dumps(text))


# A setuid program reads what the worker may not (passwd -S: /etc/shadow); it has the capabilities of a login, no more.
def test_new_privileges_are_for_programs_of_root_and_within_the_bounding_set(cli: Cli) -> None:
    request = SessionRequest(policy=Policy(kernel=KernelPolicy(new_privileges=True)), allow_emulation=True)
    with Sandbox.open(request=request, layout=cli.layout) as sandbox:
        inside = Inside(sandbox)
        assert "policy.enforced" in {record["kind"] for record in sandbox.journal.read()}
        assert inside.sh("grep NoNewPrivs /proc/self/status").split()[1] == "0"
        assert inside.sh("passwd -S").split()[0] == "claude-worker"
        inside.refused(
            "su -c true root", "mount -t tmpfs x /mnt", "umount /proc", "cat /etc/shadow", "newgrp root -c true",
            "unshare -Ur true", "python3 -c 'import os; os.setuid(0)'",
            "cp /usr/bin/id ~/id && chmod 6755 ~/id && [ $(~/id -u) = 0 ]",
        )  # fmt: skip


@pytest.fixture(scope="module")
def filtered(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """A guest with two profiles, one of which keeps bash from asking what may be written."""
    kernel = KernelPolicy(
        seccomp=(
            profile("one.json", "symlink", "symlinkat", error=95),
            profile("two.json", "faccessat2", "link", "linkat", error=1),
        )
    )  # fmt: skip
    files = FilesystemPolicy(allowed_paths=("./src", "/tmp"), denied_paths=("./secrets", "~/.ssh"))
    request = SessionRequest(policy=Policy(kernel=kernel, filesystem=files), allow_emulation=True)
    project = project_with_secrets(tmp_path_factory.mktemp("filtered"))
    with Sandbox.open(project, request=request, layout=cli.layout) as sandbox:
        yield Inside(sandbox)


def test_several_profiles_hold_at_once(filtered: Inside) -> None:
    status = dict(line.partition(":\t")[::2] for line in filtered.sh("cat /proc/self/status").splitlines())
    assert status["Seccomp"] == "2" and int(status["Seccomp_filters"]) >= 2 and status["NoNewPrivs"] == "1"
    for script, error in (
        ("ln -s a src/l", "not supported"),
        ("ln src/app.py src/hard", "not permitted"),
        ("setpriv --no-new-privs ln -s a src/l", "not supported"),
        ("env -i VMSANDBOX_PLUMBING=1 bash -lc 'ln src/app.py src/hard'", "not permitted"),
    ):
        code, _out, said = filtered.try_(script)
        assert code != 0 and error in said, (script, said)


def test_what_may_be_written_is_read_back_without_the_call_that_asks(filtered: Inside) -> None:
    assert filtered.try_("[ -w / ] || [ -r / ]")[0] != 0, "or the test shows nothing"
    enforced = [record["data"] for record in filtered.sandbox.journal.read() if record["kind"] == "policy.enforced"]
    assert len(enforced) == 1
    filtered.sh("echo x > src/new && rm src/new")
    filtered.refused("echo x > README.md", "ls secrets", "ls ~/.ssh", "echo x > ~/x")
