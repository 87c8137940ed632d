"""What a broker under test talks to: authorities, web servers on 127.0.0.x, a DNS server."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import json
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Authority:
    """A certificate authority: PEM of its certificate and key."""

    certificate: str
    key: str

    def leaf(self, folder: Path, *names: str) -> Path:
        """A PEM file with a certificate for these names, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.load_pem_x509_certificate(self.certificate.encode())
        signer = serialization.load_pem_private_key(self.key.encode(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        alternatives: list[x509.GeneralName] = []
        for name in names:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        certificate = (
            _builder(names[0], issuer.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName(alternatives), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
            .sign(signer, hashes.SHA256())
        )
        path = folder / f"leaf-{abs(hash(names))}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + _pem(key))
        return path

    def file(self, folder: Path) -> Path:
        """A PEM file with the certificate."""
        path = folder / f"ca-{abs(hash(self.certificate))}.pem"
        path.write_text(self.certificate)
        return path


def authority(name: str) -> Authority:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signs = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(name, subject, key.public_key())
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(signs, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate.public_bytes(serialization.Encoding.PEM).decode(), _pem(key).decode())


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=7))
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Server:
    """A web server of a test's own. seen: each request's line, Host, and body; connections: how many came."""

    def __init__(self, address: str = "127.0.0.1", tls: Path | None = None, port: int = 0) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.connections = 0
        self.answer: Callable[[http.server.BaseHTTPRequestHandler], None] | None = None
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self._server = _Quiet((address, port), handler)
        self._server.of_test = self
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.context = context
        self.address, self.port = self._server.server_address[:2]
        self.thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True
    context: ssl.SSLContext | None = None
    of_test: Server
    request_queue_size = 64

    def get_request(self) -> tuple[socket.socket, object]:
        sock, address = super().get_request()
        self.of_test.connections += 1
        return sock, address

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        if self.context is not None:
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)
        with suppress(OSError):
            request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_test: Server

    def _any(self) -> None:
        body = self._body()
        self.server_of_test.seen.append((self.requestline, self.headers.get("host", ""), body))
        if self.server_of_test.answer is not None:
            self.server_of_test.answer(self)
            return
        told = json.dumps({"line": self.requestline, "host": self.headers.get("host"), "bytes": len(body)}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = _any

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def log_message(self, *_: object) -> None:
        """Quiet."""


_HTTP2_SERVER = """
import json, socket, ssl, sys, threading
import h2.config, h2.connection, h2.events
listening = socket.create_server(("127.0.0.1", 0))
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
context.set_alpn_protocols(["h2"])
print(listening.getsockname()[1], flush=True)
def serve(sock):
    sock = context.wrap_socket(sock, server_side=True)
    here = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    here.initiate_connection()
    sock.sendall(here.data_to_send())
    asked, sizes = {}, {}
    while data := sock.recv(65536):
        for event in here.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                asked[event.stream_id] = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                sizes[event.stream_id] = sizes.get(event.stream_id, 0) + len(event.data)
                here.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                told = {**asked[event.stream_id], "bytes": sizes.get(event.stream_id, 0)}
                print(json.dumps(told), flush=True)
                here.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/json")])
                if told[":path"] != "/large":
                    here.send_data(event.stream_id, json.dumps(told).encode(), end_stream=True)
                    continue
                for _ in range(20000):
                    here.send_data(event.stream_id, b"x" * 16000)
                    sock.sendall(here.data_to_send())
        sock.sendall(here.data_to_send())
while True:
    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()
"""


class Http2Server:
    """A server that speaks HTTP/2 alone. seen: each request's headers."""

    def __init__(self, tls: Path, environment: Path) -> None:
        argv = [str(environment / "bin/python"), "-c", _HTTP2_SERVER, str(tls)]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.seen: list[dict[str, object]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class NameServer:
    """A DNS server: names → addresses; a function answers anew each time. asked: the names that it was asked."""

    def __init__(self, names: dict[str, list[str] | Callable[[], list[str]]]) -> None:
        self.names, self.asked = names, list[str]()
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, sock = self.request
                sock.sendto(outer._answer(data), self.client_address)

        self._server = socketserver.ThreadingUDPServer(("127.0.0.1", 0), Handler)
        self.where = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _answer(self, data: bytes) -> bytes:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        kind = struct.unpack_from("!H", data, at + 1)[0]
        name = ".".join(labels)
        found = self.names.get(name, [])
        if kind == 1:
            self.asked.append(name)
        addresses = (found() if kind == 1 else []) if callable(found) else found
        packed = [ipaddress.ip_address(one).packed for one in addresses]
        packed = [one for one in packed if len(one) == (4 if kind == 1 else 16)]
        status = 0 if name in self.names else 3
        head = data[:2] + struct.pack("!5H", 0x8180 | status, 1, len(packed), 0, 0)
        records = b"".join(b"\xc0\x0c" + struct.pack("!2HIH", kind, 1, 0, len(one)) + one for one in packed)
        return head + data[12 : at + 5] + records

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
