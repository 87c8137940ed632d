"""The published images on this host: find, list, verify, remove.

Each image is a folder `<images>/<name>/<16 hex of its digest>`; the symlink `current` names the newest.
Sessions start from here, so nothing here imports pydantic or yaml, and an image whose files are unchanged
since they were last hashed is not hashed again. Whatever does not fit is refused: an image is never
repaired in place.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import ImageError
from vmsandbox.image.manifest import SHORT, Image, file_digest, read_image
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout, checked_image_name

if TYPE_CHECKING:
    from vmsandbox.process import Programs

CURRENT = "current"
BUILDING = ".building-"
SCRATCH_NOTE = "scratch-folder"  # names the scratch folder of an unprivileged build
_LOCK = ".lock"
_DIGEST = re.compile(rf"[0-9a-f]{{{SHORT}}}")
_EXT4_MAGIC_AT, _EXT4_MAGIC = 0x438, b"\x53\xef"  # kernel.org, ext4 "Super Block": s_magic
# Formats that QEMU would find by probing, and that could name a file of the host as their backing file.
_FOREIGN_MAGICS = (b"QFI\xfb", b"QED\0", b"KDMV", b"COWD", b"vhdxfile", b"conectix", b"# Disk DescriptorFile")
# Inside the class `list` is the method.
_Images = list[Image]
_Names = list[str]
_Paths = list[Path]


class ImageStore:
    """The images of one installation."""

    def __init__(self, layout: Layout) -> None:
        self._images = layout.images
        self._stamps = layout.cache / "verified"

    def find(self, name: str) -> Image:
        """The newest image of this name. Its files are only looked at; `verify` hashes them.

        Raises:
            UserInputError: that is not a name. ImageError: there is none, or it is damaged.
        """
        folder = self._images / checked_image_name(name)
        try:
            target = (folder / CURRENT).readlink().name
        except OSError:
            raise ImageError(
                f"there is no image {name!r}",
                details=f"looked in {self._images}",
                resolution=f"run `vmsandbox image build {name}`",
            ) from None
        if not _DIGEST.fullmatch(target):
            raise _damaged(name, f"{folder / CURRENT} points at {target!r}")
        image = read_image(folder / target)
        _look_at_files(image)
        return image

    def list(self) -> _Images:
        """The newest image of each name, by name. Damaged ones are left out: `find` says what is wrong."""
        return [image for name in self._names() if (image := self._newest(name))]

    def versions(self, name: str) -> _Images:
        """All images of a name, also those that a newer build has replaced (templates may need them)."""
        folder = self._images / checked_image_name(name)
        found = (entry for entry in sorted(_entries(folder)) if _DIGEST.fullmatch(entry))
        return [read_image(folder / entry) for entry in found]

    def verify(self, image: Image, force: bool = False) -> None:
        """Check each file's SHA-256, unless all are as they were when last checked (`force`: check anyway).

        "As they were" means device, inode, size and both times in nanoseconds; no program can set ctime back.

        Raises:
            ImageError: a file is missing, of another kind, or not what the manifest says.
        """
        seen = _look_at_files(image)
        stamp = self._stamps / f"{image.name}-{image.digest[:SHORT]}.json"
        if not force and _read_stamp(stamp) == [image.digest, seen]:
            return
        check_raw_ext4(image.root)
        for name, facts in image.facts.files.items():
            if file_digest(image.folder / name) != facts.sha256:
                stamp.unlink(missing_ok=True)
                raise _damaged(image.name, f"{image.folder / name} is not what the manifest says (SHA-256)")
        if _look_at_files(image) != seen:
            raise _damaged(image.name, "a file changed while it was checked")
        self._stamps.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = stamp.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps([image.digest, seen]))
        fresh.replace(stamp)

    def remove(self, name: str, digest: str | None = None) -> _Names:
        """Remove an image's folders (only the one with this digest, if given); the short digests removed.

        Raises:
            ImageError: there is nothing to remove.
        """
        import shutil  # here: a session never removes, and this import costs it milliseconds

        folder = self._images / checked_image_name(name)
        with self.locked(name, create=False):
            found = [entry for entry in _entries(folder) if _DIGEST.fullmatch(entry)]
            gone = [entry for entry in found if digest is None or entry == digest[:SHORT]]
            if not gone:
                raise ImageError(f"there is no image {name!r} to remove", resolution="see `vmsandbox image ls`")
            current = folder / CURRENT
            if current.is_symlink() and current.readlink().name in gone:
                current.unlink()  # first: nobody finds an image that is half removed
            for entry in gone:
                shutil.rmtree(folder / entry)
                (self._stamps / f"{name}-{entry}.json").unlink(missing_ok=True)
            if len(gone) == len(found):
                current.unlink(missing_ok=True)
        return gone

    def prune_building(self) -> _Paths:
        """Remove what builders that died have left behind; live builders are left alone. What was removed."""
        gone: _Paths = []
        for name in self._names():
            with self.locked(name, wait=False) as held:
                gone += self.prune_building_of(name) if held else []
        return gone

    def prune_building_of(self, name: str) -> _Paths:
        """The same for one image. Only under its lock: whoever holds it knows that no other builder lives."""
        folder = self._images / name
        stale = [folder / entry for entry in _entries(folder) if entry.startswith(BUILDING)]
        for each in stale:
            remove_building(each)
        return stale

    @contextmanager
    def locked(
        self, name: str, *, wait: bool = True, create: bool = True, monitor: Monitor | None = None
    ) -> Iterator[bool]:
        """Hold the lock of one image name (flock(2): it goes with the process); yields whether it is held."""
        folder = self._images / checked_image_name(name)
        if create:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise ImageError(f"there is no image {name!r} to remove", resolution="see `vmsandbox image ls`")
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                (monitor or Monitor()).notice(f"another process is building image {name}: waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield True
        finally:
            os.close(descriptor)

    def _names(self) -> _Names:
        return sorted(entry for entry in _entries(self._images) if not entry.startswith("."))

    def _newest(self, name: str) -> Image | None:
        try:
            return self.find(name)
        except ImageError:
            return None


def check_raw_ext4(path: Path) -> None:
    """Refuse a root file system that is not plain raw ext4 (a qcow2 could be backed by /etc/shadow).

    Raises:
        ImageError: it begins like a disk image format, or is not ext4.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_EXT4_MAGIC_AT + len(_EXT4_MAGIC))
    if head.startswith(_FOREIGN_MAGICS):
        raise ImageError(f"{path} is a disk image with a format of its own, not a raw file system")
    if head[_EXT4_MAGIC_AT:] != _EXT4_MAGIC:
        raise ImageError(f"{path} is not a raw ext4 file system")


def remove_building(folder: Path, programs: Programs | None = None) -> None:
    """Remove a building folder, but never through a mount: a file system of the host could be below.

    An unprivileged build has a scratch folder elsewhere, whose files belong to the user's sub-ids.

    Raises:
        ImageError: something is mounted in it.
    """
    import shutil

    inside = f"{folder.resolve()}/"
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in mounts]  # proc(5)
    if below := [point for point in mounts if point.startswith(inside)]:
        raise ImageError(
            f"{folder} is left of a build and has mounts in it",
            details="\n".join(below),
            resolution="unmount them",
        )
    note = folder / SCRATCH_NOTE
    if note.is_file() and (scratch := Path(note.read_text())).is_dir():
        from vmsandbox.process import Programs

        helper = ["mmdebstrap", "--unshare-helper", "rm", "-rf", "--", str(scratch)]
        (programs or Programs()).run(helper, check=False, timeout=300)  # all but the folder itself, which is ours
        shutil.rmtree(scratch, ignore_errors=True)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ImageError(f"{folder} is left of a build and cannot be removed", details=str(error)) from error


def _look_at_files(image: Image) -> list[list[int]]:
    """Device, inode, size, mtime and ctime (ns) of each file; ImageError for one that is no regular file."""
    seen = []
    for name, facts in image.facts.files.items():
        path = image.folder / name
        try:
            status = path.lstat()
        except OSError as error:
            raise _damaged(image.name, f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(image.name, f"{path} is not a regular file")
        if status.st_size != facts.size:
            raise _damaged(image.name, f"{path} has {status.st_size} bytes, the manifest says {facts.size}")
        seen.append([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return seen


def _read_stamp(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None


def _entries(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _damaged(name: str, details: str) -> ImageError:
    return ImageError(
        f"the image {name!r} is damaged: it is not used",
        details=details,
        resolution=f"remove it with `vmsandbox image rm {name}` and build it again",
    )
