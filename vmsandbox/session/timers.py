"""Repeats a project's session by systemd's timer, when its policy's `session.schedule` says.

Nothing here runs by itself: a schedule that a project's file names does nothing until a person has asked for the
timer.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.process import Programs
from vmsandbox.render.timer import TimerPlan, render_units
from vmsandbox.spec import Accept

_RUNNING = Path("/run/systemd/system")
_PASSED_ON = ("VMSANDBOX_HOME", "VMSANDBOX_LIBVIRT_URI", "VMSANDBOX_QUOTA", "VMSANDBOX_DEBIAN_MIRROR",
              "VMSANDBOX_SECURITY_MIRROR", "XDG_DATA_HOME",
              "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME")  # fmt: skip


def timer_for(
    project: Path,
    schedule: str | None,
    command: Sequence[str],
    *,
    policy: str | None = None,
    accept: Accept = Accept.NONE,
    allow_emulation: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> TimerPlan:
    """What repeats `vmsandbox session PROJECT … -- COMMAND`.

    Args:
        schedule: of the policy that holds.
        policy: as named by the person; None: the project's own.

    Raises:
        UserInputError: there is no schedule, no command or no such folder.
    """
    if schedule is None:
        raise UserInputError(
            "the policy has no session.schedule", resolution='for example: session: {schedule: "*-*-* 02:00:00"}'
        )
    if not command:
        raise UserInputError("nobody will be there to type: name the command", resolution="-- COMMAND …")
    if not project.is_dir():
        raise UserInputError(f"not a folder: {project}")
    options = ["--accept", accept.value, *(["--policy", policy] if policy else [])]
    options += ["--allow-emulation"] if allow_emulation else []
    words = [sys.executable, "-m", "vmsandbox", "session", str(project), *options, "--json", "--", *command]
    kept = {name: environment[name] for name in _PASSED_ON if environment.get(name)}
    user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
    return TimerPlan(name_of(project), f"vmsandbox session of {project}", schedule, words, kept, user)


def name_of(project: Path) -> str:
    """The units' name: the folder's, and a part of its path's digest."""
    slug = re.sub(r"[^a-z0-9]+", "-", project.name.lower()).strip("-")[:30] or "project"
    return f"vmsandbox-{slug}-{hashlib.sha256(os.fsencode(project)).hexdigest()[:8]}"


def install_timer(plan: TimerPlan, programs: Programs) -> list[Path]:
    """Write the units and let systemd start the timer; the files.

    Raises:
        UserInputError: systemd does not know the schedule. HostError: systemd does not run, or refused.
    """
    _refuse_without_systemd()
    check_schedule(plan.schedule, programs)
    folder = unit_folder()
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in render_units(plan).items():
            (folder / name).write_text(text)
            files.append(folder / name)
    except OSError as error:
        raise HostError(
            "the units cannot be written",
            details=str(error),
            resolution="free disk space or make the folder writable, then run it with --install again",
        ) from error
    programs.run([*_systemctl(), "daemon-reload"])
    programs.run([*_systemctl(), "enable", "--now", f"{plan.name}.timer"])
    return files


def remove_timer(project: Path, programs: Programs) -> list[Path]:
    """Take the timer of a project away; a session of it that runs goes on. The files that were there.

    Raises HostError: systemd does not run, or refused.
    """
    _refuse_without_systemd()
    name = name_of(project)
    files = [path for path in (unit_folder() / f"{name}.{ending}" for ending in ("timer", "service")) if path.exists()]
    if files:
        # check=False: there may be a service without its timer, where the disk was full at the second
        programs.run([*_systemctl(), "disable", "--now", f"{name}.timer"], check=False)
        for path in files:
            path.unlink(missing_ok=True)
        programs.run([*_systemctl(), "daemon-reload"])
    return files


def check_schedule(schedule: str, programs: Programs) -> None:
    """Raises UserInputError if systemd, where it is installed, does not know the expression."""
    if programs.find("systemd-analyze") is None:
        return
    said = programs.run(["systemd-analyze", "calendar", schedule], check=False)
    if said.status:
        raise UserInputError(
            f"session.schedule: systemd does not know {schedule!r}",
            details=said.stderr.decode(errors="replace").strip(),
            resolution="systemd.time(7), CALENDAR EVENTS",
        )


def unit_folder() -> Path:
    """Where root's units are, or the user's."""
    if os.geteuid() == 0:
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd/user"


def _systemctl() -> list[str]:
    return ["systemctl"] if os.geteuid() == 0 else ["systemctl", "--user"]


def _refuse_without_systemd() -> None:
    if not _RUNNING.is_dir():
        raise HostError(
            "systemd does not run here",
            details=f"{_RUNNING} is not there",
            resolution="without --install the units are printed; another scheduler can run their ExecStart",
        )
