"""Ordinary SSH clients through `ssh-config`: ssh, ssh -t, scp, rsync; a guest with another key is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Guest, make_tree


class Clients:
    """Runs stock programs with the guest's ssh-config."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        self.host = f"vmsandbox-{guest.name}"
        self.config = folder / "ssh_config"
        self.config.write_bytes(guest.cli("ssh-config", guest.name).stdout)

    def __call__(self, *words: str, stdin: bytes = b"", status: int = 0) -> subprocess.CompletedProcess[bytes]:
        if shutil.which(words[0]) is None:
            pytest.skip(f"{words[0]} is not installed")
        env = self.guest.cli.environment
        done = subprocess.run(words, input=stdin, capture_output=True, timeout=90, env=env)
        assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
        return done


@pytest.fixture(scope="module")
def clients(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return Clients(guest, tmp_path_factory.mktemp("clients"))


def test_ssh(clients: Clients) -> None:
    done = clients("ssh", "-F", str(clients.config), clients.host, "whoami; echo err >&2; exit 3", status=3)
    assert (done.stdout, done.stderr) == (b"claude-worker\n", b"err\n")
    done = clients("ssh", "-tt", "-F", str(clients.config), clients.host, "tty")
    assert done.stdout.startswith(b"/dev/pts/")


def test_scp_and_rsync_both_ways(clients: Clients, tmp_path: Path) -> None:
    files = {"a b.txt": "text", "deep/data.bin": os.urandom(300_000), "ü.txt": "umlaut"}
    tree = make_tree(tmp_path / "tree", files)
    for program, options in (
        ("scp", ["-rq", "-F", str(clients.config)]),
        ("rsync", ["-a", "-e", f"ssh -F {clients.config}"]),
    ):
        there, back = f"{clients.host}:{program}-copy", tmp_path / program
        clients(program, *options, f"{tree}/" if program == "rsync" else str(tree), there)
        clients(program, *options, f"{there}/" if program == "rsync" else there, str(back))
        for name in files:
            assert (back / name).read_bytes() == (tree / name).read_bytes(), (program, name)
        clients.guest.run("rm", "-rf", f"/home/claude-worker/{program}-copy")


def test_another_host_key_is_refused(clients: Clients, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    known = tmp_path / "known_hosts"
    known.write_text(f"{clients.host} {(tmp_path / 'key.pub').read_text()}")
    config = tmp_path / "config"
    ours = str(clients.guest.folder.known_hosts_file)
    assert ours in clients.config.read_text()
    config.write_text(clients.config.read_text().replace(ours, str(known)))
    done = clients("ssh", "-F", str(config), clients.host, "true", status=255)
    assert b"verification failed" in done.stderr


def test_the_config_offers_nothing_of_the_persons_own(clients: Clients) -> None:
    options = dict(line.strip().split(" ", 1) for line in clients.config.read_text().splitlines())
    assert options["IdentitiesOnly"] == "yes" and options["IdentityAgent"] == "none"
    assert options["StrictHostKeyChecking"] == "yes" and options["GlobalKnownHostsFile"] == "none"
    assert options["ForwardAgent"] == options["ForwardX11"] == options["UpdateHostKeys"] == "no"


def test_the_guest_gets_no_agent_and_no_display(clients: Clients) -> None:
    ask = ["ssh", "-A", "-X", "-F", str(clients.config), clients.host, "echo $SSH_AUTH_SOCK$DISPLAY"]
    assert clients(*ask).stdout.strip() == b""


def test_a_shell_an_exec_and_a_stock_client_at_once(clients: Clients) -> None:
    ssh = subprocess.Popen(
        ["ssh", "-F", str(clients.config), clients.host, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=clients.guest.cli.environment,
    )  # fmt: skip
    shell = clients.guest.cli.start("shell", clients.guest.name, stdin=subprocess.PIPE)
    try:
        assert clients.guest.exec("echo", "three").stdout == b"three\n"
        assert shell.communicate(b"echo two\n", timeout=60)[0] == b"two\n"
        assert ssh.communicate(b"one\n", timeout=60)[0] == b"one\n"
    finally:
        for process in (ssh, shell):
            process.kill()
            process.wait()
