"""TLS for gRPC, with certificates that may be renewed while the server runs, and the rule what may go without."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from jest_server.runtime.settings import ProcessSettings

_log = get_logger()


@dataclass(frozen=True)
class TlsFiles:
    """Where certificate and key are, in PEM, and whose clients' certificates are asked for."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """None: clients need no certificate."""

    def read(self) -> Pems:
        """Reads all files as they are now.

        Raises:
            ValueError: If one cannot be read; the message names it.
        """
        return Pems(_read(self.certificate), _read(self.key), None if self.client_ca is None else _read(self.client_ca))


@dataclass(frozen=True)
class Pems:
    """What the files held at one moment."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """The same for gRPC."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


def tls_files(settings: ProcessSettings) -> TlsFiles | None:
    """The settings' files; None: no TLS.

    Raises:
        ValueError: If only some of what TLS needs is set.
    """
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        lacking = "JEST_TLS_CERTIFICATE" if certificate is None else "JEST_TLS_KEY"
        raise ValueError(f"{lacking} is not set, expected a PEM file: TLS needs both certificate and key")
    return TlsFiles(certificate, key, client_ca)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that take renewed files with the next connection.

    Raises:
        ValueError: If a file cannot be read.
    """
    current = files.read()

    def as_it_is_now() -> grpc.ServerCertificateConfiguration:
        """Asked at every handshake, in a thread of gRPC's."""
        nonlocal current
        try:
            found = files.read()
        except ValueError as error:
            _log.error("TLS files are not usable: the certificate read before stays in use", error=str(error))
            found = current
        if found != current:
            current = found
            _log.info("TLS certificate renewed", certificate=str(files.certificate))
        return current.configuration()

    return grpc.dynamic_ssl_server_credentials(
        current.configuration(), as_it_is_now, require_client_authentication=files.client_ca is not None
    )


def require_safe(settings: ProcessSettings, files: TlsFiles | None) -> None:
    """Refuses to listen to more than this machine without TLS, or without knowing who calls.

    Raises:
        ValueError: The message names the setting and tells what to set.
    """
    if is_loopback(settings.listen) or settings.allow_insecure:
        return
    if files is None:
        raise ValueError(
            f"JEST_LISTEN is {settings.listen}, which other machines can reach, but there is no TLS: set "
            "JEST_TLS_CERTIFICATE and JEST_TLS_KEY, listen on 127.0.0.1, or set JEST_ALLOW_INSECURE=true"
        )
    if settings.tokens_file is None and files.client_ca is None:
        raise ValueError(
            f"JEST_LISTEN is {settings.listen}, which other machines can reach, but anybody could call: set "
            "JEST_TOKENS_FILE or JEST_TLS_CLIENT_CA, listen on 127.0.0.1, or set JEST_ALLOW_INSECURE=true"
        )


def is_loopback(listen: str) -> bool:
    """Whether ``host:port`` can be reached from this machine only."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
