"""Certificates of direct sockets: one for each start of a node, and the TLS contexts that take a single other one.

What does not live here: who has which certificate, and connections (`direct`).
"""

from __future__ import annotations

import datetime
import os
import ssl
from asyncio import StreamWriter
from pathlib import Path

from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def new_certificate(file: Path, owner: str) -> bytes:
    """Write a key and its certificate to a file of mode 0600; returns the certificate, DER. owner: its peer id."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, owner)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(1970, 1, 2))  # UTC; clocks may be wrong by years
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .sign(key, None)
    )
    file.unlink(missing_ok=True)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + made.public_bytes(Encoding.PEM)
    restore(file, pem)
    return made.public_bytes(Encoding.DER)


def restore(file: Path, pem: bytes) -> None:
    """Write a key and its certificate to a file of mode 0600, unless it is there."""
    if file.exists():
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(pem)


def name_of(certificate: bytes) -> str:
    """What a certificate is called; fit for a host's name, as which the caller sends its own."""
    return blake3(certificate).hexdigest(length=16)


def owner_of(certificate: bytes) -> str:
    """The peer id that a certificate, DER, is made out to. Raises ValueError for what is none."""
    try:
        names = x509.load_der_x509_certificate(certificate).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, TypeError, x509.InvalidVersion):
        raise ValueError("this is no certificate") from None
    return str(names[0].value) if names else ""


def name_of_other(writer: StreamWriter) -> str:
    """What the certificate at the other end of a connection is called."""
    tls = writer.get_extra_info("ssl_object")
    return name_of(tls.getpeercert(True) or b"")


def context(protocol: int, key_file: Path, trusted: bytes = b"") -> ssl.SSLContext:
    """TLS 1.3 with the key and certificate in a file, for ssl.PROTOCOL_TLS_SERVER or _CLIENT.

    trusted: the certificate, DER, of the only one who is let in; empty: nobody is. Raises ValueError for what is none.
    """
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False  # names are those of certificates, which are compared
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(key_file)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        made.num_tickets = 0  # nobody resumes
    if trusted:
        try:
            made.load_verify_locations(cadata=trusted)
        except ssl.SSLError:
            raise ValueError("this is no certificate") from None
    return made
