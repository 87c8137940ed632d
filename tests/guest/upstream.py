"""Servers that guests with a network talk to: HTTPS with an authority of the tests' own, on a loopback address.

Names lead here through `addresses` of a policy's rules alone: no name server is asked, nothing leaves this machine.
"""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ADDRESS = "127.0.0.77"
NAMES = ("allowed.test", "api.test", "other.test")
EVENTS, EVENT_SECONDS = 4, 0.4


@dataclass
class Upstream:
    """A running server. `seen`: path and headers (lower-case names) of every request."""

    folder: Path
    port: int = 0
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    @property
    def bundle(self) -> Path:
        """The authority that its certificate is signed by, as PEM."""
        return self.folder / "ca.pem"

    def of(self, path: str) -> list[dict[str, str]]:
        """Headers of the requests for a path."""
        return [headers for at, headers, _body in list(self.seen) if at == path]

    def policy(self, *extra: str) -> str:
        """A policy that allows two of its names, and has a secret for one of them. extra: lines below `network`."""
        lines = [
            "sandbox:",
            "  network:",
            "    mode: restricted",
            "    rules:",
            *(
                f"      - {{host: {name}, ports: [{self.port}], addresses: [{ADDRESS}]}}"
                for name in ("allowed.test", "api.test")
            ),
            "    secrets:",
            "      - {name: TEST_API_KEY, from: {env: TEST_API_KEY}, hosts: [api.test], header: x-api-key}",
            *(f"    {line}" for line in extra),
        ]
        return "\n".join(lines) + "\n"


def serve(folder: Path, port: int = 0) -> tuple[Upstream, ThreadingHTTPServer]:
    """Start it. /echo answers with what it got, /events streams, /repo.git/ is a git repository."""
    up = Upstream(folder)
    certificate = _certificates(folder)
    _repository(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_words: Any) -> None:
            pass

        def do_GET(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(size)
            up.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            if self.path.startswith("/events"):
                self._stream()
            elif self.path.startswith("/repo.git/"):
                self._file(folder / self.path.split("?")[0].lstrip("/"))
            else:
                self._answer(200, f"{self.command} {self.path} {self.headers['host']}\n".encode())

        do_POST = do_GET

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _file(self, path: Path) -> None:
            if ".." not in path.parts and path.is_file():
                self._answer(200, path.read_bytes())
            else:
                self._answer(404, b"")

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(EVENTS):
                data = f"data: {number}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
                time.sleep(EVENT_SECONDS)
            self.wfile.write(b"0\r\n\r\n")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_words: Any) -> None:
            pass

    server = Server((ADDRESS, port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    up.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return up, server


def _certificates(folder: Path) -> Path:
    """ca.pem, and server.pem with its key, signed by it."""
    now = datetime.now(UTC)

    def make(name: str, issuer: x509.Name | None, signer: Any, key: Any, *extensions: Any) -> x509.Certificate:
        own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(issuer or own, own, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=2))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = make("tests", None, authority, authority, (x509.BasicConstraints(True, 0), True), (usage, True),
              (identifier, False))  # fmt: skip
    leaf = make(
        "allowed.test", ca.subject, authority, key,
        (x509.SubjectAlternativeName([x509.DNSName(name) for name in NAMES]), False),
        (x509.BasicConstraints(False, None), True),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False),
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(leaf.public_bytes(pem) + private)
    return folder / "server.pem"


def _repository(folder: Path) -> None:
    """A bare repository that git's plain-file protocol can fetch."""
    work = folder / "work"
    work.mkdir()
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    (work / "cloned.txt").write_text("over HTTPS\n")
    for words in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", work, *words], check=True, capture_output=True)
    subprocess.run(["git", "clone", "-q", "--bare", work, folder / "repo.git"], check=True, capture_output=True)
    subprocess.run(["git", "-C", folder / "repo.git", "update-server-info"], check=True, capture_output=True)
