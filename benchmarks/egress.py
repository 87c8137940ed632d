#!/usr/bin/env python3
"""What the broker costs: beside a direct connection and beside squid, on this host; and a session with and without it.

throughput  one download of --megabytes over HTTPS: direct; through squid (a tunnel, and looking inside: ssl_bump);
            through the broker (passed through after the name was checked, and looking inside)
latency     a small answer over HTTPS, each over a connection of its own
session     `vmsandbox session --empty -- true`, whole process, with --net none and --net proxy
memory      proportional memory (PSS) of the processes of a kept session, with --net none and --net proxy

The server, curl and squid run on 127.0.0.1. squid needs Debian's squid-openssl (left out where it is not installed).
Everything is interleaved, so that a slow minute hits all alike; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vmsandbox.broker.environment import make_environment
from vmsandbox.broker.start import Listeners, start_broker
from vmsandbox.egress.values import BrokerConfig, Dlp, EgressPolicy, HostRule, Tls
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.network.authority import make_authority
from vmsandbox.session.sandbox import SessionFolder

NAME = "server.test"
Samples = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20, help="small requests in each round")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--no-guests", action="store_true", help="leave session and memory out")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="vmsandbox-bench-", dir="/var/tmp"))
    samples: Samples = {}
    bench = Bench(work, options.megabytes)
    try:
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for way, arguments in bench.ways.items():
                samples.setdefault(f"throughput {way}", []).append(bench.curl("big", arguments))
                for _ in range(options.requests):
                    samples.setdefault(f"latency {way}", []).append(bench.curl("small", arguments))
            if not options.no_guests:
                for net in ("none", "proxy"):
                    samples.setdefault(f"session {net}", []).append(session(net))
        if not options.no_guests:
            for net in ("none", "proxy"):
                samples[f"memory {net}"] = [memory(net)]
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    finally:
        bench.close()
        shutil.rmtree(work, ignore_errors=True)
    report(samples, options.megabytes, options.json)
    return 0


class Bench:
    """One HTTPS server, one squid and two brokers on this host."""

    def __init__(self, work: Path, megabytes: int) -> None:
        self.work = work
        work.chmod(0o755)  # squid's user reads its configuration
        self._endings: list[Callable[[], object]] = []
        self._openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout ca.key -out ca.pem "
                      "-subj /CN=bench")  # fmt: skip
        self._openssl("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key -out server.csr "
                      f"-subj /CN={NAME}")  # fmt: skip
        (work / "names").write_text(f"subjectAltName=DNS:{NAME}\n")
        self._openssl("x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names "
                      "-out server.pem")  # fmt: skip
        self.port = self._serve(megabytes * 1_000_000)
        direct = ["--cacert", str(work / "ca.pem"), "--resolve", f"{NAME}:{self.port}:127.0.0.1"]
        self.ways: dict[str, list[str]] = {"direct": direct}
        if shutil.which("squid"):
            tunnel, inside = self._squid()
            self.ways["squid tunnel"] = ["--cacert", str(work / "ca.pem"), "-x", tunnel]
            self.ways["squid inside"] = ["--cacert", str(work / "ca.pem"), "-x", inside]
        self.ways["broker tunnel"] = self._broker(Tls.PASSTHROUGH)
        self.ways["broker inside"] = self._broker(Tls.INSPECT)
        for arguments in self.ways.values():
            self.curl("small", arguments)

    def close(self) -> None:
        for end in reversed(self._endings):
            end()

    def curl(self, what: str, arguments: list[str]) -> float:
        """Seconds of one request."""
        url = f"https://{NAME}:{self.port}/{what}"
        argv = ["curl", "-q", "-sSf", "-o", os.devnull, "-w", "%{time_total}", *arguments, url]
        env = {"PATH": os.environ["PATH"]}
        return float(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300, env=env).stdout)

    def _openssl(self, words: str) -> None:
        subprocess.run(["openssl", *words.split()], cwd=self.work, check=True, capture_output=True)

    def _serve(self, size: int) -> int:
        piece = os.urandom(1 << 20)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                left = size if self.path == "/big" else 100
                self.send_response(200)
                self.send_header("content-length", str(left))
                self.end_headers()
                while left:
                    left -= self.wfile.write(piece[:left])

            def log_message(self, *_words: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.work / "server.pem", self.work / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._endings.append(server.shutdown)
        return int(server.server_address[1])

    def _squid(self) -> tuple[str, str]:
        ports = [_free_port(), _free_port()]
        (self.work / "hosts").write_text(f"127.0.0.1 {NAME}\n")
        (self.work / "both.pem").write_text((self.work / "ca.pem").read_text() + (self.work / "ca.key").read_text())
        database = self.work / "certificates"
        certgen = "/usr/lib/squid/security_file_certgen"
        subprocess.run([certgen, "-c", "-s", str(database), "-M", "4MB"], check=True, capture_output=True)
        user = "proxy"
        shutil.chown(database, user, user)
        for path in (database, *database.rglob("*")):
            shutil.chown(path, user, user)
        shutil.chown(self.work / "both.pem", user, user)
        (self.work / "squid.conf").write_text(
            f"""
http_port 127.0.0.1:{ports[0]}
http_port 127.0.0.1:{ports[1]} ssl-bump cert={self.work}/both.pem generate-host-certificates=on
sslcrtd_program {certgen} -s {database} -M 4MB
ssl_bump bump all
tls_outgoing_options cafile={self.work}/ca.pem
acl ports port {self.port}
http_access deny !ports
http_access allow all
hosts_file {self.work}/hosts
cache deny all
access_log none
cache_log {os.devnull}
pid_filename none
shutdown_lifetime 0
""",
        )
        squid = subprocess.Popen(["squid", "-N", "-f", str(self.work / "squid.conf")], stderr=subprocess.DEVNULL)
        self._endings.append(lambda: (squid.terminate(), squid.wait(10)))
        for port in ports:
            _wait_for(port)
        return f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"

    def _broker(self, tls: Tls) -> list[str]:
        authority = make_authority("bench")
        ca = self.work / f"{tls}.pem"
        ca.write_text(authority.certificate)
        rule = HostRule(NAME, (self.port,), addresses=("127.0.0.1",), tls=tls, source="bench")
        policy = EgressPolicy(allow=(rule,), dlp=Dlp(secrets=False, canaries=False))
        config = BrokerConfig("bench", policy, {}, (), authority.certificate, authority.key)
        door = socket.create_server(("127.0.0.1", 0), backlog=128)
        programs = Programs()
        environment = make_environment(Layout.from_environment(), programs, Monitor())
        broker = start_broker(
            config, Listeners(door), environment, programs, lambda _event: None, ca_bundle=self.work / "ca.pem"
        )
        self._endings.append(broker.stop)
        assert broker.wait_ready(30)
        trusted = self.work / "ca.pem" if tls is Tls.PASSTHROUGH else ca
        return ["--cacert", str(trusted), "-x", f"http://127.0.0.1:{door.getsockname()[1]}"]


def session(net: str) -> float:
    """Seconds of one whole session that runs `true`."""
    began = time.monotonic()
    _vmsandbox("session", "--empty", "--net", net, "--", "true")
    return time.monotonic() - began


def memory(net: str) -> float:
    """MiB (PSS) of everything that runs for a kept session."""
    name = f"bench-{os.getpid()}"
    before = _processes()
    _vmsandbox("start", "--empty", "--name", name, "--net", net)
    try:
        time.sleep(5)
        folder = SessionFolder(Layout.from_environment(), name)
        qemu = folder.qemu_pid(folder.info())
        return sum(_pss(pid) for pid in {qemu, *(_processes() - before)})
    finally:
        _vmsandbox("stop", name)


def _processes() -> set[int]:
    """Processes of this program: keepers and brokers."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"vmsandbox" in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def _pss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _vmsandbox(*words: str) -> None:
    argv = [sys.executable, "-m", "vmsandbox", *words]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def report(samples: Samples, megabytes: int, target: Path | None) -> None:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rows = {}
    for name, median in medians.items():
        kind, _, way = name.partition(" ")
        reference = medians.get(f"{kind} direct", medians.get(f"{kind} none", median))
        unit = {"latency": 1000, "throughput": 1, "session": 1, "memory": 1}[kind]
        squid = medians.get(f"{kind} squid {way.partition(' ')[2]}") if way.startswith("broker") else None
        rows[name] = {"median": median, "to reference": median / reference, "to squid": squid and median / squid}
        shown = f"{name:26} n={len(samples[name]):3}  {median * unit:9.3f}"
        shown += {"latency": " ms ", "memory": " MiB"}.get(kind, " s  ")
        shown += f"  {median / reference:6.2f} x reference"
        print(shown + (f"  {median / squid:6.2f} x squid" if squid else "")
              + (f"  {megabytes / median:6.0f} MB/s" if kind == "throughput" else ""))  # fmt: skip
    if target:
        target.write_text(json.dumps({"samples": samples, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
