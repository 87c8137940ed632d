"""Build an image from a recipe and publish it, whole or not at all.

Everything is made in `<images>/<name>/.building-<random>`; one rename publishes the folder under its digest,
another one swaps `current`. Builders of one name take turns. An interrupted build removes its folder; what a
killed one leaves is removed by the next builder or by `gc`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from vmsandbox.errors import HostError, ImageError
from vmsandbox.failpoints import failpoint
from vmsandbox.image.debian import BuildPlaces, Mirrors, make_parts
from vmsandbox.image.initramfs import small_initramfs
from vmsandbox.image.manifest import (
    FILES,
    INITRD,
    KERNEL,
    MANIFEST,
    ROOT,
    SBOM,
    SHORT,
    FileFacts,
    Image,
    ImageFacts,
    file_digest,
    read_image,
)  # fmt: skip
from vmsandbox.image.recipe import Recipe, build_script
from vmsandbox.image.sbom import parse_packages, sbom
from vmsandbox.image.store import BUILDING, CURRENT, SCRATCH_NOTE, ImageStore, check_raw_ext4, remove_building
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs

_SPACE_NEEDED = 3 << 30  # bytes: unpacked root, its packages, the file system made of it
_FORGET_PACKAGES_AFTER = 60 * 86400  # seconds
_BIG_TEMPORARY = "/var/tmp"  # noqa: S108 (mkdtemp makes a private folder in it)


def build_image(recipe: Recipe, layout: Layout, programs: Programs, monitor: Monitor) -> Image:
    """Build `recipe` and publish it as the newest image of its name.

    If another process builds the same recipe at the moment, its result is waited for and used.

    Raises:
        HostError: mmdebstrap is missing, or too little disk space. ImageError: the build failed.
    """
    if programs.find("mmdebstrap") is None:
        raise HostError(
            "mmdebstrap is not installed: it builds the images",
            resolution="run `vmsandbox doctor --fix`, or `apt install mmdebstrap`",
        )
    store = ImageStore(layout)
    parent = layout.images / recipe.name
    before = _publication(parent)
    with store.locked(recipe.name, monitor=monitor):
        if _publication(parent) != before and (meanwhile := _same_inputs(store, recipe)):
            monitor.notice(f"image {recipe.name} was built by another process meanwhile")
            return meanwhile
        for stale in store.prune_building_of(recipe.name):
            monitor.notice(f"removed what an interrupted build left: {stale}")
        with _building_folder(parent, Ledger.of(layout)) as building:
            with monitor.step(f"building image {recipe.name}"):
                facts = _fill(building, recipe, layout, programs, monitor)
            with monitor.step(f"publishing image {recipe.name}"):
                _publish(building, facts, store)
        image = store.find(recipe.name)
        store.verify(image)
        return image


def _publication(parent: Path) -> tuple[int, int] | None:
    """Tells one publication from the next: each makes `current` anew, even if the digest stays the same."""
    try:
        status = (parent / CURRENT).lstat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _same_inputs(store: ImageStore, recipe: Recipe) -> Image | None:
    """The published image if it was made of the same inputs and is sound."""
    try:
        image = store.find(recipe.name)
        store.verify(image)
    except ImageError:
        return None
    return image if image.facts.recipe == recipe.digest() else None


@contextmanager
def _building_folder(parent: Path, ledger: Ledger) -> Iterator[Path]:
    """A folder beside the published ones; gone at the end, whatever happens, unless it was renamed."""
    building = parent / f"{BUILDING}{secrets.token_hex(8)}"
    thing = (Kind.IMAGE, f"{parent.name}/{building.name}")
    try:
        ledger.plan(f"image:{parent.name}", thing)
        building.mkdir(mode=0o700)
        building.chmod(0o711)  # apt's own user works below it
        failpoint("build.folder")
        yield building
    finally:
        if building.exists():
            remove_building(building)
        ledger.gone(f"image:{parent.name}", thing)


@contextmanager
def _scratch_folder(building: Path, unprivileged: bool) -> Iterator[Path]:
    """Where the root is unpacked: below `building`, or where a user namespace's root may go."""
    if not unprivileged:
        scratch = building / "scratch"
        scratch.mkdir(mode=0o711)
        yield scratch
        shutil.rmtree(scratch)
        return
    wanted = Path(os.environ.get("TMPDIR", _BIG_TEMPORARY)).resolve()
    open_to_all = all(folder.stat().st_mode & 0o001 for folder in (wanted, *wanted.parents))
    base = wanted if open_to_all else Path(_BIG_TEMPORARY)
    scratch = Path(tempfile.mkdtemp(prefix="vmsandbox-build-", dir=base))
    (building / SCRATCH_NOTE).write_text(str(scratch))  # remove_building follows it, also after a kill -9
    scratch.chmod(0o711)
    yield scratch
    shutil.rmtree(scratch)
    (building / SCRATCH_NOTE).unlink()


def _fill(building: Path, recipe: Recipe, layout: Layout, programs: Programs, monitor: Monitor) -> ImageFacts:
    """Make all files of the image in `building`, and nothing else."""
    cache = layout.cache / "packages" / recipe.suite
    cache.mkdir(parents=True, exist_ok=True)
    parts, packages = building / "parts", building / "packages"
    parts.mkdir()
    packages.mkdir()
    unprivileged = os.geteuid() != 0
    with _scratch_folder(building, unprivileged) as scratch:
        for folder in (building, scratch):
            _need_space(folder)
        places = BuildPlaces(parts, scratch, cache, packages, unprivileged)
        make_parts(recipe, Mirrors.of(recipe, os.environ), places, programs, monitor)
        failpoint("build.parts")
    _keep_packages(packages, cache)
    failpoint("build.packages")
    monitor.progress(1, 1, "initramfs, package list, digests")
    facts = _assemble(building, parts, recipe)
    failpoint("build.assembled")
    shutil.rmtree(parts)
    shutil.rmtree(packages)
    for name in (*FILES, MANIFEST):
        (building / name).chmod(0o444)  # QEMU runs as another user, and nobody writes
        _to_disk(building / name)
    building.chmod(0o755)
    _to_disk(building)
    failpoint("build.durable")
    return facts


def _need_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _SPACE_NEEDED:
        raise HostError(
            f"too little disk space to build an image: {free / 2**30:.1f} GiB free",
            details=f"a build needs about {_SPACE_NEEDED >> 30} GiB in {folder}",
            resolution="free some space, or put images elsewhere with VMSANDBOX_HOME",
        )


def _keep_packages(used: Path, cache: Path) -> None:
    """Move packages into the cache, each by one rename: other builds read there. Forget long unused ones."""
    for package in used.glob("*.deb"):
        os.utime(package)
        package.replace(cache / package.name)
    for package in cache.glob("*.deb"):
        if package.stat().st_mtime < time.time() - _FORGET_PACKAGES_AFTER:
            package.unlink(missing_ok=True)


def _assemble(building: Path, parts: Path, recipe: Recipe) -> ImageFacts:
    """From mmdebstrap's parts to the image's files with their manifest."""
    for name in (ROOT, KERNEL):
        (parts / name).rename(building / name)
    check_raw_ext4(building / ROOT)
    if recipe.initramfs == "small":
        (building / INITRD).write_bytes(small_initramfs(parts, build_script("init")))
    else:
        (parts / "initrd.stock").rename(building / INITRD)
    packages = parse_packages((parts / "packages").read_text())
    (building / SBOM).write_bytes(sbom(recipe.name, recipe.suite, packages))
    files = {name: FileFacts(file_digest(building / name), (building / name).stat().st_size) for name in FILES}
    facts = ImageFacts(
        name=recipe.name,
        recipe=recipe.digest(),
        suite=recipe.suite,
        architecture=next(package.architecture for package in packages if package.name == "dpkg"),
        initramfs=recipe.initramfs,
        kernel_version=(parts / "kernel-version").read_text().strip(),
        package_count=len(packages),
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files=MappingProxyType(files),
    )
    (building / MANIFEST).write_bytes(facts.as_manifest())
    return facts


def _publish(building: Path, facts: ImageFacts, store: ImageStore) -> None:
    """Rename the finished folder to its digest and make it the current one. Under the name's lock."""
    parent = building.parent
    target = parent / facts.digest[:SHORT]
    if not _sound(target, store):
        if target.exists():
            target.rename(Path(tempfile.mkdtemp(prefix=BUILDING, dir=parent)) / "damaged")
        building.rename(target)
        failpoint("build.renamed")
    # Made in a folder that `gc` knows, should we be killed. What it names is found from where it goes to.
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=parent) as folder:
        link = Path(folder) / CURRENT
        link.symlink_to(target.name)
        failpoint("build.linked")
        link.replace(parent / CURRENT)
    failpoint("build.published")
    _to_disk(parent)
    store.prune_building_of(facts.name)


def _sound(folder: Path, store: ImageStore) -> bool:
    """Whether the same image is there already. It is kept then: templates may be standing on its files."""
    try:
        store.verify(read_image(folder))
    except ImageError:
        return False
    return True


def _to_disk(path: Path) -> None:
    """fsync: after a power cut the published files must be the ones that were hashed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
