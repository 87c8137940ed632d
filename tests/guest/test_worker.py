"""The worker's account, by testinfra over the same ssh-config that a compliance check would use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Guest

testinfra = pytest.importorskip("testinfra")


@pytest.fixture(scope="module")
def inside(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = tmp_path_factory.mktemp("testinfra") / "ssh_config"
    # One connection for all checks: a login of its own for each costs half a second.
    config.write_bytes(guest.cli("ssh-config", guest.name).stdout)
    control = f"    ControlMaster auto\n    ControlPath {config.parent}/c\n    ControlPersist 60\n"
    config.write_text(config.read_text() + control)
    patch = pytest.MonkeyPatch()
    for name, value in guest.cli.environment.items():
        patch.setenv(name, value)
    host = testinfra.get_host(f"ssh://vmsandbox-{guest.name}?ssh_config={config}")
    yield host
    import subprocess

    subprocess.run(["ssh", "-F", str(config), "-O", "exit", f"vmsandbox-{guest.name}"], capture_output=True, timeout=30)
    patch.undo()


def test_the_account(inside: Any) -> None:
    user = inside.user("claude-worker")
    assert user.exists and user.uid == 1000 and user.shell == "/bin/bash"
    assert user.groups == ["claude-worker"], "a group may give rights"
    assert inside.user().name == "claude-worker"


@pytest.mark.parametrize(
    ("path", "mode"),
    [("", 0o700), ("/projects", 0o700), ("/.claude", 0o500)],
)
def test_folders_are_the_workers_alone(inside: Any, path: str, mode: int) -> None:
    folder = inside.file(f"/home/claude-worker{path}")
    assert folder.is_directory
    assert (folder.user, folder.group, folder.mode) == ("claude-worker", "claude-worker", mode)


def test_it_cannot_become_root(inside: Any) -> None:
    for attempt in (
        "sudo -n true",
        "su -c true",
        "su - -c true",
        "pkexec true",
        "doas -n true",
        "systemctl --no-ask-password reboot",
        "systemctl --no-ask-password stop vmsandbox-control",
        "unshare -U -r chroot / chown root /etc/hostname",
        "mount -t tmpfs none /mnt",
        "python3 -c 'import os; os.setuid(0)'",
        "dd if=/dev/vda of=/dev/null count=1",
        "cat /etc/shadow",
        "ls /root",
        "echo x > /etc/passwd",
        "kill -9 1",
        "touch /usr/lib/vmsandbox/vmsandbox-return",
        "cat /run/vmsandbox/ssh_host_ed25519_key",
        "echo x >> /run/vmsandbox/authorized_keys",
        "insmod /dev/null",
        "chmod 700 /etc",
    ):
        done = inside.run(f"({attempt}) </dev/null")
        assert done.rc != 0, f"{attempt}: {done.stdout}{done.stderr}"
    assert "claude-worker" in inside.check_output("id -un")
    capabilities = inside.check_output("grep CapEff /proc/self/status")
    assert set(capabilities.split()[1]) == {"0"}


def test_no_setuid_program_helps(inside: Any) -> None:
    found = inside.run("find / -xdev -perm -4000 -type f 2>/dev/null").stdout.split()
    dangerous = {"sudo", "pkexec", "doas", "bash", "dash", "python3", "env", "find", "cp"}
    assert not dangerous & {Path(path).name for path in found}


def test_there_is_no_password(inside: Any) -> None:
    assert inside.run("passwd -S").stdout.split()[1:2] != ["NP"], "an empty password"
    for guess in ("", "claude-worker", "password"):
        assert inside.run(f"echo {guess} | su claude-worker -c true").rc != 0


def test_the_seed_is_gone(inside: Any) -> None:
    for path in ("/var/lib/cloud/seed/nocloud", "/seed", "/run/cloud-init/instance-data-sensitive.json"):
        assert inside.run(f"cat {path} {path}/user-data").rc != 0, path


def test_sshd_lets_in_the_key_alone(inside: Any) -> None:
    config = inside.file("/etc/vmsandbox/sshd_config")
    assert (config.user, config.mode) == ("root", 0o644)
    settings = dict(line.split(None, 1) for line in config.content_string.splitlines() if line and line[0] != "#")
    assert settings["PermitRootLogin"] == settings["PasswordAuthentication"] == "no"
    assert settings["KbdInteractiveAuthentication"] == settings["PermitUserEnvironment"] == "no"
    assert settings["AuthenticationMethods"] == "publickey" and settings["AllowUsers"] == "claude-worker"
    assert settings["AllowAgentForwarding"] == settings["X11Forwarding"] == settings["PermitTunnel"] == "no"
    assert inside.run("ss -Hltn").stdout.strip() == "", "something listens for TCP"


def test_the_programs_it_runs_through_are_roots(inside: Any) -> None:
    programs = ("vmsandbox-control", "vmsandbox-return", "vmsandbox_return.py", "ssh-port")
    for path in (*(f"/usr/lib/vmsandbox/{name}" for name in programs), "/etc/systemd/system/vmsandbox-ssh@.service"):
        file = inside.file(path)
        assert file.user == "root" and file.mode & 0o022 == 0, path
    assert "vmsandbox_return." in inside.run("ls /usr/lib/vmsandbox/__pycache__").stdout, "it is not compiled"
