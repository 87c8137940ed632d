"""The single words of a policy file beyond the network's, checked and made canonical.

Each raises ValueError with what to write instead. Without them `memory: 2 GB RAM` or an allowed path with a glob in it
would be a rule that never holds, and nobody would know which. (`network_words.py` has those of `sandbox.network`.)
"""

from __future__ import annotations

import difflib
import math
import posixpath
import re
import shlex
from fractions import Fraction

from vmsandbox.paths import IMAGE_NAME
from vmsandbox.policy.tree.globs import is_glob
from vmsandbox.spec import PROJECTS, WORKER_HOME

# capabilities(7), without CAP_ and in lower case.
CAPABILITIES = (
    "audit_control", "audit_read", "audit_write", "block_suspend", "bpf", "checkpoint_restore", "chown",
    "dac_override", "dac_read_search", "fowner", "fsetid", "ipc_lock", "ipc_owner", "kill", "lease",
    "linux_immutable", "mac_admin", "mac_override", "mknod", "net_admin", "net_bind_service", "net_broadcast",
    "net_raw", "perfmon", "setfcap", "setgid", "setpcap", "setuid", "sys_admin", "sys_boot", "sys_chroot",
    "sys_module", "sys_nice", "sys_pacct", "sys_ptrace", "sys_rawio", "sys_resource", "sys_time",
    "sys_tty_config", "syslog", "wake_alarm",
)  # fmt: skip
MAX_SIZE = 1 << 50
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE)
_FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,6})?[smhd])+")
_PART = re.compile(r"([0-9.]+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_SECONDS = 366 * 86400.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# They make a shell, the loader or libc run or read something before a process is confined, or are vmsandbox's own.
_NO_VARIABLES = re.compile(
    r"LD_.*|VMSANDBOX_.*|BASH_ENV|ENV|BASH_FUNC_.*|SHELLOPTS|BASHOPTS|PS4|IFS|GCONV_PATH|LOCPATH|GLIBC_TUNABLES|MALLOC_.*"
)
_SCHEDULE = re.compile(r"[A-Za-z0-9*,:./~ +_-]{1,200}")
# Nothing in the guest works when one of these is replaced by an empty folder.
_NO_TMPFS_IN = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/root", "/run", "/sbin", "/sys",
    "/usr", PROJECTS, f"{WORKER_HOME}/.claude", f"{WORKER_HOME}/.ssh",
)  # fmt: skip
_NO_TMPFS_ON = ("/", "/home", "/var", "/var/lib", "/var/log", WORKER_HOME)


def size(value: object) -> int:
    """Bytes: an integer, or a number with k, m, g or t (1024)."""
    found = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        found = int(Fraction(match[1]) * _FACTOR[(match[2] or "").lower()])
    if found is None or not 0 <= found <= MAX_SIZE:
        raise ValueError(f"not a size: {_short(value)} (bytes, or a number with k, m, g or t, such as 100m or 2G)")
    return found


def duration(value: object) -> float:
    """Seconds: a number, or numbers with s, m, h or d."""
    found = None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        found = float(value)
    elif isinstance(value, str) and _DURATION.fullmatch(value):
        found = float(sum(Fraction(number) * _SECONDS[unit] for number, unit in _PART.findall(value)))
    if found is None or not 0 < found <= MAX_SECONDS:
        raise ValueError(f"not a time: {_short(value)} (seconds, or a number with s, m, h or d, such as 30s or 8h)")
    return found


def guest_path(text: str) -> str:
    """A path in the guest: `./` in the project, `~/` in the worker's home, or absolute. Slashes are made single."""
    _refuse_glob(text)
    if text.startswith("~"):
        head, _, rest = text.partition("/")
        if head != "~":
            raise ValueError("the only home in a guest is the worker's: write ~/…")
        return "~/" + _inside(rest)
    if text.startswith("/"):
        return "/" + _inside(text)
    return "./" + _inside(text)


def denied_path(text: str) -> str:
    """A path or glob that is denied. Kept as it was written."""
    _check_names(text)
    return text


def returned_path(text: str) -> str:
    """A path or glob in the project."""
    _check_names(text)
    if text.startswith(("/", "~")) or posixpath.normpath(text).startswith(".."):
        raise ValueError("what comes back is named within the project: write ./… or a name")
    return text


def project_pattern(text: str) -> str:
    """A path or glob in the project, `./` for all of it."""
    _check_names(text)
    if text.startswith(("/", "~")) or posixpath.normpath(text).startswith(".."):
        raise ValueError("a path or glob within the project: write ./… or a name")
    return text


def output_path(text: str) -> str:
    """A folder in the project, below it."""
    found = guest_path(text)
    if not found.startswith("./"):
        raise ValueError("the output folder is one of the project's: write ./output")
    if found == "./":
        raise ValueError("the output folder is a folder in the project, not the project itself")
    if found.split("/")[1] == ".git":
        raise ValueError("git's own folder is no place for output")
    return found


def tmpfs_path(text: str) -> str:
    """Where a tmpfs may be mounted in the guest; absolute."""
    found = guest_path(text)
    if found.startswith("./"):
        raise ValueError("a tmpfs hides what is in its place: name a folder outside the project (/tmp, ~/.cache)")
    if found.startswith("~/"):
        found = f"{WORKER_HOME}/{found[2:]}".rstrip("/")
    for folder in _NO_TMPFS_IN:
        if (found == folder or found.startswith(folder + "/")) and found != "/dev/shm":  # noqa: S108
            raise ValueError(f"nothing would work with a tmpfs in {folder}")
    if found in _NO_TMPFS_ON:
        raise ValueError(f"nothing would work with a tmpfs on {found}")
    return found


def file_path(text: str) -> str:
    """A file on the host: relative to the policy's folder, or absolute."""
    _refuse_glob(text)
    if text.startswith("~"):
        raise ValueError("relative to the policy's folder, or absolute, not ~")
    if text.endswith("/"):
        raise ValueError("a file, not a folder")
    return text


def capability(text: str) -> str:
    """A capability: lower case, without CAP_."""
    found = text.lower().removeprefix("cap_")
    if found not in CAPABILITIES:
        if found == "all":
            raise ValueError("name the capabilities that are needed, not all")
        raise ValueError(f"no capability is called {text[:40]!a}{_suggestion(found)}")
    return found


def command_pattern(text: str) -> str:
    """A pattern of command lines. Kept as it was written."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"not a command line: {error}") from None
    if not words or not words[0]:
        raise ValueError("it names no program")
    return text


def variable(text: str) -> str:
    """The name of an environment variable that may be set in the guest."""
    if not _VARIABLE.fullmatch(text):
        raise ValueError(f"not the name of a variable: {text[:60]!a} (letters, digits and _)")
    if _NO_VARIABLES.fullmatch(text):
        raise ValueError(f"{text} would take effect before the guest's own safeguards do, and is never set")
    return text


def image(text: str) -> str:
    """An image's name."""
    if not IMAGE_NAME.fullmatch(text):
        raise ValueError(f"not an image name: {text[:60]!a} (a-z, 0-9, . and -)")
    return text


def schedule(text: str) -> str:
    """A systemd calendar expression, roughly: systemd itself has the last word."""
    if not _SCHEDULE.fullmatch(text):
        raise ValueError(f"not a calendar expression of systemd: {text[:60]!a} (such as *-*-* 02:00:00)")
    return text


def program(value: object) -> object:
    """A command: a list of words as it is, a text as a shell's."""
    return ["sh", "-c", value] if isinstance(value, str) else value


def _inside(text: str) -> str:
    """The rest of a path with single slashes, no dots, and none at its end."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        leaves = posixpath.normpath("/".join(parts)).startswith("..")
        raise ValueError("it leaves the folder that it begins in" if leaves else "write it without ..")
    return "/".join(parts)


def _check_names(text: str) -> None:
    if not text.strip():
        raise ValueError("an empty path")
    if "\x00" in text:
        raise ValueError("no path has a NUL")
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in text.split("/")):
        raise ValueError("a name in it has more than 255 bytes")


def _refuse_glob(text: str) -> None:
    _check_names(text)
    if is_glob(text):
        raise ValueError("a path, not a glob: * ? and [ are not possible here")


def _suggestion(word: str) -> str:
    close = difflib.get_close_matches(word, CAPABILITIES, n=1)
    return f" (did you mean {close[0]!r}?)" if close else " (see capabilities(7))"


def _short(value: object) -> str:
    return ascii(value)[:60]
