"""ssh-config and proxy: how ordinary SSH clients (ssh, scp, rsync, editors, testinfra) reach a guest."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from contextlib import suppress

import typer

from vmsandbox.cli.options import NameArgument
from vmsandbox.guest.control import connect_ssh
from vmsandbox.paths import Layout
from vmsandbox.session.state.activity import note_activity
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.spec import WORKER

_PIECE = 256 * 1024
_KEEPALIVE = 256  # bytes: what clients and servers send by themselves is less, and is no activity


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("ssh-config")(ssh_config)
    app.command("proxy")(proxy)


def ssh_config(name: NameArgument) -> int:
    """Print an ssh_config(5) block for a session: `vmsandbox ssh-config N > F; ssh -F F vmsandbox-N`."""
    layout = Layout.from_environment()
    folder = SessionFolder(layout, name)
    folder.keys()
    environment = ["env", f"VMSANDBOX_HOME={layout.live.parent}"] if "VMSANDBOX_HOME" in os.environ else []
    proxy_command = shlex.join([*environment, sys.executable, "-I", "-m", "vmsandbox", "proxy", name])
    options = {
        "User": WORKER,
        "ProxyCommand": proxy_command.replace("%", "%%"),
        "IdentityFile": _quoted(folder.identity_file),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "UserKnownHostsFile": _quoted(folder.known_hosts_file),
        "GlobalKnownHostsFile": "none",
        "StrictHostKeyChecking": "yes",
        "HostKeyAlgorithms": "ssh-ed25519",
        "PreferredAuthentications": "publickey",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "UpdateHostKeys": "no",
        # Also against lost wake-ups in an emulated guest (guest/ssh.py); it is not for ending slow connections.
        "ServerAliveInterval": "1",
        "ServerAliveCountMax": "600",
        "LogLevel": "ERROR",
    }
    print(f"Host {folder.ssh_host}")
    for key, value in options.items():
        print(f"    {key} {value}")
    return 0


def proxy(name: NameArgument) -> int:
    """Join stdin and stdout to a free SSH port of the guest (for ProxyCommand)."""
    folder = SessionFolder(Layout.from_environment(), name)
    info = folder.info()

    def noted(data: bytes) -> None:
        if len(data) > _KEEPALIVE:
            note_activity(folder)

    note_activity(folder)
    with folder.ssh_port(info.ssh_ports) as port, connect_ssh(folder.ssh_socket(port), 30) as sock:
        sock.settimeout(None)

        def upwards() -> None:
            with suppress(OSError):
                while data := os.read(0, _PIECE):
                    sock.sendall(data)
                    noted(data)
            # The client has gone. A port knows no half-close: hang up, and the guest's sshd ends.
            with suppress(OSError):
                sock.shutdown(2)

        threading.Thread(target=upwards, daemon=True).start()
        with suppress(OSError):
            while data := sock.recv(_PIECE):
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view) :]
                noted(data)
    return 0


def _quoted(path: object) -> str:
    return '"' + str(path).replace("%", "%%") + '"'
