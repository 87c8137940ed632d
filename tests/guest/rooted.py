"""Guests whose root is in a test's hands."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from harness import TIMEOUT, Guest

from vmsandbox.policy.values import Policy
from vmsandbox.render.confinement import confinement_of

ROOT_SERVER = """
import json, os, socket, subprocess
server = socket.socket(socket.AF_UNIX)
server.bind("/run/test-root")
os.chmod("/run/test-root", 0o666)
server.listen(8)
while True:
    peer, _ = server.accept()
    with peer, peer.makefile("rwb") as stream:
        script = json.loads(stream.readline())
        done = subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, capture_output=True)
        answer = [done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")]
        stream.write(json.dumps(answer).encode() + b"\\n")
"""

# Stays: to start Python for each script would take longer than most scripts do.
ROOT_CLIENT = """
import socket, sys
for line in sys.stdin:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect("/run/test-root")
    with peer, peer.makefile("rwb") as stream:
        stream.write(line.encode())
        stream.flush()
        print(stream.readline().decode(), end="", flush=True)
"""
ROOT_UNIT = "[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/test-root.py\n"
ROOT_FILES = [
    ["/usr/local/lib/test-root.py", 0o644, ROOT_SERVER],
    ["/etc/systemd/system/test-root.service", 0o644, ROOT_UNIT],
    # the SSH units are started anew when a policy was told
    ["/etc/systemd/system/vmsandbox-ssh@.service.d/test-root.conf", 0o644, "[Unit]\nWants=test-root.service\n"],
]


def with_root(policy: Policy) -> dict[str, Any]:
    """`confinement_of` for tests: what a policy asks of a guest, and a service that does as root what the worker says.

    It makes a template by tailoring: seconds, where another cloud-init seed would cost a cold boot.
    """
    message = confinement_of(policy) or {}
    return {**message, "files": [*message.get("files", ()), *ROOT_FILES], "restart": True}


@dataclass
class RootedGuest(Guest):
    """A guest whose template has, for tests only, a service that lets the worker act as root (`with_root`)."""

    _client: Any = field(default=None, init=False, repr=False, compare=False)

    def root(self, script: str, *, check: bool = True, timeout: float = TIMEOUT) -> str:
        """stdout of a script that the guest's root runs."""
        status, stdout, stderr = json.loads(self._answer(json.dumps(script), timeout))
        assert status == 0 or not check, f"{script}: status {status}: {stderr}"
        return str(stdout).strip()

    def _answer(self, line: str, timeout: float) -> bytes:
        if self._client is None or self._client.closed:
            self._client = self.shell().start(["python3", "-I", "-S", "-c", ROOT_CLIENT])
        self._client.settimeout(timeout)
        self._client.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = self._client.recv(1 << 16)
            assert more, f"the guest's root did not answer: {line[:200]} {self._client.recv_stderr(2000)!r}"
            answer += more
        return answer
