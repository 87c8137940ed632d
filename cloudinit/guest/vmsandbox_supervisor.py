"""Answers every execve of the worker's processes by the policy's command rules (commands.json).

Root's, started before the first connection. The kernel holds the caller until it answers; if it is not there, the call
fails (ENOSYS), so nothing runs unjudged. What it cannot promise stands in docs/commands.md: a thread of the caller may
change the arguments after they were read, and a program may do without execve what another does.
"""

import array
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time

import vmsandbox_calls as calls
from vmsandbox_asking import Asking, shown_line
from vmsandbox_commands import ALLOW, ASK, DENY, Command, Rules
from vmsandbox_exempt import SHELLS, Exempt
from vmsandbox_programs import Caller, Programs, find_descriptor, find

RULES = "/etc/vmsandbox/commands.json"
SOCKET = "/run/vmsandbox/commands.sock"
PORT = "/dev/virtio-ports/org.vmsandbox.ask"
MOST_VERDICTS = 4096
MESSAGES_PER_SECOND = 30


class Judged:
    """What was found about a call. identity: of the file. cwd: None if it does not matter. watch: a login shell."""

    __slots__ = (
        "action", "argv", "cut", "cwd", "folder", "identity", "path", "program", "real", "steady", "watch", "why"
    )  # fmt: skip

    def same(self, other):
        return (self.path, self.argv, self.real, self.identity) == (
            other.path, other.argv, other.real, other.identity)  # fmt: skip


class Supervisor:
    """rules: a parsed commands.json. port: path of the port to the host. notify: tells systemd to keep a listener."""

    def __init__(self, rules, port=PORT, exempt=None, programs=None, notify=lambda fd: None):
        self._rules = Rules(rules["layers"])
        self._programs = programs or Programs()
        self._exempt = exempt or Exempt()
        self._notify = notify
        self._verdicts = {}
        self._listeners = {}
        self._poll = select.poll()
        self._messages, self._last = [0.0, 0], None
        self._asking = Asking(port, float(rules.get("confirm_seconds", 60)))

    def add(self, listener):
        calls.answer_at_once(listener)
        self._listeners[listener] = True
        self._poll.register(listener, select.POLLIN)

    def serve(self, server):
        """Answer for ever. server: a listening SOCK_SEQPACKET socket, on which launchers bring listeners."""
        self._poll.register(server, select.POLLIN)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.siginterrupt(signal.SIGALRM, True)
        while True:
            port = self._asking.port_to_watch()
            if port >= 0:
                self._poll.register(port, select.POLLIN)
            ready = self._poll.poll(self._asking.patience())
            if port >= 0:
                self._poll.unregister(port)
            for fd, events in ready:  # one of each: no connection keeps the others waiting
                if fd == server.fileno():
                    self._take(server)
                elif fd == port:
                    pass  # `answers` reads it
                elif events & select.POLLIN:
                    self._one(fd)
                elif events:  # its last process has ended
                    self._poll.unregister(fd)
                    del self._listeners[fd]
                    os.close(fd)
            for question, yes in self._asking.answers():
                self._answered(question, yes)

    def _take(self, server):
        peer, _ = server.accept()
        with peer:
            uid = struct.unpack("=3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            peer.settimeout(5)
            fds = array.array("i")
            try:
                _data, control, _flags, _address = peer.recvmsg(64, socket.CMSG_LEN(4))
                for level, kind, data in control:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        fds.frombytes(data[: len(data) - len(data) % 4])
                if uid == os.geteuid() and len(fds) == 1:
                    self.add(fds[0])
                    self._notify(fds[0])
                    peer.send(b"ok")
                    return
            except OSError:
                pass
            for fd in fds:
                os.close(fd)

    def _one(self, listener):
        """Take one call and answer it, or let it wait for a person."""
        try:
            call = calls.Call(listener)
        except calls.Gone:
            return
        try:
            if self._exempt.is_root(call.pid):  # sshd on its way to a login
                call.check()
                call.go_on()
                return
            judged = self._judged(call)
            call.check()
            if judged.action == ALLOW and not judged.watch:
                call.go_on()
            elif self._exempt.lets(call, judged):
                call.go_on()
            else:
                self._not_at_once(call, judged)
        except calls.Gone:
            return
        except OSError as error:
            self._cannot(call, error)
        except Exception as error:
            call.refuse(errno.EPERM)
            print(f"vmsandbox: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _not_at_once(self, call, judged):
        if judged.action == ASK:
            judged.folder = Caller(call.pid).cwd
        if judged.action == ALLOW or (judged.action == ASK and self._asking.is_always(judged)):
            call.go_on()
        elif judged.action == DENY:
            self._deny(call, judged, judged.why)
        elif problem := self._asking.ask(call, judged):
            self._deny(call, judged, f"{judged.why}: {problem}")

    def _cannot(self, call, error):
        """The file is not there, say: the kernel would answer the same. (Its own answer might be another by then.)"""
        call.refuse(error.errno if error.errno in _KERNELS_OWN else errno.EACCES)

    def _answered(self, question, problem):
        """A person, or the time, has said it. The arguments are read again: another thread had seconds to change."""
        call, asked = question
        try:
            now = self._judged(call, fresh=True)
            call.check()
            if problem is None and now.same(asked):
                call.go_on()
            else:
                self._deny(call, asked, f"{asked.why}: {problem or 'it was changed while it was asked about'}")
        except (calls.Gone, OSError):
            call.refuse(errno.EACCES)

    def _deny(self, call, judged, why):
        self._asking.denied(judged, why)
        now = time.monotonic()
        if now - self._messages[0] >= 1:
            self._messages = [now, 0]
        last, self._last = self._last, (call.pid, judged.real, judged.argv, now // 5)
        self._messages[1] += last != self._last  # a shell goes through PATH, where /bin is /usr/bin
        if last != self._last and self._messages[1] <= MESSAGES_PER_SECOND:
            text = f"vmsandbox: not allowed ({why}): {shown_line(judged.argv, 200)}\n"
            self._exempt.tell(call.pid, text.encode("utf-8", "backslashreplace"))
        call.refuse(errno.EACCES)

    def _judged(self, call, fresh=False):
        path, argv, cut = call.read()
        caller = Caller(call.pid)
        key = (path, tuple(argv))
        if path is not None and not fresh and (known := self._verdicts.get(key)) is not None:
            try:
                if _identity(os.stat(caller.root + (path if path[:1] == "/" else caller.cwd + "/" + path))) == (
                    known.identity
                ) and known.cwd in (None, caller.cwd):
                    return known
            except OSError:
                pass
        judged = self._judge(call, caller, path, argv, cut)
        if judged.steady and len(key[1]) < 64:
            if len(self._verdicts) >= MOST_VERDICTS:
                self._verdicts.clear()
            self._verdicts[key] = judged
        return judged

    def _judge(self, call, caller, path, argv, cut):
        found = find_descriptor(caller, call.descriptor) if path is None else find(caller, path)
        judged = Judged()
        judged.program = self._programs.of(caller, found, path or f"/dev/fd/{call.descriptor}")
        judged.path, judged.argv, judged.cut = path, argv, cut
        judged.identity, judged.real = _identity(found.info), found.real
        looked = []

        def look(word):
            looked.append(word)
            try:
                return self._programs.program(caller, word)
            except (OSError, ValueError):
                return None

        def folder():
            judged.cwd = caller.cwd
            return judged.cwd

        judged.cwd = None
        command = Command(judged.program, argv[1:], argv[0] if argv else "", folder, cut, look)
        judged.action, judged.why = self._rules.judge(command)
        judged.watch = found.own and found.real in SHELLS
        judged.steady = judged.program.steady and not looked
        return judged


_KERNELS_OWN = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EFAULT, errno.ENOEXEC
)  # fmt: skip


def _identity(info):
    return info.st_dev, info.st_ino, info.st_ctime_ns, info.st_size, info.st_mode, info.st_uid


def keep_listener(fd):
    """Let systemd keep a copy (sd_notify, FDSTORE=1): a supervisor that is started again goes on with it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            manager.sendmsg([b"FDSTORE=1\nFDNAME=listener"], rights)


def kept_listeners():
    """What systemd kept (sd_listen_fds): descriptors from 3 on."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return range(0)
    return range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))


def listen(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    server.bind(path)
    os.umask(before)
    server.listen(16)
    return server


def main():
    with open(RULES) as file:
        supervisor = Supervisor(json.load(file), notify=keep_listener)
    for fd in kept_listeners():
        supervisor.add(fd)
    supervisor.serve(listen(SOCKET))
