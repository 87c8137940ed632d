"""Leaf certificates of the session's own authority, and the TLS settings for both sides.

Everything is in memory: the authority's key comes with the configuration and is never on a disk. Servers are checked
against the host's bundle of authorities, which is read before the process gives its rights up.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections import OrderedDict
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL, crypto

from vmsandbox.egress.hosts import is_address

_KEPT = 256  # leaf certificates
_DAYS = 7
ALPN = (b"h2", b"http/1.1")
# Certificates are matched on the subject's alternative names alone, wildcards only as a whole first label.
_HOST_FLAGS = SSL._lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | getattr(
    SSL._lib, "X509_CHECK_FLAG_NEVER_CHECK_SUBJECT", 0
)


class Certificates:
    """Makes TLS connections for both sides.

    Args:
        ca_certificate, ca_key: PEM of the session's authority.
        bundle: PEM file of the authorities that servers are checked against.

    Raises:
        OSError, ValueError, SSL.Error: a file or the authority is none.
    """

    def __init__(self, ca_certificate: str, ca_key: str, bundle: Path) -> None:
        self._ca = x509.load_pem_x509_certificate(ca_certificate.encode("ascii"))
        key = serialization.load_pem_private_key(ca_key.encode("ascii"), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._ca_key = key
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = crypto.PKey.from_cryptography_key(self._key)
        self._leaves: OrderedDict[str, Any] = OrderedDict()
        self._to_guest = _context(SSL.TLS_SERVER_METHOD)
        self._to_guest.set_alpn_select_callback(_select_alpn)
        # No resumption: each connection's name is checked against its own certificate.
        self._to_guest.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        self._to_guest.set_options(SSL.OP_NO_TICKET)
        self._to_server = _context(SSL.TLS_CLIENT_METHOD)
        self._to_server.set_verify(SSL.VERIFY_PEER, None)
        self._to_server.load_verify_locations(str(bundle), None)

    def for_guest(self, name: str, alpn: bytes | None) -> Any:
        """The server's side of a guest's TLS to `name`.

        alpn: what the server has chosen (b"": none); None: no server was asked, the guest's first choice is taken.
        """
        connection = SSL.Connection(self._to_guest)
        connection.use_certificate(self._leaf(name))
        connection.use_privatekey(self._leaf_key)
        connection.set_app_data(alpn)
        connection.set_accept_state()
        return connection

    def for_server(self, name: str, alpn: list[bytes]) -> Any:
        """The client's side of TLS to a server whose certificate has to be for `name`."""
        connection = SSL.Connection(self._to_server)
        param = SSL._lib.SSL_get0_param(connection._ssl)
        SSL._lib.X509_VERIFY_PARAM_set_hostflags(param, _HOST_FLAGS)
        if is_address(name):  # no SNI: RFC 6066 3 has only names
            packed = ipaddress.ip_address(name).packed
            SSL._openssl_assert(SSL._lib.X509_VERIFY_PARAM_set1_ip(param, packed, len(packed)) == 1)
        else:
            encoded = name.encode("ascii")
            connection.set_tlsext_host_name(encoded)
            SSL._openssl_assert(SSL._lib.X509_VERIFY_PARAM_set1_host(param, encoded, len(encoded)) == 1)
        if alpn:
            connection.set_alpn_protos(alpn)
        connection.set_connect_state()
        return connection

    def _leaf(self, name: str) -> Any:
        if name in self._leaves:
            self._leaves.move_to_end(name)
            return self._leaves[name]
        leaf = self._leaves[name] = crypto.X509.from_cryptography(self._sign(name))
        if len(self._leaves) > _KEPT:
            self._leaves.popitem(last=False)
        return leaf

    def _sign(self, name: str) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        end = min(now + datetime.timedelta(days=_DAYS), self._ca.not_valid_after_utc)
        alternative = x509.IPAddress(ipaddress.ip_address(name)) if is_address(name) else x509.DNSName(name)
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if len(name) <= 64 else []
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digital signature
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self._ca.subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=24))  # a guest's clock may be behind
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(usage, True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(x509.SubjectAlternativeName([alternative]), not subject)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca_key.public_key()), False)
            .sign(self._ca_key, hashes.SHA256())
        )


def _context(method: int) -> Any:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    return context


def _select_alpn(connection: Any, offered: list[bytes]) -> Any:
    """What the server chose, or where none was asked the first of the guest's offers that is HTTP."""
    chosen = connection.get_app_data()
    if chosen is None:
        return next((one for one in offered if one in ALPN), SSL.NO_OVERLAPPING_PROTOCOLS)
    return chosen if chosen in offered else SSL.NO_OVERLAPPING_PROTOCOLS
