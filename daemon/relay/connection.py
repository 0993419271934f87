"""One connection to one NATS server, with nats-py. This module alone imports it, and `Link` imports this module.

A `Connection` is used once. nats-py's own reconnecting stays off: it first closes the old socket in an orderly way,
and that waits for a server that no longer reads. So a lost connection is aborted, and `Link` opens another one.

What nats-py 2.16 does, and what this module does about it:

- A callback has a task and a queue for each subject, so that order across subjects is lost; a subscription takes 4 KB
  and 18 us, and of those to contents there may be a hundred thousand. So this module writes the lines of the protocol
  for subscriptions, and `_Client._process_msg` takes all that arrives, while the connection is read.
- An exception there ends the reading, and the connection seems to be fine. `_Client` catches all of them. If one of
  the tasks of a connection ends for whatever reason, the connection has ended.
- What is published waits for a task of its own. This module writes it to the socket at once: gateways wait for it.
- If `flush` gives up, the late answer of the server ends the reading. It is called once, and a connection that is not
  confirmed is aborted.
- With `pending_size=0`, nothing is kept while it is cut off, but what was written may wait in the socket without
  bound. `waiting` counts it.
- It sends passwords in the clear to a server that offers no TLS. `_Transport` does not.
- It closes TLS in an orderly way, which may wait too, and then TLS no longer aborts. `_Transport` aborts below it.
- Its `connect` may swallow a cancellation. `open` does not.
- It reads a file with credentials forever if a line is missing. `_credentials` reads it first.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import ParseResult

from nats import errors as nats_errors
from nats.aio.client import Client, RawCredentials
from nats.aio.transport import TcpTransport

from daemon.core.errors import RowcastError
from daemon.logs import get_logger
from daemon.postgres.errors import raise_if_cancelled

CONNECT_TIMEOUT: Final = 2  # seconds for each step
OPEN_TIMEOUT: Final = 5.0  # seconds for all of them
PING_INTERVAL: Final = 2  # seconds
MAX_PINGS: Final = 2  # without an answer; then the connection is given up
FIRST_NUMBERED: Final = 2**64  # other subscriptions are counted from 1
MIN_PAYLOAD: Final = 512 * 1024  # bytes that a server must take in one message

_WORD: Final = re.compile(r"[!-~]+")
_HEADERS: Final = b"NATS/1.0\r\nRowcast-Epoch: %b\r\n\r\n"
_EPOCH: Final = re.compile(rb"\r\nRowcast-Epoch: ([!-~]+)\r\n")
_Receive = Callable[[int, bytes, bytes, bytes, bytes | None], None]

log = get_logger()


class ConnectionFailed(RowcastError):
    """{reason}"""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Message(NamedTuple):
    """A message as it arrived, and the epoch that it names, if any.

    `unanswerable`: the server says that nobody listens to what was asked.
    """

    subject: str
    reply: str
    data: bytes
    unanswerable: bool
    epoch: str


@dataclass(frozen=True)
class Server:
    """Where a server is, and how this node shows who it is. Without a password, `user` is a token."""

    host: str
    port: int
    name: str
    user: str | None
    password: str | None
    secure: bool
    creds_file: Path | None
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None

    @property
    def address(self) -> str:
        """Host and port, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class _Transport(TcpTransport):
    """A socket that sends nothing in the clear if `secure`, and that can be aborted."""

    def __init__(self, *, secure: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._only_tls = secure
        self._socket: asyncio.WriteTransport | None = None  # below TLS, whose own transport may refuse to abort

    def __bool__(self) -> bool:
        return True  # otherwise the client makes one of its own

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        await super().connect(uri, buffer_size, connect_timeout)
        assert self._io_writer is not None
        self._socket = self._io_writer.transport

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Otherwise than nats-py, which lets asyncio warn whenever the server closes."""
        assert self._io_writer is not None
        host = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            await self._io_writer.start_tls(ssl_context, server_hostname=host)
        self._only_tls = False

    def write(self, payload: bytes) -> None:
        self._check()
        super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: list[bytes]) -> None:
        self._check()
        super().writelines(payload)  # type: ignore[no-untyped-call]

    def _check(self) -> None:
        if self._only_tls:
            raise nats_errors.SecureConnWantedError
        if self.is_closed:
            raise ConnectionResetError

    @property
    def is_closed(self) -> bool:
        return self._io_writer is None or self._io_writer.transport.is_closing()

    @property
    def waiting(self) -> int:
        if self._io_writer is None or self.is_closed:  # TLS that is closed cannot be asked
            return 0
        return self._io_writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        if self._socket is not None:
            self._socket.abort()


class _Client(Client):
    """nats-py's client, with our transport and its tasks, and one receiver for everything."""

    def __init__(self, receive: _Receive, *, secure: bool) -> None:
        super().__init__()
        self._receive = receive
        self._transport = self.transport = _Transport(secure=secure)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        try:
            self._receive(sid, subject, reply, data, headers)
        except Exception:  # it would end the reading
            log.exception("internal_error", subject=subject.decode())

    @property
    def tasks(self) -> list["asyncio.Task[Any]"]:
        return [
            task for task in (self._reading_task, self._flusher_task, self._ping_interval_task) if task is not None
        ]


class Connection:
    """A connection that is open until `ended` returns. `on_refused` gets each refusal of a subject, as the server
    words it, and `receive_numbered` what arrives for any of the numbered subscriptions.
    """

    def __init__(
        self, server: Server, on_refused: Callable[[str], None], receive_numbered: Callable[[bytes], None]
    ) -> None:
        self.address = server.address
        self._server = server
        self._on_refused = on_refused
        self._receive_numbered = receive_numbered
        self._client = _Client(self._receive, secure=server.secure)
        self._numbers = count(1)
        self._subscriptions: dict[str, int] = {}
        self._receivers: dict[int, Callable[[Message], None]] = {}
        self._opened = False
        self._reason = ""

    async def open(self) -> None:
        """Connect. Raises ConnectionFailed; nothing is left behind then."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._client.connect(**await self._options())
            raise_if_cancelled()
            self._check()
        except Exception as error:  # noqa: BLE001 - also what nats-py lets through, such as errors of a codec
            await self.close()
            raise_if_cancelled()
            raise ConnectionFailed(self._explain(error)) from None
        except BaseException:
            await self.close()
            raise
        self._opened = True

    async def _options(self) -> dict[str, Any]:
        server = self._server
        is_token = server.user is not None and server.password is None
        options: dict[str, Any] = {
            "servers": [f"nats://{server.address}"],
            "name": server.name,
            "user": None if is_token else server.user,
            "password": server.password,
            "token": server.user if is_token else None,
            "user_credentials": _credentials(server.creds_file) if server.creds_file else None,
            "allow_reconnect": False,
            "connect_timeout": CONNECT_TIMEOUT,
            "ping_interval": PING_INTERVAL,
            "max_outstanding_pings": MAX_PINGS,
            "pending_size": 0,
            "flusher_queue_size": 0,  # no bound, so that nothing waits for it
            "error_cb": self._on_error,
        }
        if server.secure:
            options["tls"] = await asyncio.to_thread(_tls, server)
        return options

    async def _on_error(self, error: Exception) -> None:
        if not self._opened:
            raise error  # ends the attempt
        if (text := str(error)).startswith("nats: permissions violation"):
            self._on_refused(text.removeprefix("nats: "))

    def _check(self) -> None:
        if not self._client.is_connected:
            raise nats_errors.ProtocolError
        if self._client.max_payload < MIN_PAYLOAD:
            raise ConnectionFailed(
                f"{self.address} takes at most {self._client.max_payload} bytes in a message: set its max_payload to"
                f" {MIN_PAYLOAD} or more"
            )

    async def confirm(self) -> None:
        """Wait until the server has seen all that was sent so far. Raises ConnectionFailed."""
        flushing = asyncio.create_task(self._client.flush(CONNECT_TIMEOUT))
        try:
            await asyncio.wait([flushing, *self._client.tasks], return_when=asyncio.FIRST_COMPLETED)
            if not flushing.done():
                raise ConnectionFailed(self._explain(self._client.last_error))
            await flushing
        except (nats_errors.Error, OSError) as error:
            raise ConnectionFailed(self._explain(error)) from None
        finally:
            flushing.cancel()

    @property
    def waiting(self) -> int:
        """Bytes that wait to be written; 0 if the connection is lost."""
        if self._client.transport.is_closed:
            return 0
        return self._client.pending_data_size + self._client.transport.waiting

    def publish(self, subject: str, payload: bytes, reply: str = "", epoch: str = "") -> bool:
        """Send at once. False if the connection is lost. Raises ValueError if the message cannot be sent at all.

        The message names `epoch`, if there is one, in a header: nodes that do not know it have the same payload.
        """
        return self._write(self._message(subject, payload, reply, epoch))

    def publish_all(self, messages: Iterable[tuple[str, bytes]]) -> bool:
        """Send payloads to subjects, in order and at once. See `publish`."""
        return self._write(b"".join(self._message(subject, payload) for subject, payload in messages))

    def _message(self, subject: str, payload: bytes, reply: str = "", epoch: str = "") -> bytes:
        headers = _HEADERS % epoch.encode() if epoch and _WORD.fullmatch(epoch) else b""
        size = len(headers) + len(payload)
        if size > self._client.max_payload or not _WORD.fullmatch(subject):
            raise ValueError(f"it cannot be sent: {subject!r}, {len(payload)} bytes")
        if headers:
            sizes = b"%d %d" % (len(headers), size)
            return b"HPUB %b %b %b\r\n%b%b\r\n" % (subject.encode(), reply.encode(), sizes, headers, payload)
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(payload), payload)

    def subscribe(self, subject: str, receive: Callable[[Message], None]) -> None:
        """Subscribe, at once. What arrives is received in the order of the connection, across all subjects."""
        number = self._subscriptions[subject] = next(self._numbers)
        self._receivers[number] = receive
        self._write(f"SUB {subject} {number}\r\n".encode())

    def unsubscribe(self, subject: str) -> None:
        """Receive nothing more, from now on."""
        if (number := self._subscriptions.pop(subject, None)) is not None:
            del self._receivers[number]
            self._write(f"UNSUB {number}\r\n".encode())

    def subscribe_numbered(self, subjects: Iterable[tuple[int, str]]) -> None:
        """Subscribe to each subject under a number of up to 64 bits, at once. A number is used for one subject."""
        self._write("".join(f"SUB {subject} {FIRST_NUMBERED + number}\r\n" for number, subject in subjects).encode())

    def unsubscribe_numbered(self, numbers: Iterable[int]) -> None:
        """Receive nothing more under these numbers. What is on its way still arrives."""
        self._write("".join(f"UNSUB {FIRST_NUMBERED + number}\r\n" for number in numbers).encode())

    def _receive(self, number: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if number >= FIRST_NUMBERED:
            self._receive_numbered(data)
        elif (receive := self._receivers.get(number)) is not None:
            epoch = _EPOCH.search(headers) if headers else None
            unanswerable = headers is not None and not data
            receive(Message(subject.decode(), reply.decode(), data, unanswerable, epoch[1].decode() if epoch else ""))

    def _write(self, lines: bytes) -> bool:
        """Write to the socket, behind what nats-py has written there. False if the connection is lost."""
        if self._client.transport.is_closed:
            return False
        try:
            self._client.transport.write(lines)
        except (nats_errors.Error, OSError):
            return False
        return True

    async def ended(self, timeout: float) -> str | None:  # noqa: ASYNC109 - returns None, and does not raise
        """Wait until the connection has ended, for at most `timeout` seconds: why, or None."""
        done, _ = await asyncio.wait(self._client.tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return None
        return self._reason or self._explain(self._client.last_error)

    def abort(self, reason: str) -> None:
        """End it at once; what waits to be written is dropped."""
        self._reason = reason
        self._client.transport.abort()
        for task in self._client.tasks:
            task.cancel()

    async def close(self) -> None:
        """Abort, and wait until nothing is left."""
        self.abort(self._reason)
        if tasks := self._client.tasks:
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # it was seen
        await asyncio.sleep(0)  # the socket is closed; `wait_closed` never returns after a TLS handshake that failed

    def _explain(self, error: Exception | None) -> str:
        """Why it failed, in one line without a secret."""
        address = self.address
        match error:
            case ConnectionFailed():
                return str(error)
            case None:
                return f"the connection to {address} ended"
            case nats_errors.SecureConnWantedError():
                return f"{address} offers no TLS, which the URL or the certificates in the settings demand"
            case nats_errors.AuthorizationError():
                return f"{address} refuses the credentials"
            case nats_errors.UnexpectedEOF():
                return f"{address} closed the connection"
            case nats_errors.StaleConnectionError() | nats_errors.TimeoutError() | TimeoutError():
                return f"{address} does not answer"
            case ConnectionResetError() | BrokenPipeError():
                return f"{address} closed the connection"
            case ConnectionRefusedError():
                return f"nothing listens at {address}"
            case socket.gaierror():
                return f"the host {self._server.host} is unknown"
            case ssl.SSLCertVerificationError():
                return f"the certificate of {address} is not valid: {error.verify_message}"
            case ssl.SSLError():
                return f"TLS with {address} failed: {error.reason or type(error).__name__}"
            case OSError():
                return f"the connection to {address} failed: {error.strerror or type(error).__name__}"
        return self._explain_protocol(error)

    def _explain_protocol(self, error: Exception) -> str:
        text = str(error).partition("\n")[0].removeprefix("nats: ").strip("'").lower()
        if "authorization" in text or "authentication" in text:
            return f"{self.address} refuses the credentials ({text})"
        if "info message" in text or isinstance(error, nats_errors.ProtocolError | ValueError):
            return f"what listens at {self.address} is no NATS server"
        if isinstance(error, nats_errors.Error):
            return f"{self.address} reports: {text}"
        if self._server.creds_file and type(error).__module__.startswith(("nkeys", "nacl", "binascii")):
            return f"the credentials in {self._server.creds_file} are not valid"
        return f"the connection to {self.address} failed: {type(error).__name__}"


def _credentials(path: Path) -> RawCredentials:
    """The content of a file with credentials. Raises ConnectionFailed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConnectionFailed(f"cannot read the credentials in {path}: {_words(error)}") from None
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise ConnectionFailed(f"{path} is not a file with the credentials of a NATS user")
    return RawCredentials(text)


def _tls(server: Server) -> ssl.SSLContext:
    """How the server is verified, and the certificate of this node. Raises ConnectionFailed."""
    path = server.ca_file
    try:
        context = ssl.create_default_context(cafile=path)
        for path in filter(None, (server.cert_file, server.key_file)):
            path.read_bytes()  # what is said about both does not name the one that cannot be read
    except (OSError, ValueError) as error:
        raise ConnectionFailed(f"cannot use the certificates in {path}: {_words(error)}") from None
    if server.cert_file is not None:
        key = server.key_file or server.cert_file
        hint = "" if server.key_file else ". Set ROWCAST_NATS_KEY_FILE, if the key is in a file of its own"
        try:
            context.load_cert_chain(server.cert_file, key, password="")  # never ask the terminal
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or "they are not in PEM format, or the key has a password"
            raise ConnectionFailed(
                f"cannot use the certificate in {server.cert_file} with the key in {key}: {reason}{hint}"
            ) from None
    return context


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "they are not in PEM format"
    return getattr(error, "strerror", None) or type(error).__name__
