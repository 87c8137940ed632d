"""The command rules on this host's own kernel: every execve of an unprivileged process is judged by the supervisor."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from commanded import Commanded, can_supervise

pytestmark = pytest.mark.skipif(not can_supervise(), reason="needs root and seccomp's user notification (x86_64)")

CHOSEN = "/usr/bin/od"  # small, on every Debian, not a script


@pytest.fixture(scope="module")
def denying() -> Iterator[Commanded]:
    """Anything but od."""
    made = Commanded(denied=["od *", "tac x", "rm -rf /"], require_confirmation=["pip install *"])
    yield made
    made.close()


@pytest.fixture(scope="module")
def allowing() -> Iterator[Commanded]:
    """Nothing but sh, cp, ln, python and true."""
    made = Commanded(allowed=["sh", "cp", "ln", "mv", "chmod", "python", "true", "env"])
    yield made
    made.close()


def refused(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 126 and "Permission denied" in done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "exec od", "exec /usr/bin/od x", "exec env od x", "exec nice od", "exec sh -c 'exec sh -c \"exec od\"'",
        "cp /usr/bin/od ./x && exec ./x", "ln -sf /usr/bin/od link && exec ./link", "cd /usr && exec bin/../bin/od",
        "exec /proc/self/root/usr/bin/od", "exec /lib64/ld-linux-x86-64.so.2 /usr/bin/od", "echo x | xargs od",
        "printf '#!/usr/bin/od\\n' > s && chmod +x s && exec ./s", "exec 3< /usr/bin/od; exec /proc/self/fd/3",
        "ln -sf /usr/bin od && cd od && exec ./od", "find / -maxdepth 0 -exec od {} + || exit 126",
    ],
)  # fmt: skip
def test_a_denied_program_by_any_way(denying: Commanded, script: str) -> None:
    done = denying.sh(script)
    assert done.returncode in (126, 123) and "ermission denied" in done.stderr, done
    assert "vmsandbox: not allowed (commands.denied: od *): " in done.stderr


def test_what_is_not_denied_runs_as_if_nothing_were_there(denying: Commanded) -> None:
    done = denying.sh("tac /etc/hostname; echo $?; nonexistent-program; echo $?; ./x/y/z; tac /nonexistent")
    assert done.stdout.split()[-2:] == ["0", "127"], done
    assert "not allowed" not in done.stderr
    script = "import os\ntry: os.execv('/nonexistent', ['x'])\nexcept OSError as e: print(e.errno)\n"
    script += "try: os.execv('/etc/passwd', ['x'])\nexcept OSError as e: print(e.errno)\n"
    script += "try: os.execv('/etc/passwd/x', ['x'])\nexcept OSError as e: print(e.errno)\n"
    script += "try: os.execv('/tmp', ['x'])\nexcept OSError as e: print(e.errno)\n"
    assert denying.run("/usr/bin/python3", "-c", script).stdout.split() == ["2", "13", "20", "13"]


def test_a_descriptor_is_judged_by_what_is_open(denying: Commanded) -> None:
    script = (
        "import os\n"
        "fd = os.memfd_create('harmless')\n"
        "os.write(fd, open('/usr/bin/od', 'rb').read())\n"
        "for one in (fd, os.open('/usr/bin/od', os.O_RDONLY)):\n"
        "    try: os.execve(one, ['tac'], {})\n"
        "    except OSError as error: print(error.errno, flush=True)\n"
        "os.execve(os.open('/usr/bin/true', os.O_RDONLY), ['od'], {})\n"
    )
    done = denying.run("/usr/bin/python3", "-c", script)
    assert (done.returncode, done.stdout.split()) == (0, ["13", "13"]), done


def test_who_hides_from_debuggers_is_not_root(denying: Commanded) -> None:
    """/proc/PID belongs to root then; that says nothing about the process."""
    script = "import ctypes, os; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); os.execv('/usr/bin/od', ['od'])"
    done = denying.run("/usr/bin/python3", "-c", script)
    assert done.returncode == 1 and "PermissionError" in done.stderr


def test_a_worker_is_nobodys_plumbing(allowing: Commanded) -> None:
    for script in ("exec mkdir x", "exec bash -c 'mkdir x'", "exec /usr/sbin/sshd -V"):
        assert allowing.sh(f"export VMSANDBOX_PLUMBING=1; {script}").returncode != 0
    assert not (allowing.home / "x").exists()
    assert refused(allowing.sh("VMSANDBOX_PLUMBING=1 exec bash -c true"))


def test_a_name_in_the_arguments_is_no_program(denying: Commanded) -> None:
    done = denying.run("/usr/bin/printf", "%s|", "od", "\nod", "; od x", "'od", "/usr/bin/od")
    assert done.returncode == 0 and done.stdout == "od|\nod|; od x|'od|/usr/bin/od|"


def test_an_allow_list_lets_nothing_else_run(allowing: Commanded) -> None:
    assert allowing.sh("true && python3 -c 'print(7)'").stdout == "7\n"
    assert refused(allowing.sh("exec od"))
    assert refused(allowing.sh("/usr/bin/od.x; exec ls"))
    assert refused(allowing.sh("cp /usr/bin/od true; exec ./true")), "a copy of another one"
    assert allowing.sh("cp /usr/bin/true yes; exec ./yes").returncode == 0, "a copy of an allowed one"
    assert refused(allowing.sh("cp /usr/bin/od true; echo >> true; exec ./true")), (
        "a changed copy under an allowed name"
    )
    assert refused(allowing.sh("printf '#!/usr/bin/od\\n' > s; chmod +x s; exec ./s"))
    assert allowing.sh("printf '#!/usr/bin/env python3\\nprint(8)' > s; chmod +x s; exec ./s").stdout == "8\n"
    done = allowing.run("/usr/bin/python3", "-c", "import subprocess; subprocess.run(['od', 'x'])")
    assert done.returncode == 1 and "PermissionError" in done.stderr and "not in commands.allowed" in done.stderr


def test_calls_of_another_architecture_end_the_process(denying: Commanded) -> None:
    """int 0x80 and x32 have other numbers for execve."""
    code = (
        "import ctypes, mmap, sys\n"
        "m = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex(sys.argv[1]))\n"
        "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\n"
    )
    for call in ("b814000000cd80c3", "b827000040 0f05 c3"):  # getpid: int 0x80; x32's, syscall
        assert denying.run("/usr/bin/python3", "-c", code, call).returncode == -signal.SIGSYS
    assert denying.run("/usr/bin/python3", "-c", code, "b8270000000f05c3").returncode == 0


def test_without_the_supervisor_nothing_is_executed(denying: Commanded) -> None:
    """The kernel answers ENOSYS once the listener is closed; a new connection gets a new one."""
    made = Commanded(denied=["od"])
    try:
        script = "read x; /usr/bin/true || echo dead; exec /usr/bin/true"
        process = made.begin("/bin/sh", "-c", script, stdin=subprocess.PIPE)
        time.sleep(1)
        made.kill()
        out, _err = process.communicate(b"\n", timeout=20)
        assert out == b"dead\n" and process.returncode == 126
        with pytest.raises(subprocess.TimeoutExpired):
            made.run("/usr/bin/true", timeout=2)
        made.start()
        assert made.run("/usr/bin/true").returncode == 0
        assert refused(made.sh("exec od"))
    finally:
        made.close()


def test_a_worker_cannot_wear_the_supervisor_out(denying: Commanded) -> None:
    """Many processes that execve without end, with huge and with broken arguments: others go on, and so does it."""
    hammer = (
        "import os, ctypes, threading\n"
        "libc = ctypes.CDLL(None)\n"
        "big = ['x' * 100000] * 15\n"
        "def one(n):\n"
        "    while True:\n"
        "        for path, argv in (('/nonexistent', ['x']), ('/nonexistent', big), ('/usr/bin/od', ['od'] * 3000)):\n"
        "            try: os.execv(path, argv)\n"
        "            except OSError: pass\n"
        "        for address in (0, 1, 0x7fffffffffff, -1, 1 << 63, 0xffffffffff600000):\n"
        "            libc.execve(ctypes.c_void_p(address), ctypes.c_void_p(address), None)\n"
        "            libc.execve(b'/usr/bin/od', ctypes.c_void_p(address), None)\n"
        "for n in range(8): threading.Thread(target=one, args=(n,)).start()\n"
    )
    process = denying.begin("/usr/bin/python3", "-c", hammer, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        began = time.monotonic()
        for _ in range(3):
            assert denying.sh("/usr/bin/true; exec /usr/bin/true").returncode == 0
        assert time.monotonic() - began < 20
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert denying.supervisor.poll() is None


def test_a_stderr_that_takes_nothing_holds_nothing_up(denying: Commanded) -> None:
    script = (
        "import os\n"
        "r, w = os.pipe()\n"
        "os.set_blocking(w, False)\n"
        "try:\n"
        "    while True: os.write(w, b'x' * 4096)\n"
        "except BlockingIOError: os.set_blocking(w, True)\n"
        "os.dup2(w, 2)\n"
        "for _ in range(30):\n"
        "    try: os.execv('/usr/bin/od', ['od'])\n"
        "    except OSError as error: print(error.errno)\n"
    )
    assert set(denying.run("/usr/bin/python3", "-c", script, timeout=30).stdout.split()) == {"13"}


def test_the_message_goes_only_where_the_worker_could_write(denying: Commanded) -> None:
    """A read-only descriptor of somebody else's file must not become a way for root to write there."""
    theirs = denying.folder / "theirs"
    theirs.write_text("kept")
    theirs.chmod(0o644)
    denying.sh(f"exec 2< {theirs}; exec od")
    assert theirs.read_text() == "kept"
    time.sleep(1.1)  # there are only so many in a second
    denying.sh("exec 2> mine; exec od")
    assert "not allowed" in (denying.home / "mine").read_text()


def test_the_arguments_may_change_after_the_check(denying: Commanded) -> None:
    """A known limit (docs/commands.md): the kernel reads them again. If this ever fails, the page has to be changed."""
    race = (
        "import ctypes, os, threading\n"
        "text = ctypes.create_string_buffer(b'y')\n"
        "def flip():\n"
        "    while True: text.value = b'x'; text.value = b'y'\n"
        "threading.Thread(target=flip, daemon=True).start()\n"
        "libc = ctypes.CDLL(None)\n"
        "argv = (ctypes.c_char_p * 3)(b'tac', ctypes.cast(text, ctypes.c_char_p), None)\n"
        "while True:\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        threading.Thread(target=flip, daemon=True).start()\n"
        "        libc.execve(b'/usr/bin/tac', argv, None); os._exit(99)\n"
        "    os.waitpid(pid, 0)\n"
    )
    (denying.home / "x").write_text("the denied file was read")
    os.chmod(denying.home / "x", 0o644)
    process = denying.begin("/usr/bin/python3", "-c", race, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 30)[0], "not won in 30 seconds"
        assert b"the denied file was read" in os.read(process.stdout.fileno(), 100)
    finally:
        process.kill()
        process.wait()


def test_who_answers_yes_lets_it_run_and_silence_does_not() -> None:
    import json

    master, slave = pty.openpty()
    made = Commanded(os.ttyname(slave), 2, require_confirmation=["tac *", "s"])
    try:
        import tty

        tty.setraw(slave)
        (made.home / "f").write_text("text\n")

        def question(timeout: float = 20) -> dict[str, object]:
            data = b""
            until = time.monotonic() + timeout
            while time.monotonic() < until:
                if select.select([master], [], [], 0.2)[0]:
                    data += os.read(master, 65536)
                    for line in data.split(b"\n")[:-1]:
                        if b'"ask"' in line:
                            found: dict[str, object] = json.loads(line)["ask"]
                            return found
            raise AssertionError(data)

        def answered(
            word: str | None, script: str = "exec tac f", meanwhile: Callable[[], object] = lambda: None
        ) -> subprocess.CompletedProcess[bytes]:
            process = made.begin("/bin/sh", "-c", script)
            if word is not None:
                asked = question()
                assert asked["argv"] == script.split()[1:] and asked["cwd"] == str(made.home)
                meanwhile()
                if word:
                    os.write(master, json.dumps({"id": asked["id"], "answer": word}).encode() + b"\n")
            out, err = process.communicate(timeout=20)
            return subprocess.CompletedProcess([], process.returncode, out, err)

        agreed = answered("yes")
        assert agreed.stdout == b"text\n", agreed
        assert answered("no").returncode == 126
        silent = answered("")
        assert silent.returncode == 126 and b"no answer in 2 seconds" in silent.stderr
        assert answered("always").stdout == b"text\n"
        assert answered(None).stdout == b"text\n"
        (made.home / "s").write_text("#!/bin/sh\necho one\n")
        (made.home / "s").chmod(0o755)
        assert answered("yes", "exec ./s").stdout == b"one\n"
        changed = answered("yes", "exec ./s", lambda: (made.home / "s").write_text("#!/bin/sh\necho other\n"))
        assert changed.stdout == b"" and b"changed while it was asked about" in changed.stderr
        os.close(master)
        master = -1
        gone = made.sh("exec tac f f")
        assert gone.returncode == 126 and "nobody is there to be asked" in gone.stderr
    finally:
        made.close()
        os.close(slave)
        if master >= 0:
            os.close(master)


def test_python_of_this_test_is_the_systems() -> None:
    """What the others rest on: the programs that they name are root's."""
    for name in ("sh", "python3", "tac", "od", "true"):
        path = shutil.which(name, path="/usr/bin")
        assert path and os.stat(path).st_uid == 0, name
    assert sys.platform == "linux"
