"""Who is not asked by the command rules: root, the shell that the host itself opens, and the host's own plumbing.

Each is recognised by what a worker cannot have made: user ids, and descent from sshd's privileged process. The
variable that marks plumbing counts only where sshd itself hands it to a session's first process.
"""

import os
import time

import vmsandbox_calls as calls
from vmsandbox_programs import status_of

SSHD = ("/usr/lib/openssh/sshd-session", "/usr/lib/openssh/sshd-auth", "/usr/sbin/sshd")
WORKER_SHELL = "/usr/lib/vmsandbox/worker-shell"
SHELLS = (WORKER_SHELL, "/usr/bin/bash", "/usr/bin/setpriv", *SSHD)
STEPS = ("/usr/bin/dash", "/usr/bin/setpriv", "/usr/bin/bash")
LOGIN_SECONDS = 20
PLUMBING = b"VMSANDBOX_PLUMBING=1"
PLUMBING_PROGRAMS = frozenset(("sh", "dash", "bash", "rm", "mkdir", "tar"))
OURS = "/usr/lib/vmsandbox/"
_MOST_ANCESTORS = 12


class Exempt:
    """Remembers the first process of each session."""

    def __init__(self, sshd=SSHD):
        self._sshd = sshd
        self._first = {}  # thread group: (its start, until when it is still logging in, plumbing)

    def is_root(self, pid):
        return status_of(pid)["Uid"] == [0, 0, 0, 0]

    def lets(self, call, judged):
        """Whether a call that the rules do not simply allow goes on. Root's are never judged (`is_root`)."""
        status = status_of(call.pid)
        group = status["Tgid"]
        own = judged.program.own_paths if judged.program.own else ()
        if any(path in self._sshd for path in own):
            judged.action, judged.why = 2, "sshd is not the worker's to run"
            return False
        if any(path in SHELLS for path in own):
            if self._is_first(call.pid, group, status["PPid"]):
                self._remember(group, call)
                return True
            known = self._known(group)
            if known is not None and time.monotonic() < known[1] and self._is_still_a_shell(call.pid):
                return True
        return self._is_plumbing_program(judged) and self._has_plumbing_above(group)

    def tell(self, pid, text):
        try:
            status = status_of(pid)
        except OSError:
            return
        calls.tell(status["Tgid"], status["Uid"][0], text)

    def _is_still_a_shell(self, pid):
        """The worker's shell on its way: sh, setpriv, bash. What the session's command turned into is no shell."""
        try:
            return os.readlink(f"/proc/{pid}/exe") in STEPS
        except OSError:
            return False

    def _is_first(self, pid, group, parent):
        """Whether sshd's own child, in front of the privileged sshd, asks for its shell."""
        try:
            if os.readlink(f"/proc/{pid}/exe") not in self._sshd:
                return False
            for _step in range(3):
                if os.readlink(f"/proc/{parent}/exe") not in self._sshd:
                    return False
                status = status_of(parent)
                if status["Uid"] == [0, 0, 0, 0]:
                    return True
                parent = status["PPid"]
        except OSError:
            pass
        return False

    def _remember(self, group, call):
        plumbing = any(os.fsencode(one) == PLUMBING for one in call.environment())
        call.check()
        self._first = {one: entry for one, entry in self._first.items() if _started(one) == entry[0]}
        self._first[group] = (_started(group), time.monotonic() + LOGIN_SECONDS, plumbing)

    def _known(self, group):
        entry = self._first.get(group)
        return entry if entry is not None and _started(group) == entry[0] else None

    def _has_plumbing_above(self, group):
        for _step in range(_MOST_ANCESTORS):
            known = self._known(group)
            if known is not None:
                return known[2]
            try:
                group = status_of(group)["PPid"]
            except OSError:
                return False
            if group <= 1:
                return False
        return False

    def _is_plumbing_program(self, judged):
        program = judged.program
        if any(path.startswith(OURS) for path in program.own_paths) and program.own:
            return True
        if program.own & PLUMBING_PROGRAMS:
            return True
        if "python3" in program.own:
            words = [word for word in judged.argv[1:] if not word.startswith("-")]
            plain = all(word in ("-I", "-S", "-IS") for word in judged.argv[1:2 + len(judged.argv)] if word[:1] == "-")
            return bool(words) and plain and os.path.normpath(words[0]).startswith(OURS)
        return False


def _started(pid):
    """Field 22 of /proc/PID/stat: a pid may be somebody else's by now. None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read(4096).rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
