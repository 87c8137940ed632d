"""Templates: what one is made from, what it consists of, and where they are kept.

A template is a guest booted once with its cloud-init seed and frozen with its memory (`making`). Its key is the hash
of all that went into it, so a template is never stale: it is the right one or there is none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vmsandbox.errors import ImageError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.files import sha256_of, stamp_of
from vmsandbox.hypervisor.launch import Machine, create_overlay, disk_errors
from vmsandbox.ledger.book import Ledger
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.removal import put_aside
from vmsandbox.render import domain as domain_module
from vmsandbox.render import seed as seed_module
from vmsandbox.spec import Accelerator, GuestShape

_MAKERS = (
    Path(__file__),
    Path(__file__).with_name("making.py"),
    Path(__file__).with_name("freezing.py"),
    Path(domain_module.__file__),
    Path(seed_module.__file__),
)
DISK, RAM, STATE, INITRD = "disk.qcow2", "ram", "state", "initrd"


@dataclass(frozen=True)
class ImageFiles:
    """What a template needs of an image: its name, digest, and three files (raw root, kernel, initramfs)."""

    name: str
    digest: str
    root: Path
    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class TemplatePlan:
    """All inputs of a template. `key` is their hash.

    cloudinit      the folder that the seed is rendered from
    seed_archive   renders it to a cpio archive; called only when the template has to be made
    """

    image: ImageFiles
    shape: GuestShape
    machine: Machine
    cloudinit: Path
    seed_archive: Callable[[], bytes]

    @cached_property
    def key(self) -> str:
        """SHA-256 over every input, in hexadecimal (the first 32 characters)."""
        inputs = {
            "image": self.image.digest,
            "shape": asdict(self.shape),
            "machine": self.machine.type,
            "qemu": self.machine.qemu_version,
            "seed": _digests_below(self.cloudinit),
            # how the seed, the domain and this frozen state are made; cheaper to hash than to version
            "code": {path.name: sha256_of(path) for path in _MAKERS},
            # host-passthrough: a frozen guest fits only the processor that it was booted on
            "cpu": _host_cpu() if self.shape.accelerator is Accelerator.KVM else "emulated",
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def facts(self) -> dict[str, Any]:
        """What it is made from, for people."""
        return {
            "image": {"name": self.image.name, "digest": self.image.digest},
            "shape": asdict(self.shape),
            "qemu": self.machine.qemu_version,
            "machine": self.machine.type,
        }


@dataclass(frozen=True)
class Template:
    """A published template: its key, folder, and the digests of its files. base: what it was tailored from, if so."""

    key: str
    folder: Path
    digests: dict[str, str]
    seconds: float
    base: Template | None = None

    @property
    def published_key(self) -> str:
        """The key of what `TemplateStore` has of it."""
        return self.key

    @property
    def disk(self) -> Path:
        """qcow2 overlay on what is below: what the first boot, or the tailoring, wrote."""
        return self.folder / DISK

    @property
    def disks(self) -> tuple[Path, ...]:
        """The qcow2 overlays of it, the last first; the image is below them."""
        return (self.disk, *(self.base.disks if self.base else ()))

    @property
    def ram(self) -> Path:
        """The guest's memory, one sparse file."""
        return self.folder / RAM

    @property
    def state(self) -> Path:
        """QEMU's device state (migration stream without memory)."""
        return self.folder / STATE

    @property
    def initrd(self) -> Path:
        """The image's initramfs with the seed appended."""
        return self.folder / INITRD

    def make_disk(self, path: Path, programs: Programs) -> None:
        """A fork's own disk, which stands on `disks`. Raises HostError, OSError."""
        create_overlay(programs, path, self.disk, "qcow2")


class TemplateStore:
    """The templates on this host."""

    def __init__(self, layout: Layout) -> None:
        self.folder = layout.templates
        self.run = layout.run
        self.ledger = Ledger.of(layout)

    def find(self, key: str, *, thoroughly: bool = False) -> Template | None:
        """The template with this key if it is there and unchanged since it was frozen.

        thoroughly: by the digests of its bytes, also where the files' stamps say that nobody wrote to them.

        Raises:
            ImageError: a file of it was changed.
        """
        folder = self.folder / key
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError):
            return None
        if changed := changed_file(folder, manifest, sha256_of, thoroughly):
            raise ImageError(
                f"the template {key[:12]} was changed after it was made",
                details=f"{changed} does not have the digest in its manifest",
                resolution="`vmsandbox gc --templates` removes it; the next session makes a new one",
            )
        base = self.find(manifest["base"], thoroughly=thoroughly) if manifest.get("base") else None
        if manifest.get("base") and base is None:
            return None
        with suppress(OSError):
            os.utime(folder / "manifest.json")  # when it was last used, for `gc`
        return Template(key, folder, manifest["digests"], manifest["seconds"], base)

    def base_of(self, key: str) -> str | None:
        """The key of the template that this one was tailored from, if it was."""
        with suppress(OSError, ValueError, AttributeError):
            base = json.loads((self.folder / key / "manifest.json").read_text()).get("base")
            return base if isinstance(base, str) else None
        return None

    def bases_of(self, key: str) -> tuple[str, ...]:
        """The keys of all templates that this one stands on, the next one first."""
        found: list[str] = []
        below = self.base_of(key)
        while below is not None and below not in found:
            found.append(below)
            below = self.base_of(below)
        return tuple(found)

    def list(self) -> list[Path]:
        """Folders of the published templates."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name[0] != ".")

    def remove(self, key: str) -> None:
        """Delete a template, or what is left of one. Forks that run keep what they have opened. Raises OSError."""
        gone = put_aside(self.folder / key)
        failpoint("template.gone")
        shutil.rmtree(gone)

    @contextmanager
    def making(self, folder: Path) -> Iterator[None]:
        """Show that this process is making a template: `gc` leaves its folder and its guest alone."""
        path = making_lock(folder)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(fd)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Only one process makes a template; the others wait (`waiting` is called once) and then use it."""
        with disk_errors("making the templates folder"):
            self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
            fd = os.open(self.folder / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def making_lock(folder: Path) -> Path:
    """What is locked as long as a template is made in this folder."""
    return folder.with_name(folder.name + ".lock")


def changed_file(
    folder: Path, manifest: dict[str, Any], digest_of: Callable[[Path], str], always: bool = False
) -> Path | None:
    """The first file of a folder that is not what its manifest says (`stamps`, `digests`), None if all are.

    Stamps are looked at first: a copied or restored folder has new ones but may hold the same bytes.

    always: work out the digests whatever the stamps say.
    """
    for name, stamp in manifest["stamps"].items():
        path: Path = folder / name
        with suppress(OSError):
            if not always and list(stamp_of(path)) == stamp:
                continue
            if path.is_file() and not path.is_symlink() and digest_of(path) == manifest["digests"][name]:
                continue
        return path
    return None


def _digests_below(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "__pycache__")
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def _host_cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
