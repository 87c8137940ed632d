"""The end of a guest's serial console, for errors: a bounded tail, so that a flood costs nothing."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

KEEP = 16 * 1024  # bytes


class ConsoleTail:
    """Reads a console's socket in the background and keeps its last bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._untrusted = bytearray()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> ConsoleTail:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=2)

    def text(self, lines: int = 20) -> str:
        """The last lines, with everything that a terminal would act on made visible."""
        text = bytes(self._untrusted).decode("utf-8", "replace")
        clean = "".join(char if char.isprintable() or char == "\n" else "·" for char in text)
        return "\n".join(clean.splitlines()[-lines:])

    def _read(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(0.3)
            while not self._stop.is_set():
                try:
                    sock.connect(str(self._path))
                    break
                except OSError:
                    time.sleep(0.02)
            while not self._stop.is_set():
                with suppress(TimeoutError):
                    try:
                        chunk = sock.recv(4096)
                    except ConnectionError:
                        return
                    if not chunk:
                        return
                    self._untrusted += chunk
                    del self._untrusted[:-KEEP]
