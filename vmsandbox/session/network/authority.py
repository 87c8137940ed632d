"""The certificate authority of one session: made on the host, good for a week, known to one guest.

The broker shows the guest certificates of its own where it has to look inside. With an authority that two sessions
shared, or that a host trusted, one guest's broker could speak for every server.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

DAYS = 7


@dataclass(frozen=True)
class Authority:
    """PEM of the certificate (the guest gets it) and of its private key (nobody but the broker has it)."""

    certificate: str
    key: str


def make_authority(session_id: str) -> Authority:
    """A fresh EC P-256 authority that can sign servers' certificates and no further authorities."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    # X.520 allows 64 characters in a common name.
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"vmsandbox {session_id}"[:64])])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A guest whose clock lags must not take it for one of the future.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(subject, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Authority(certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode())
