"""A QEMU without libvirt and without a guest in it: what the code that reads its memory and streams is tried on."""

from __future__ import annotations

import array
import json
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

MEMORY = 16 << 20


class BareQemu:
    """A paused machine whose memory is a private mapping of a file, as a fork's is.

    loaded: {address: eight bytes} that are written into its memory when it starts.
    """

    def __init__(self, folder: Path, ram: Path, *more: str, loaded: dict[int, bytes] | None = None) -> None:
        self._monitor = folder / f"{ram.name}.qmp"
        argv = [
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", "Westmere", "-nodefaults", "-display", "none", "-S",
            "-object", f"memory-backend-file,id=vmram,mem-path={ram},size={MEMORY},share=off",
            "-machine", "q35,memory-backend=vmram", "-m", "16",
            "-qmp", f"unix:{self._monitor},server=on,wait=off", *more,
        ]  # fmt: skip
        for address, data in (loaded or {}).items():
            value = f"data={int.from_bytes(data, 'little'):#x},data-len={len(data)}"
            argv += ["-device", f"loader,addr={address:#x},{value}"]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.pid = self.process.pid

    def __enter__(self) -> BareQemu:
        self._socket = socket.socket(socket.AF_UNIX)
        for _ in range(200):
            try:
                self._socket.connect(str(self._monitor))
                break
            except OSError:
                time.sleep(0.05)
        self._socket.settimeout(30)
        self._stream = self._socket.makefile("rb")
        self._stream.readline()
        self.qmp("qmp_capabilities")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._stream.close()
        self._socket.close()

    def qmp(self, command: str, fd: int | None = None, **arguments: Any) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        self._socket.sendmsg([message], rights)
        while True:
            answer = json.loads(self._stream.readline())
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, answer

    def stream(self, uri_command: str) -> socket.socket:
        """Our end of a new pair; QEMU is told to use the other for `migrate` or `migrate-incoming`."""
        capability = {"capability": "x-ignore-shared", "state": True}
        self.qmp("migrate-set-capabilities", capabilities=[capability])
        ours, qemus = socket.socketpair()
        ours.settimeout(30)
        with qemus:
            self.qmp("getfd", fd=qemus.fileno(), fdname="stream")
        self.qmp(uri_command, uri="fd:stream")
        return ours

    def migrated(self) -> None:
        """Wait until a stream was written or read."""
        for _ in range(600):
            status = self.qmp("query-migrate").get("status")
            if status == "completed":
                return
            assert status not in ("failed", "cancelled")
            time.sleep(0.02)
        raise AssertionError("not within 12 seconds")

    def memory(self, folder: Path) -> bytes:
        """All of its memory, as QEMU says it is."""
        path = folder / "pmem"
        self.qmp("pmemsave", val=0, size=MEMORY, filename=str(path))
        return path.read_bytes()
