"""What a policy's command rules put into a guest: the rules, and the two units that make them hold.

Pure; a golden file shows it. The programs themselves are in every template (cloudinit/files.yaml), where nothing starts
them: a guest without command rules has no filter on its system calls and no supervisor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from vmsandbox.policy.values import CommandsPolicy

RULES = "/etc/vmsandbox/commands.json"
UNIT = "vmsandbox-commands.service"
DROP_IN = "/etc/systemd/system/vmsandbox-ssh@.service.d/commands.conf"

# FileDescriptorStoreMax: systemd keeps the listeners of what runs, so that a supervisor that died leaves nothing behind
# that can run no program any more. Until it is back the kernel lets every execve wait; after a stop, it fails.
_SUPERVISOR = """\
[Unit]
Description=vmsandbox: judges every command of the worker
StartLimitIntervalSec=0

[Service]
Type=simple
ExecStart=/usr/lib/vmsandbox/vmsandbox-supervisor
NotifyAccess=main
FileDescriptorStoreMax=256
Restart=always
RestartSec=0
OOMScoreAdjust=-900
Nice=-5
CPUWeight=1000
TasksMax=8
"""

# A connection without the supervisor would be one without rules: the launcher waits for it, and starts nothing else.
_LAUNCHED = f"""\
[Unit]
Wants={UNIT}
After={UNIT}

[Service]
ExecStart=
ExecStart=/usr/lib/vmsandbox/vmsandbox-launcher /usr/lib/vmsandbox/ssh-port %i
"""


def command_files(commands: CommandsPolicy) -> list[tuple[str, int, str]]:
    """[(path in the guest, mode, text)…] for the policy's message; empty where there are no command rules."""
    layers = list(_layers(commands))
    if not any(any(layer.values()) for layer in layers):
        return []
    rules = {"confirm_seconds": commands.confirm_seconds, "layers": layers}
    return [
        (RULES, 0o644, json.dumps(rules, indent=1) + "\n"),
        (f"/etc/systemd/system/{UNIT}", 0o644, _SUPERVISOR),
        (DROP_IN, 0o644, _LAUNCHED),
    ]


def _layers(commands: CommandsPolicy) -> Iterator[dict[str, list[str]]]:
    """The policy and what it stands within, each of which has to allow a command."""
    yield {
        "allowed": list(commands.allowed),
        "denied": list(commands.denied),
        "require_confirmation": list(commands.require_confirmation),
    }
    for wider in commands.within:
        yield from _layers(wider)
