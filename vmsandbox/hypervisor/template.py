"""Templates: a guest booted once with its cloud-init seed, then frozen with its memory.

cloud-init and a cold boot take half a minute under emulation; a fork of a template takes a second. The key of a
template is the hash of all that went into it, so a template is never stale: it is the right one or there is none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from vmsandbox.errors import GuestError, HostError, ImageError, VmsandboxError
from vmsandbox.guest.control import ControlPort
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.console import ConsoleTail
from vmsandbox.hypervisor.files import dig_holes, new_sparse, sha256_of, stamp_of
from vmsandbox.hypervisor.launch import Machine, choose_user, disk_errors, give, own_folder
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.render import domain as domain_module
from vmsandbox.render import seed as seed_module
from vmsandbox.render.domain import DiskImage, DomainPlan, render_domain
from vmsandbox.spec import Accelerator, GuestShape

_MAKERS = (Path(__file__), Path(domain_module.__file__), Path(seed_module.__file__))
BOOT_DEADLINE = 300  # seconds; emulation on a busy machine is slow
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


@dataclass(frozen=True)
class Template:
    """A published template: its key, folder, and the digests of its files."""

    key: str
    folder: Path
    digests: dict[str, str]
    seconds: float

    @property
    def disk(self) -> Path:
        """qcow2 overlay on the image: what the first boot wrote."""
        return self.folder / DISK

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


class TemplateStore:
    """The templates on this host."""

    def __init__(self, layout: Layout) -> None:
        self.folder = layout.templates
        self.run = layout.run

    def find(self, key: str) -> Template | None:
        """The template with this key if it is there and unchanged since it was frozen.

        Raises:
            ImageError: a file of it was changed.
        """
        folder = self.folder / key
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except OSError:
            return None
        for name, stamp in manifest["stamps"].items():
            try:
                same = list(stamp_of(folder / name)) == stamp
            except OSError:
                same = False
            if not same and not self._same_content(folder, name, manifest):
                raise ImageError(
                    f"the template {key[:12]} was changed after it was made",
                    details=f"{folder / name} does not have the digest in its manifest",
                    resolution="`vmsandbox gc --templates` removes it; the next session makes a new one",
                )
        with suppress(OSError):
            os.utime(folder / "manifest.json")  # when it was last used, for `gc`
        return Template(key, folder, manifest["digests"], manifest["seconds"])

    def _same_content(self, folder: Path, name: str, manifest: dict[str, dict[str, str]]) -> bool:
        """A copied or restored folder has new stamps but may hold the same bytes."""
        path = folder / name
        return path.is_file() and not path.is_symlink() and sha256_of(path) == manifest["digests"][name]

    def list(self) -> list[Path]:
        """Folders of the published templates."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name[0] != ".")

    def remove(self, key: str) -> None:
        """Delete a template. Forks that run keep what they have opened."""
        shutil.rmtree(self.folder / key)

    @contextmanager
    def making(self, folder: Path) -> Iterator[None]:
        """Show that this process is making a template: `gc` leaves its folder and its guest alone."""
        path = folder.with_name(folder.name + ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            path.unlink(missing_ok=True)
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


def obtain_template(
    host: Host, plan: TemplatePlan, store: TemplateStore, programs: Programs, monitor: Monitor
) -> Template:
    """The template for these inputs: found, or made now.

    Raises:
        GuestError: the guest did not come up (the error carries the console's tail).
        ImageError: the template was tampered with.
        HostError: libvirt, QEMU or the disk failed.
    """
    if found := store.find(plan.key):
        return found
    waiting = "another vmsandbox is making the same template; waiting for it"
    with store.lock(plan.key, lambda: monitor.notice(waiting)):
        if found := store.find(plan.key):
            return found
        return _make(host, plan, store, programs, monitor)


def _make(host: Host, plan: TemplatePlan, store: TemplateStore, programs: Programs, monitor: Monitor) -> Template:
    started = time.monotonic()
    uuid = str(uuids.uuid4())
    making = store.folder / f".making-{uuid}"
    run = store.run / f"t-{uuid[:8]}"
    user = choose_user(host, plan.shape)
    domain = _domain_plan(plan, uuid, making, run, user)
    try:
        with (
            monitor.step(f"making template {plan.key[:12]} (first use of this image and shape)"),
            disk_errors("making the template's files"),
            store.making(making),
        ):
            store.run.mkdir(mode=0o711, parents=True, exist_ok=True)
            own_folder(making, user)
            own_folder(run, user)
            _prepare_files(plan, domain, programs, user)
            host.create(render_domain(domain), paused=False)
            _boot(host, domain, monitor)
            _freeze(host, uuid, making / STATE)
            host.destroy(uuid)
            monitor.progress(0.95, 1, "computing digests")
            return _publish(plan, store, making, time.monotonic() - started)
    finally:
        with suppress(VmsandboxError):
            host.destroy(uuid)
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)


def _domain_plan(plan: TemplatePlan, uuid: str, making: Path, run: Path, user: tuple[int, int] | None) -> DomainPlan:
    return DomainPlan(
        name=f"vmsandbox-template-{uuid[:8]}",
        uuid=uuid,
        genid=str(uuids.uuid4()),
        shape=plan.shape,
        machine=plan.machine.type,
        emulator=plan.machine.emulator,
        kernel=plan.image.kernel,
        initrd=making / INITRD,
        disk_chain=(DiskImage(making / DISK, "qcow2"), DiskImage(plan.image.root, "raw")),
        run_folder=run,
        ram=making / RAM,
        ram_share=True,
        ram_readonly=False,
        incoming=False,
        session_id=f"template:{making.name}",
        home=making.parent,
        run_as=user,
    )


def _prepare_files(plan: TemplatePlan, domain: DomainPlan, programs: Programs, user: tuple[int, int] | None) -> None:
    initrd = plan.image.initrd.read_bytes()
    # Archives follow each other at multiples of 512 bytes (the kernel's initramfs buffer format).
    domain.initrd.write_bytes(initrd + bytes(-len(initrd) % 512) + plan.seed_archive())
    disk = domain.disk_chain[0].path
    create_overlay(programs, disk, plan.image.root, "raw")
    new_sparse(domain.ram, plan.shape.memory_mib * 1024 * 1024)
    for path in (domain.initrd, disk, domain.ram):
        give(path, user)


def create_overlay(programs: Programs, overlay: Path, backing: Path, backing_format: str) -> None:
    """A qcow2 file that holds what differs from `backing` (whose format is named, never probed)."""
    programs.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=off,lazy_refcounts=on",
         "-b", backing, "-F", backing_format, overlay],
        timeout=30,
    )  # fmt: skip
    overlay.chmod(0o600)


def _boot(host: Host, domain: DomainPlan, monitor: Monitor) -> None:
    """Wait until cloud-init is done and the guest has made itself small."""
    until = time.monotonic() + BOOT_DEADLINE
    with ConsoleTail(domain.console_socket) as console, closing(ControlPort(domain.control_socket)) as port:
        try:
            port.connect(10)
            monitor.progress(0.1, 1, "booting and running cloud-init")
            untrusted = _wait_for_hello(host, domain, port, until, monitor)
            if untrusted.get("cloud_init") != "done" or untrusted.get("errors"):
                raise GuestError("cloud-init failed in the template", details=repr(untrusted)[:2000])
            monitor.progress(0.8, 1, "warming up and shrinking its memory")
            port.request("settle", deadline=max(until - time.monotonic(), 1))
            # Frozen with the control port connected, as a fork will have it: no event wakes the guest.
            host.suspend(domain.uuid)
        except VmsandboxError as error:
            tail = console.text()
            raise GuestError(
                "the guest did not come up to become a template",
                details=f"{error.brief}\n{error.details}\n--- the end of its console ---\n{tail or '(silent)'}",
                resolution="`vmsandbox image verify` checks the image; a slow machine may need a second try",
            ) from error


def _wait_for_hello(
    host: Host, domain: DomainPlan, port: ControlPort, until: float, monitor: Monitor
) -> dict[str, object]:
    begin = time.monotonic()
    result: list[dict[str, object] | VmsandboxError] = []

    def ask() -> None:
        try:
            result.append(port.request("hello", deadline=max(until - time.monotonic(), 1)))
        except VmsandboxError as error:
            result.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while asking.is_alive():
        asking.join(0.5)
        monitor.progress(min(0.1 + (time.monotonic() - begin) / 60, 0.75), 1, "booting and running cloud-init")
        if asking.is_alive() and not host.is_active(domain.uuid):
            raise GuestError("the guest ended while it booted")
    if isinstance(result[0], VmsandboxError):
        raise result[0]
    return result[0]


def _freeze(host: Host, uuid: str, state: Path) -> None:
    """Save the device state; the memory is already in its file."""
    host.qmp(
        uuid,
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
    )
    ours, qemus = socket.socketpair()
    chunks: list[bytes] = []

    def drain() -> None:
        while chunk := ours.recv(1 << 20):
            chunks.append(chunk)

    with ours:
        with qemus:
            host.qmp(uuid, "getfd", {"fdname": "freeze"}, fd=qemus.fileno())
        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        host.qmp(uuid, "migrate", {"uri": "fd:freeze"})
        host.migration_finished(uuid, deadline=60)
        reader.join(timeout=30)
        if reader.is_alive():
            raise HostError("QEMU did not finish writing the template's state")
    state.write_bytes(b"".join(chunks))


def _publish(plan: TemplatePlan, store: TemplateStore, making: Path, seconds: float) -> Template:
    dig_holes(making / RAM)
    digests = {name: sha256_of(making / name) for name in (DISK, RAM, STATE, INITRD)}
    for name in digests:
        os.chown(making / name, os.geteuid(), os.getegid())
        (making / name).chmod(0o444)
    stamps = {name: stamp_of(making / name) for name in digests}
    manifest = {
        "key": plan.key,
        "image": {"name": plan.image.name, "digest": plan.image.digest},
        "shape": asdict(plan.shape),
        "qemu": plan.machine.qemu_version,
        "machine": plan.machine.type,
        "digests": digests,
        "stamps": stamps,
        "seconds": round(seconds, 2),
    }
    (making / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    os.chown(making, os.geteuid(), os.getegid())
    making.chmod(0o755)
    making.rename(store.folder / plan.key)
    return Template(plan.key, store.folder / plan.key, digests, seconds)


def _digests_below(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def _host_cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
