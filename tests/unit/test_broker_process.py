"""The broker's process: what it may, how it ends, and that nothing passes when it is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_running import Authority, Server, broker_environment, one_answer, rule, running

from vmsandbox.broker.environment import environment_key, find_environment, make_environment, site_packages
from vmsandbox.broker.failures import say_failure
from vmsandbox.broker.start import Listeners, start_broker
from vmsandbox.egress.values import BrokerConfig, EgressEvent, EgressKind, EgressPolicy
from vmsandbox.errors import HostError
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def _running(folder: Path, session: Authority, server: Server) -> object:
    return running(folder, session, session.file(folder), rule("allowed.test", server.port, addresses=("127.0.0.1",)))


def _gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_what_the_process_may(tmp_path: Path, session: Authority, server: Server) -> None:
    with _running(tmp_path, session, server) as broker:  # type: ignore[attr-defined]
        proc = Path(f"/proc/{broker.broker.pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        limits = {line[:26].strip(): line[26:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
        assert status["NoNewPrivs"] == "1"
        assert status["CapEff"].strip("0") == "" or os.geteuid() != 0
        if os.geteuid() == 0:
            users = {*status["Uid"].split(), *status["Gid"].split()}
            assert len(users) == 1 and 0x70000000 <= int(users.pop()) < 0x80000000
            assert status["Groups"].strip() == ""
            assert limits["Max processes"] == ["0", "0"]
        assert limits["Max core file size"] == ["0", "0"]
        assert limits["Max file size"] == ["0", "0"]
        assert int(limits["Max open files"][1]) < 4096
        assert int(limits["Max address space"][1]) < 4 << 30
        assert (proc / "stat").read_text().rpartition(")")[2].split()[16] == "5"  # nice
        assert (proc / "cwd").readlink() == Path("/")
        words = (proc / "environ").read_bytes() + (proc / "cmdline").read_bytes()
        assert b"PRIVATE KEY" not in words and session.key.encode() not in words
        assert "landlock" in broker.event(kind=EgressKind.READY).more["confined"] or not _has_landlock()
        inherited = {os.readlink(fd) for fd in (proc / "fd").iterdir()}
        assert not [name for name in inherited if name.startswith("/") and not name.startswith("/dev/null")]


def _has_landlock() -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0)


@pytest.mark.parametrize("own_user", [True, False])
def test_what_a_taken_over_process_could_not_do(tmp_path: Path, own_user: bool) -> None:
    """Tried from inside, with a user of its own and without: then Landlock alone holds it."""
    readable = tmp_path / "readable"
    readable.mkdir(mode=0o755)
    (readable / "file").write_text("x")
    secret = tmp_path / "secret"
    secret.write_text("x")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    code = """
        import os, socket, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from vmsandbox.broker import confine
        user = int(sys.argv[4]) or None
        print(confine.confine(user, [Path(sys.argv[2])], 32, 1 << 30))
        if user: confine.no_more_processes()
        def tried(what):
            try:
                what()
                return "done"
            except OSError as error:
                return type(error).__name__
        print(tried(lambda: open(sys.argv[2] + "/file").read()))
        print(tried(lambda: open(sys.argv[3]).read()))
        print(tried(lambda: open("/etc/passwd").read()))
        print(tried(lambda: open(sys.argv[2] + "/new", "w")))
        print(tried(lambda: os.listdir("/")))
        print(tried(lambda: socket.create_server(("127.0.0.1", 0))))
        print(tried(lambda: os.kill(os.getppid(), 0)))
        print(tried(os.fork) if user else "BlockingIOError")
    """
    user = "1879048999" if own_user and os.geteuid() == 0 else "0"
    argv = [sys.executable, "-c", textwrap.dedent(code), str(ROOT), str(readable), str(secret), user]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    in_force, read, *others = done.stdout.split("\n")[:9]
    assert read == "done", done.stderr
    if not _has_landlock():
        pytest.skip("this kernel has no Landlock")
    assert "landlock" in in_force
    assert others == ["PermissionError"] * 6 + ["BlockingIOError"], (done.stdout, done.stderr)


def test_killed_nothing_passes_and_it_is_told(tmp_path: Path, session: Authority, server: Server) -> None:
    with _running(tmp_path, session, server) as broker:  # type: ignore[attr-defined]
        with broker.connect() as kept:
            to = f"allowed.test:{server.port}"
            kept.sendall(f"GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\n\r\n".encode())
            assert b" 200 " in kept.recv(65536)
            before = server.connections
            os.kill(broker.broker.pid, signal.SIGKILL)
            assert broker.broker.wait(5) and not broker.broker.alive
            kept.settimeout(5)
            with pytest.raises(OSError):
                for _ in range(10):
                    kept.sendall(f"GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\n\r\n".encode())
                    if not kept.recv(65536):
                        raise ConnectionResetError
        with pytest.raises(OSError):
            broker.connect()
        assert server.connections == before
        event = broker.event(kind=EgressKind.FAILED, rule="broker-ended")
        assert "nothing of the guest's reaches the network" in event.reason


def test_stop_ends_it_and_tells_no_failure(tmp_path: Path, session: Authority, server: Server) -> None:
    with _running(tmp_path, session, server) as broker:  # type: ignore[attr-defined]
        begun = time.monotonic()
        broker.broker.stop()
        assert time.monotonic() - begun < 1 and not broker.broker.alive and _gone(broker.broker.pid)
        broker.broker.stop()
        assert [event.kind for event in broker.events] == [EgressKind.READY]


@pytest.mark.parametrize("stdin_ends", [True, False])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_never_outlives_its_parent(tmp_path: Path, session: Authority, how: int, stdin_ends: bool) -> None:
    """Two ways to notice: its standard input ends, or (where somebody else holds that open) the kernel kills it."""
    code = """
        import json, socket, subprocess, sys, time
        from pathlib import Path
        sys.path[:0] = sys.argv[1:3]
        from broker_running import Authority, running
        told = json.loads(sys.stdin.read())
        session = Authority(*told)
        folder = Path(sys.argv[3])
        with running(folder, session, session.file(folder)) as broker:
            held = [broker.broker._stdin.fileno()] if sys.argv[4] == "False" else []
            print(broker.broker.pid, subprocess.Popen(["sleep", "60"], pass_fds=held).pid, flush=True)
            time.sleep(60)
    """
    import json

    argv = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(ROOT),
        str(ROOT / "tests/unit"),
        str(tmp_path),
        str(stdin_ends),
    ]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(json.dumps([session.certificate, session.key]).encode())
        parent.stdin.close()
        pid, sleeper = map(int, parent.stdout.readline().split())
        assert not _gone(pid, 0.1)
        parent.send_signal(how)
        parent.wait(10)
        gone = _gone(pid)
        os.kill(sleeper, signal.SIGKILL)
        assert gone


def test_a_connection_waits_for_it(tmp_path: Path, session: Authority, server: Server) -> None:
    """Nobody waits for READY: the socket listens before, and the first request is answered when it can be."""
    allow = rule("allowed.test", server.port, addresses=("127.0.0.1",))
    with running(tmp_path, session, session.file(tmp_path), allow, ready=False) as broker:
        assert broker.status(f"http://allowed.test:{server.port}/")[0] == 200


def test_a_unix_socket_is_a_door_too(tmp_path: Path, short_home: Path, session: Authority, server: Server) -> None:
    short_home.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(short_home / "broker"))
        door.listen(64)
        allow = (rule("allowed.test", server.port, addresses=("127.0.0.1",)),)
        config = BrokerConfig("test", EgressPolicy(allow=allow), {}, (), session.certificate, session.key)
        events: list[EgressEvent] = []
        broker = start_broker(config, Listeners(door), broker_environment(), Programs(), events.append,
                              ca_bundle=session.file(tmp_path))  # fmt: skip
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(short_home / "broker"))
                to = f"allowed.test:{server.port}"
                sock.sendall(f"GET http://{to}/unix HTTP/1.1\r\nHost: {to}\r\n\r\n".encode())
                assert b" 200 " in sock.recv(65536)
        finally:
            broker.stop()
        assert [event.path for event in events if event.kind is EgressKind.ALLOWED] == ["/unix"]


def test_a_bad_configuration_is_a_failure_with_words(tmp_path: Path, session: Authority) -> None:
    config = BrokerConfig("test", EgressPolicy(), {}, (), "no certificate", "no key")
    events: list[EgressEvent] = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        broker = start_broker(config, Listeners(door), broker_environment(), Programs(), events.append,
                              ca_bundle=session.file(tmp_path))  # fmt: skip
        assert broker.wait(10)
    assert not broker.wait_ready(1) and broker.status == 1
    (event,) = events
    assert event.rule == "broker-ended" and "ValueError" in event.more["details"]


def test_many_equal_refusals_become_one_line_with_a_count(tmp_path: Path, session: Authority, server: Server) -> None:
    with _running(tmp_path, session, server) as broker:  # type: ignore[attr-defined]
        with broker.connect() as sock:
            for _ in range(50):
                sock.sendall(b"GET http://evil.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n")
                assert b" 403 " in one_answer(sock)
        time.sleep(1.5)
        found = [event for event in broker.events if event.kind is EgressKind.REFUSED]
        assert sum(int(event.more.get("count", "1")) for event in found) == 50 and len(found) <= 6


def test_a_broker_that_says_what_is_no_event_is_ended(tmp_path: Path, session: Authority) -> None:
    """An environment whose interpreter is something else: it says rubbish and would run on."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").write_text('#!/bin/sh\necho \'{"kind": "allowed"}\'\nexec sleep 60\n')
    (environment / "bin/python").chmod(0o755)
    config = BrokerConfig("test", EgressPolicy(), {}, (), session.certificate, session.key)
    events: list[EgressEvent] = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        broker = start_broker(config, Listeners(door), environment, Programs(), events.append,
                              ca_bundle=session.file(tmp_path))  # fmt: skip
        assert broker.wait(2)
    assert [event.rule for event in events] == ["broker-ended"] and "no event" in events[0].more["details"]


def test_what_a_failure_says_quotes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """An exception's message may hold a header, and a header a secret; the words end up in the records."""
    try:
        raise ValueError("sk-secret")
    except ValueError as error:
        say_failure("somewhere", error)
    said = capfd.readouterr().err
    assert "ValueError" in said and "test_broker_process.py" in said and "secret" not in said


def test_without_authorities_it_does_not_start(monkeypatch: pytest.MonkeyPatch, session: Authority) -> None:
    config = BrokerConfig("test", EgressPolicy(), {}, (), session.certificate, session.key)
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/bundle")
    with socket.create_server(("127.0.0.1", 0)) as door, pytest.raises(HostError, match="certificate authorities"):
        start_broker(config, Listeners(door), broker_environment(), Programs(), print)


def _layout(folder: Path) -> Layout:
    return Layout(**dict.fromkeys(("images", "templates", "live", "records", "run", "cache", "config"), folder))


def test_an_interrupted_environment_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = _layout(tmp_path)
    assert find_environment(layout) is None
    left = tmp_path / "broker/.making-x"
    left.mkdir(parents=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(HostError, match="packages could not be installed") as failed:
        make_environment(layout, Programs(), Monitor())
    assert "mitmproxy" in failed.value.details  # pip's own settings were used, and its last words are told
    assert find_environment(layout) is None
    assert sorted(path.name for path in (tmp_path / "broker").iterdir()) == ["lock"]
    whole = tmp_path / "broker" / environment_key()
    site_packages(whole).mkdir(parents=True)
    assert find_environment(layout) is None  # without an interpreter
    (whole / "bin").mkdir()
    (whole / "bin/python").symlink_to(sys.executable)
    assert find_environment(layout) == whole


def test_nothing_beside_vmsandbox_can_be_imported_in_the_broker() -> None:
    """What is installed where vmsandbox is installed stays out: its versions are not the broker's."""
    from vmsandbox.broker.start import _START

    beside = ("paramiko", "pydantic", "typer", "broker_running")
    code = _START.replace(
        "from vmsandbox.broker.child import main\nmain()",
        f"""
import vmsandbox.egress.values
for name in {beside}:
    try:
        __import__(name)
    except ImportError:
        print("no", name)
import vmsandbox.broker.child
import mitmproxy
print("aioquic" in sys.modules)
print(mitmproxy.__file__)
""",
    )
    environment = broker_environment()
    argv = [environment / "bin/python", "-I", "-S", "-c", code, ROOT / "vmsandbox", site_packages(environment)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert done.stdout.split("\n")[:5] == [*(f"no {name}" for name in beside), "False"], done.stderr
    assert str(environment) in done.stdout
