"""The broker's own Python environment: made once, used only when complete.

Without it, mitmproxy and its forty dependencies would sit beside what holds the person's rights, and their pins would
fight with vmsandbox's own. An environment is never changed: other requirements or another Python make another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsandbox.errors import HostError
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_MAKING = ".making-"
_SECONDS = 900
# pip's own settings may come from these instead of pip.conf; nothing else of the person's environment passes.
_PIP_READS = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY",
              "NO_PROXY", "XDG_CONFIG_DIRS")  # fmt: skip


def environment_key(requirements: Path = REQUIREMENTS) -> str:
    """What an environment is for: these requirements and this interpreter, as 16 hexadecimal digits."""
    what = (requirements.read_bytes(), sys.version.encode(), sys.base_prefix.encode(), platform.machine().encode())
    return hashlib.sha256(b"\0".join(what)).hexdigest()[:16]


def find_environment(layout: Layout) -> Path | None:
    """The environment that fits, or None. One that has lost its interpreter (an upgraded system) does not count."""
    found = layout.cache / "broker" / environment_key()
    return found if os.access(found / "bin" / "python", os.X_OK) and site_packages(found).is_dir() else None


def site_packages(environment: Path) -> Path:
    """Where the environment's packages are."""
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def make_environment(layout: Layout, programs: Programs, monitor: Monitor) -> Path:
    """The environment that fits; made if there is none (minutes, once per host and version).

    Raises:
        HostError: it could not be made: no venv module, or pip failed (its last lines are in the details).
    """
    if (found := find_environment(layout)) is not None:
        return found
    folder = layout.cache / "broker"
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with monitor.step("making the network broker's environment (once)"), _locked(folder / "lock"):
        if (found := find_environment(layout)) is not None:
            return found  # another process made it meanwhile
        for left in folder.glob(f"{_MAKING}*"):
            shutil.rmtree(left, ignore_errors=True)  # interrupted: the lock is ours, so nobody makes it
        wanted = folder / environment_key()
        if wanted.exists():
            shutil.rmtree(wanted)
        making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=folder))
        try:
            _fill(making, programs, monitor)
            making.chmod(0o755)
            making.rename(wanted)
        finally:
            if making.exists():
                shutil.rmtree(making, ignore_errors=True)
        return wanted


def _fill(folder: Path, programs: Programs, monitor: Monitor) -> None:
    """Make the environment in an empty folder. Only its packages and its interpreter's link are used later."""
    try:
        programs.run([sys.executable, "-I", "-m", "venv", folder], timeout=_SECONDS)
    except HostError as error:
        error.brief = "the network broker's environment could not be made"
        error.resolution = "install Python's venv module: `apt install python3-venv`"
        raise
    said: list[str] = []

    def on_line(line: str) -> None:
        said.append(line)
        del said[:-40]

    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in _PIP_READS}
    pip["PIP_NO_INPUT"] = "1"
    monitor.notice("installing mitmproxy for the network broker")
    argv: list[str | Path] = [
        folder / "bin" / "python", "-m", "pip", "install", "--no-warn-script-location", "-r", REQUIREMENTS,
    ]  # fmt: skip
    done = programs.run(argv, timeout=_SECONDS, check=False, env=pip, on_line=on_line)
    if done.status != 0:
        raise HostError(
            "the network broker's packages could not be installed",
            details="\n".join(line for line in said if not line.startswith("WARNING: Location"))[-2000:],
            resolution="see that pip reaches a package index from here (pip.conf, PIP_INDEX_URL, HTTPS_PROXY), "
            "then run `vmsandbox doctor --fix`",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One maker at a time; the kernel lets go of it when a maker dies."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
