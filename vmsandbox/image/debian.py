"""How mmdebstrap is called to make the parts of an image.

All that a recipe brings travels as data: packages and sizes as checked arguments, files, units and commands
in a tar that mmdebstrap unpacks into the root. No recipe's text becomes part of a shell line.

Modes: root builds below the building folder and moves the result. Anyone else uses a user namespace
(subuid(5)), whose root cannot enter a private home: it works in a scratch folder that all may enter, and the
result comes out through mmdebstrap's own channel as a sparse tar.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import tarfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import HostError, ImageError
from vmsandbox.image.recipe import BUILD_SCRIPTS, Recipe, build_script
from vmsandbox.monitor import Monitor
from vmsandbox.process import Programs

_WORK = ".vmsandbox"  # the build's own folder in the root, left out of the file system
_TIMEOUT = 3600.0
# mmdebstrap's own lines and finish.sh's, for progress only; a line more or less does no harm.
_EXPECTED_LINES = 22
# Not by --dpkgopt: mmdebstrap would start a Python filter for each essential package, 10 s in all. What those
# bring is removed by finish.sh.
_NO_DOCUMENTATION = (
    'cd "$1/etc/dpkg/dpkg.cfg.d" && '
    "printf 'path-exclude=/usr/share/%s/*\\n' man locale info doc > 50vmsandbox && "
    "echo 'path-include=/usr/share/doc/*/copyright' >> 50vmsandbox"
)
_NO_INITRAMFS = (
    'mkdir -p "$1/etc/initramfs-tools" && echo update_initramfs=no > "$1/etc/initramfs-tools/update-initramfs.conf"'
)
_UUIDS = uuid.UUID("c2a3d0c4-5f43-5d0a-8c0e-3b9b4c7c2f10")


@dataclass(frozen=True)
class Mirrors:
    """Where packages come from: base URLs of the Debian and security archives ("" for no second one)."""

    debian: str
    security: str

    @classmethod
    def of(cls, recipe: Recipe, environ: Mapping[str, str]) -> Mirrors:
        """The recipe's, or VMSANDBOX_DEBIAN_MIRROR and VMSANDBOX_SECURITY_MIRROR if set.

        With only the first set there is no security archive: behind an own mirror nothing else may answer.
        """
        own = environ.get("VMSANDBOX_DEBIAN_MIRROR")
        if not own:
            return cls(recipe.mirror, environ.get("VMSANDBOX_SECURITY_MIRROR", recipe.security_mirror))
        return cls(own, environ.get("VMSANDBOX_SECURITY_MIRROR", ""))

    def sources(self, suite: str) -> list[str]:
        """Lines of a sources.list(5)."""
        lines = [f"deb {self.debian} {suite} main"]
        if self.security and suite not in {"sid", "unstable"}:
            lines.append(f"deb {self.security} {suite}-security main")
        return lines


@dataclass(frozen=True)
class BuildPlaces:
    """Folders of one build: `out` gets the parts, `scratch` holds the root while it is made.

    cache has packages of earlier builds and is only read; used_packages gets those of this build.
    """

    out: Path
    scratch: Path
    cache: Path
    used_packages: Path
    unprivileged: bool


def make_parts(recipe: Recipe, mirrors: Mirrors, places: BuildPlaces, programs: Programs, monitor: Monitor) -> None:
    """Fill `places.out` with root.ext4, vmlinuz, kernel-version, packages and the initramfs's parts.

    Raises:
        ImageError: mmdebstrap failed (its last words in the details).
    """
    overlay = places.scratch / "overlay.tar"
    overlay.write_bytes(_overlay(recipe))
    environment = {
        "TMPDIR": os.fspath(places.scratch),
        "SOURCE_DATE_EPOCH": str(recipe.epoch),
        "VMSANDBOX_DISK": recipe.disk,
        "VMSANDBOX_UUID": str(uuid.uuid5(_UUIDS, recipe.name)),
        "VMSANDBOX_INITRAMFS": recipe.initramfs,
        "VMSANDBOX_OUT": os.fspath(places.out),
    }
    done = 0

    def follow(line: str) -> None:
        nonlocal done
        if line.startswith("I: "):
            done += 1
            note = re.sub(r" in shell: .*|/\S*/", "", line[3:])
            monitor.progress(min(done, _EXPECTED_LINES), _EXPECTED_LINES, note)
        elif line.startswith("W: "):
            monitor.warning(line[3:])

    try:
        programs.run(
            _command(recipe, mirrors, places, overlay),
            timeout=_TIMEOUT,
            env=environment,
            cwd=places.scratch,
            on_line=follow,
        )
        if places.unprivileged:
            packed = places.out / "out.tar"
            programs.run(["tar", "--no-same-owner", "-C", places.out, "-xSf", packed], timeout=600)
            packed.unlink()
    except HostError as error:
        raise _build_error(recipe, mirrors, error) from error


def _command(recipe: Recipe, mirrors: Mirrors, places: BuildPlaces, overlay: Path) -> list[str]:
    """The program and its arguments."""
    cache, used = _quoted(places.cache), _quoted(places.used_packages)
    options = ["--format=null", f"--variant={recipe.variant}", f"--include={','.join(recipe.packages)}",
               "--skip=essential/unlink,cleanup"]  # fmt: skip
    options += ['--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"']
    # no fsync per file: an interrupted build is thrown away anyway; our conffiles stay without a question
    options += ["--dpkgopt=force-unsafe-io", "--dpkgopt=force-confold"]
    options += [
        '--setup-hook=mkdir -p "$1/var/cache/apt/archives"',
        f"--setup-hook=sync-in {cache} /var/cache/apt/archives",
    ]
    options.append(f"--extract-hook={_NO_DOCUMENTATION}")
    if recipe.initramfs == "small":
        options.append(f"--extract-hook={_NO_INITRAMFS}")
    options += [
        f"--customize-hook=sync-out /var/cache/apt/archives {used}",
        f"--customize-hook=tar-in {_quoted(overlay)} /",
        f'--customize-hook=sh "$1/{_WORK}/finish.sh" "$1"',
    ]
    # Killed with its builder (prctl(2), PR_SET_PDEATHSIG): no orphan works on in a folder that gc removes.
    start = ["setpriv", "--pdeathsig", "KILL"]
    if places.unprivileged:
        packed = places.out / "out.tar"
        options.append(f"--customize-hook=download /{_WORK}/out.tar {_quoted(packed)}")
        start += ["mmdebstrap", "--mode=unshare"]
    else:
        # mmdebstrap mounts /proc, /sys and /dev in the caller's namespace: killed, it would leave them there.
        # A PID namespace takes all that it started along.
        start += ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL"]
        start += ["--mount-proc", "mmdebstrap", "--mode=root"]
    return [*start, *options, recipe.suite, "/dev/null", *mirrors.sources(recipe.suite)]


def _quoted(path: Path) -> str:
    """A path as mmdebstrap's special hooks read it: they split their line into shell words."""
    return shlex.quote(os.fspath(path))


def _overlay(recipe: Recipe) -> bytes:
    """The tar of the recipe's files and masked units, and of what finish.sh reads; owned by root, dated."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:

        def add(path: str, content: bytes = b"", mode: int = 0o644, link: str = "") -> None:
            member = tarfile.TarInfo(path.lstrip("/"))
            member.mtime, member.mode, member.size = recipe.epoch, mode, len(content)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member, io.BytesIO(content))

        for script in BUILD_SCRIPTS:
            add(f"{_WORK}/{script}", build_script(script))
        for kind, units in (("enable", recipe.units.enable), ("disable", recipe.units.disable)):
            add(f"{_WORK}/{kind}", "".join(f"{unit}\n" for unit in units).encode())
        for number, command in enumerate(recipe.run):
            add(f"{_WORK}/run/{number:03d}", command.encode() + b"\n")
        canonical = Mirrors(recipe.mirror, recipe.security_mirror)
        add(f"{_WORK}/sources.list", "".join(f"{line}\n" for line in canonical.sources(recipe.suite)).encode())
        for unit in recipe.units.mask:
            add(f"etc/systemd/system/{unit}", link="/dev/null")
        for file in {file.path: file for file in recipe.files}.values():
            add(file.path, file.content.encode(), int(file.mode, 8))
    return buffer.getvalue()


def _build_error(recipe: Recipe, mirrors: Mirrors, error: HostError) -> ImageError:
    said = f"{error.brief}\n{error.details}"
    complaints = "\n".join(line for line in said.splitlines() if not line.startswith(("I: ", "$ ")))
    if "subuid" in complaints or "newuidmap" in complaints:
        hint = (
            "install uidmap and give yourself sub-ids: `sudo usermod --add-subuids 100000-165535 "
            "--add-subgids 100000-165535 $USER`; or build as root"
        )
    elif "No space left" in complaints:
        hint = "free some disk space and try again"
    elif "Unable to locate package" in complaints:
        hint = "check the names under `packages` in the recipe"
    elif "apt-get update" in complaints or "Failed to fetch" in complaints:
        hint = f"check that {mirrors.debian} can be reached, or set VMSANDBOX_DEBIAN_MIRROR"
    else:
        hint = error.resolution or "the details end with what mmdebstrap said last"
    return ImageError(f"the image {recipe.name!r} could not be built", details=said, resolution=hint)
