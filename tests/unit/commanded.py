"""A guest's supervisor and launcher, for real on this kernel: root starts them, an unprivileged user is judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vmsandbox.paths import resource_folder

GUEST = resource_folder("cloudinit") / "guest"
WORKER = 61234  # no account has it
_SUPERVISOR = """
import json, sys
sys.path.insert(0, sys.argv[1])
import vmsandbox_supervisor as it
it.Supervisor(json.load(open(sys.argv[2])), port=sys.argv[4]).serve(it.listen(sys.argv[3]))
"""
_LAUNCHER = """
import sys
sys.path.insert(0, sys.argv[1])
sys.argv[1:2] = ["--socket"]
import vmsandbox_launcher as it
it.main()
"""


def can_supervise() -> bool:
    """Root, and a kernel that lets a filter have a listener."""
    return os.geteuid() == 0 and shutil.which("setpriv") is not None and os.uname().machine == "x86_64"


class Commanded:
    """A folder of the worker's, and a supervisor with these rules. port: where it asks (a path)."""

    def __init__(self, port: str = "/nonexistent", seconds: float = 5, **layer: list[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmsb-c"))
        self.folder.chmod(0o711)
        self.home = self.folder / "home"
        self.home.mkdir(mode=0o755)
        os.chown(self.home, WORKER, WORKER)
        self.rules = self.folder / "rules.json"
        self.rules.write_text(json.dumps({"confirm_seconds": seconds, "layers": [layer]}))
        self.socket = self.folder / "socket"
        self.port = port
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-I", "-B", "-c", _SUPERVISOR, GUEST, self.rules, self.socket, self.port]
        self.supervisor = subprocess.Popen(words, cwd="/")
        until = time.monotonic() + 20
        while not self.socket.exists():
            assert self.supervisor.poll() is None and time.monotonic() < until
            time.sleep(0.01)

    def kill(self) -> None:
        self.supervisor.send_signal(signal.SIGKILL)
        self.supervisor.wait()
        self.socket.unlink()

    def begin(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as the worker, in its home."""
        words = [sys.executable, "-I", "-B", "-c", _LAUNCHER, GUEST, self.socket, "/usr/bin/setpriv"]
        words += ["--reuid", str(WORKER), "--regid", str(WORKER), "--clear-groups", "--no-new-privs", *argv]
        pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), "LC_ALL": "C"}
        return subprocess.Popen(words, **{**pipe, "cwd": self.home, "env": env, **options})

    def run(self, *argv: str, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.begin(*argv, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(
            argv, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        )

    def sh(self, script: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("/bin/sh", "-c", script, **options)

    def close(self) -> None:
        if self.supervisor.poll() is None:
            self.kill()
        shutil.rmtree(self.folder)
