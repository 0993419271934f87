"""TLS for clients: certificates that can be replaced while connections are open, and sockets that never block."""

import asyncio
import socket
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from cryptography import x509

from daemon import metrics
from daemon.core.errors import OperatorFault
from daemon.gateway.http import text_page
from daemon.gateway.state import refuse

RECORD_SIZE: Final = 16 * 1024  # bytes, the most that TLS encrypts at once
EXPIRY_WARNING: Final = 7 * 86_400.0  # seconds before the end of a certificate

_PLAIN_HTTP: Final = text_page("This port speaks TLS: use https, or wss.", 400)


class TlsFilesUnusable(OperatorFault):
    """TLS cannot use {certificate} with {key} ({reason}): correct ROWCAST_TLS_CERTIFICATE and ROWCAST_TLS_KEY, or \
the files."""

    exit_code: ClassVar[int] = 78

    def __init__(self, certificate: Path, key: Path, reason: str) -> None:
        self.certificate, self.key, self.reason = certificate, key, reason


class _EncryptedKey(Exception):
    pass


class TlsSocket(ssl.SSLSocket):
    """The socket of a client that speaks TLS, which fails like a plain one that does not block.

    Reading does the handshake.
    """

    _is_ready = False  # the handshake is done

    def recv(self, buflen: int = RECORD_SIZE, flags: int = 0) -> bytes:
        """Read at most `buflen` bytes. Raises BlockingIOError if there is nothing yet, else OSError."""
        try:
            return super().recv(buflen, flags)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except ssl.SSLError as error:  # also if a peer that does not read wants an answer: nobody honest does
            if not self._is_ready:
                if error.reason == "HTTP_REQUEST":
                    socket.socket.send(self, _PLAIN_HTTP.serialize())
                refuse("tls", answer=error.reason)
            raise

    def send(self, data: Any, flags: int = 0) -> int:  # noqa: ANN401 - any buffer
        """Write, and return how many bytes that were. Raises BlockingIOError if there is no room, else OSError."""
        if not self._is_ready:
            if self.version() is None:
                raise ConnectionError  # nothing can be said before the handshake
            self._is_ready = True
        view, sent = memoryview(data), 0
        try:
            while sent < len(view):
                sent += super().send(view[sent : sent + RECORD_SIZE], flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not sent:
                raise BlockingIOError from None
        return sent

    def sendmsg(self, buffers: Iterable[Any]) -> int:  # type: ignore[override] # ssl.SSLSocket has none
        """Write the first record's worth of the buffers.

        A write that did not succeed must be repeated with the same bytes, and may be with more: so they are always
        taken from the beginning of the queue.
        """
        chosen: list[memoryview] = []
        size = 0
        for buffer in buffers:
            chosen.append(memoryview(buffer))
            size += len(chosen[-1])
            if size >= RECORD_SIZE:
                break
        return self.send(chosen[0] if len(chosen) == 1 else b"".join(chosen)[:RECORD_SIZE])

    def shutdown(self, how: int) -> None:
        """Tell the peer that nothing follows, without waiting for its answer."""
        with suppress(OSError, ValueError):
            self.unwrap()
        socket.socket.shutdown(self, how)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of a certificate, followed by those of its issuers, and of its key."""

    certificate: Path
    key: Path

    def read(self) -> tuple[ssl.SSLContext, float]:
        """What new connections use, and until when the certificate is valid. Raises TlsFilesUnusable."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        context.sslsocket_class = TlsSocket
        try:
            end = x509.load_pem_x509_certificate(self.certificate.read_bytes()).not_valid_after_utc.timestamp()
            self.key.read_bytes()  # so that the reason names what cannot be read
            context.load_cert_chain(self.certificate, self.key, _no_password)
        except _EncryptedKey:
            raise TlsFilesUnusable(self.certificate, self.key, "the key is encrypted") from None
        except ssl.SSLError as error:
            reason = "the key is of another certificate" if error.reason in _MISMATCH else "the key is not usable"
            raise TlsFilesUnusable(self.certificate, self.key, reason) from None
        except ValueError:
            raise TlsFilesUnusable(self.certificate, self.key, "the first is not a certificate in PEM") from None
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise TlsFilesUnusable(self.certificate, self.key, reason) from None
        return context, end


_MISMATCH: Final = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


def _no_password() -> str:
    raise _EncryptedKey


class Tls:
    """The certificate that new connections get. Those that are open keep theirs."""

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None
        self._end = float("inf")

    async def load(self, files: TlsFiles) -> int:
        """Use these files from now on, and return 1. Raises TlsFilesUnusable; then nothing changes."""
        self._context, self._end = await asyncio.to_thread(files.read)
        metrics.CERTIFICATE_END.set(self._end)
        return 1

    def warnings(self) -> list[str]:
        """That the certificate has ended, or soon will."""
        left = self._end - time.time()
        if left > EXPIRY_WARNING:
            return []
        return [
            f"the TLS certificate ends in {left / 86_400:.1f} days" if left > 0 else "the TLS certificate has ended"
        ]

    def wrap(self, connection: socket.socket) -> socket.socket:
        """Let this connection speak TLS, if there is a certificate. Raises OSError if the peer has disconnected."""
        if self._context is None:
            return connection
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
