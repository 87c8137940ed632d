"""Where things live on the host, and how names become paths.

One `Layout` is made at the start and passed down; nothing else reads the environment for folders. For root the
FHS folders are used, because QEMU runs as another user there and cannot enter /root; for everyone else the XDG
base directories. `VMSANDBOX_HOME` puts all of it under one folder (tests, several installations).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError, UserInputError

# sockaddr_un.sun_path is 108 bytes with its NUL (unix(7)); libvirt and QEMU refuse more.
MAX_SOCKET_PATH = 107
# What follows a session's name in the path of a socket: "-1a2b3c/control" at most.
_SOCKET_NAME_ROOM = 16

SESSION_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
LEDGER = "ledger.sqlite"  # beside the folders of live sessions and of records
IMAGE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Layout:
    """The folders of one vmsandbox installation on this host (absolute paths).

    images      published images, one folder per image name and digest
    templates   frozen guests, one folder per template key
    live        one folder per running session: everything in it goes when the session goes
    records     one folder per session ever run: its events and manifests, kept
    run         sockets of running sessions (a short path)
    cache       what can be worked out again (KVM proof)
    config      the user's own recipes and settings
    """

    images: Path
    templates: Path
    live: Path
    records: Path
    run: Path
    cache: Path
    config: Path

    @classmethod
    def from_environment(cls, environ: dict[str, str] | None = None, uid: int | None = None) -> Layout:
        """Work the folders out from the environment (VMSANDBOX_HOME, XDG_*) and the user id.

        Raises:
            HostError: the run folder would make socket paths longer than the kernel allows.
        """
        env = dict(os.environ) if environ is None else environ
        user = os.getuid() if uid is None else uid
        if home := env.get("VMSANDBOX_HOME"):
            base = Path(home).absolute()
            layout = cls(
                images=base / "images",
                templates=base / "templates",
                live=base / "live",
                records=base / "records",
                run=base / "run",
                cache=base / "cache",
                config=config_folder(env, user),
            )
        elif user == 0:
            base = Path("/var/lib/vmsandbox")
            layout = cls(
                images=base / "images",
                templates=base / "templates",
                live=base / "live",
                records=base / "records",
                run=Path("/run/vmsandbox"),
                cache=Path("/var/cache/vmsandbox"),
                config=config_folder(env, user),
            )
        else:
            person = Path(env.get("HOME") or "~").expanduser()
            data = Path(env.get("XDG_DATA_HOME") or person / ".local/share") / "vmsandbox"
            state = Path(env.get("XDG_STATE_HOME") or person / ".local/state") / "vmsandbox"
            cache = Path(env.get("XDG_CACHE_HOME") or person / ".cache") / "vmsandbox"
            run = env.get("XDG_RUNTIME_DIR")
            layout = cls(
                images=data / "images",
                templates=cache / "templates",
                live=state / "live",
                records=state / "records",
                run=Path(run) / "vmsandbox" if run else state / "run",
                cache=cache,
                config=config_folder(env, user),
            )
        longest = len(os.fsencode(layout.run)) + 1 + 40 + _SOCKET_NAME_ROOM
        if longest > MAX_SOCKET_PATH:
            raise HostError(
                f"the folder for sockets has too long a path: {layout.run}",
                details=f"a unix socket path may have {MAX_SOCKET_PATH} bytes; this one could need {longest}",
                resolution="set XDG_RUNTIME_DIR (or VMSANDBOX_HOME) to a folder with a shorter path",
            )
        return layout

    @property
    def ledger(self) -> Path:
        """The ledger of this installation (`vmsandbox.ledger`)."""
        return self.live.parent / LEDGER


def config_folder(environ: Mapping[str, str] | None = None, uid: int | None = None) -> Path:
    """`Layout.config` alone, also where a session would have no room for its sockets."""
    env = os.environ if environ is None else environ
    if home := env.get("VMSANDBOX_HOME"):
        return Path(home).absolute() / "config"
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/etc/vmsandbox")
    person = Path(env.get("HOME") or "~").expanduser()
    return Path(env.get("XDG_CONFIG_HOME") or person / ".config") / "vmsandbox"


def checked_session_name(name: str) -> str:
    """A session name that is safe as a folder, domain and host name, or UserInputError."""
    if not SESSION_NAME.fullmatch(name):
        raise UserInputError(
            f"not a session name: {name!r}",
            details="a name has 1 to 40 characters: a-z, 0-9 and '-', with a letter or digit at both ends",
            resolution="choose a name such as 'review-1'",
        )
    return name


def checked_image_name(name: str) -> str:
    """An image name that is safe as a folder name, or UserInputError."""
    if not IMAGE_NAME.fullmatch(name):
        raise UserInputError(
            f"not an image name: {name!r}",
            details="a name has 1 to 40 characters: a-z, 0-9, '.' and '-'",
            resolution="`vmsandbox image ls` shows the images there are",
        )
    return name


def resource_folder(name: str) -> Path:
    """A folder of data that is shipped with vmsandbox (`images`, `cloudinit`): in the wheel or the checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "_data" / name
    return shipped if shipped.is_dir() else package.parent / name
