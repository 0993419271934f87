"""A node's line to NATS: messages to and from other nodes, and questions to them.

    cut off --a server takes this node--> connected --the connection ends--> cut off

`Link.run` tries the servers of ROWCAST_NATS_URL one after the other, for as long as it runs. While the link is cut
off, nothing is sent and nothing is kept. Subscriptions stay, and hold again before `connected` is set. Messages are
received in the order in which this connection carried them, across all subjects. NATS may lose any of them, also
while this node is connected all the time: only the numbers in messages, and one's own beat that comes back, show what
has arrived.

All subjects begin with ROWCAST_NATS_PREFIX. Besides those of its users, the link has `q.<node>` for questions to a
node, and `a.<random>.*` for the answers to it: it needs no permission for anything outside the prefix.
"""

import asyncio
import random
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Protocol
from urllib.parse import unquote, urlsplit

from daemon.core.errors import OperatorFault
from daemon.health import REPEAT_DELAY
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.relay.errors import RelayUnavailable
from daemon.relay.questions import Answer, Answerer, Asker

if TYPE_CHECKING:
    from daemon.relay.connection import Connection, Message, Server

DEFAULT_PORT: Final = 4222
MAX_WAITING: Final = 8 * 1024 * 1024  # bytes that wait to be written; while there are more, nothing is sent
MAX_DELAY: Final = 2.0  # seconds between two attempts to reach any of the servers
STABLE: Final = 5.0  # seconds after which a connection that ends is replaced at once
RETRY_REFUSED: Final = 10.0  # seconds until it is tried again what the server has refused

_NAME: Final = re.compile(r"[\w-]+", re.ASCII)
_PREFIX: Final = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_REFUSED: Final = re.compile(r'for (publish|subscription) to "([^"]*)"')

log = get_logger()


class NatsUnavailable(OperatorFault):
    """The NATS library is missing: install Rowcast with the extra nats, or unset ROWCAST_NATS_URL."""

    exit_code: ClassVar[int] = 51


class BadNatsSettings(OperatorFault):
    """The settings for NATS cannot be used: {problem}."""

    exit_code: ClassVar[int] = 78

    def __init__(self, problem: str) -> None:
        self.problem = problem


@dataclass(frozen=True)
class LinkOptions:
    """Where NATS is, and how this node shows who it is.

    A URL may contain a user and a password, or a token. With the scheme `tls`, or with a file of certificates,
    nothing is sent without TLS. `name` is the node's, unique among all nodes. Files are read again for each
    connection.
    """

    urls: tuple[str, ...] = field(repr=False)
    prefix: str
    name: str
    creds_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        """Raises BadNatsSettings."""
        if not self.urls:
            raise BadNatsSettings("ROWCAST_NATS_URL is empty")
        if not _PREFIX.fullmatch(self.prefix):
            raise BadNatsSettings("ROWCAST_NATS_PREFIX may contain letters, digits, _ and -, and dots between them")
        if not _NAME.fullmatch(self.name):
            raise BadNatsSettings("the name of a node may contain letters, digits, _ and -")
        for url in self.urls:
            _parts(url)


def _parts(url: str) -> tuple[str, str, int, str | None, str | None]:
    """Scheme, host, port, user and password of a URL. Raises BadNatsSettings."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme not in {"nats", "tls"} or parts.path.strip("/") or parts.query or parts.fragment:
        raise BadNatsSettings("ROWCAST_NATS_URL must be nats://HOST:PORT or tls://HOST:PORT, or several of them")
    user = None if parts.username is None else unquote(parts.username)
    return parts.scheme, host, port, user, None if parts.password is None else unquote(parts.password)


def _server(options: LinkOptions, url: str) -> "Server":
    from daemon.relay.connection import Server  # noqa: PLC0415 - nats-py is an extra

    scheme, host, port, user, password = _parts(url)
    return Server(
        host=host,
        port=port,
        name=f"rowcast {options.name}",
        user=user,
        password=password,
        secure=scheme == "tls" or options.ca_file is not None or options.cert_file is not None,
        creds_file=options.creds_file,
        ca_file=options.ca_file,
        cert_file=options.cert_file,
        key_file=options.key_file,
    )


class Numbered(Protocol):
    """Who has many subscriptions of one kind, each under a number of its own."""

    def receive(self, data: bytes) -> None:
        """A message has arrived for one of them."""

    def renew(self) -> None:
        """This is another connection: none of the subscriptions holds any more."""


class Link:
    """The line of one node. `connected` is set while it holds. `numbered` has the numbered subscriptions, if any."""

    def __init__(self, options: LinkOptions) -> None:
        self.connected = asyncio.Event()
        self._prefix = options.prefix
        self._options = options
        self._urls = deque(random.sample(options.urls, len(options.urls)))  # the next one to try is first
        self._connection: Connection | None = None
        self._reason = "NATS has not been reached yet"  # why it is cut off
        self._receivers: dict[str, Callable[[Message], None]] = {}  # by full subject
        self._refused: dict[str, str] = {}  # why, by full subject in lower case, as the server says it
        self._logged: dict[str, float] = {}  # when each reason was logged
        inbox = f"{self._prefix}.a.{secrets.token_hex(8)}"
        self._asker = Asker(self, inbox)
        self._answerers: list[Answerer] = []
        self.numbered: Numbered | None = None
        self._receive_on(f"{inbox}.*", self._receive_answer)

    @property
    def failure(self) -> str:
        """Why the link is cut off, or which subjects the server refuses, in one line; empty if all is well."""
        return "; ".join(self._refused.values()) if self.connected.is_set() else self._reason

    @property
    def waiting(self) -> int:
        """Bytes that wait to be written."""
        return self._connection.waiting if self._connection is not None else 0

    async def run(self) -> None:
        """Connect, and connect again, until it is cancelled. Raises NatsUnavailable."""
        attempt = 0
        try:
            while True:
                connection = await self._connect()
                if connection is not None:
                    since = time.monotonic()
                    await self._use(connection)
                    if time.monotonic() - since > STABLE:
                        attempt = 0
                        continue
                await asyncio.sleep(backoff_delay(attempt, maximum=MAX_DELAY))
                attempt += 1
        finally:
            for answerer in self._answerers:
                await answerer.close()

    def publish(self, subject: str, payload: bytes, epoch: str = "") -> bool:
        """Send to `subject` below the prefix, without waiting, and name this epoch, if there is one.

        False if nothing was sent, since the link is cut off or more than MAX_WAITING bytes wait to be written. Raises
        ValueError for a message that is larger than the server takes.
        """
        return self.waiting <= MAX_WAITING and self.send(f"{self._prefix}.{subject}", payload, epoch=epoch)

    def publish_all(self, messages: Iterable[tuple[str, bytes]]) -> bool:
        """Send payloads to subjects below the prefix, in order, and all or none of them. See `publish`."""
        return (
            self._connection is not None
            and self.waiting <= MAX_WAITING
            and self._connection.publish_all((f"{self._prefix}.{subject}", payload) for subject, payload in messages)
        )

    def send(self, subject: str, payload: bytes, reply: str = "", epoch: str = "") -> bool:
        """Send to a full subject, without waiting, however much waits to be written. False if the link is cut off."""
        return self._connection is not None and self._connection.publish(subject, payload, reply, epoch)

    def subscribe(self, subject: str, receive: Callable[[bytes], None]) -> None:
        """Pass each message on `subject` below the prefix to `receive`, from now on and after each reconnect.

        The server may take a moment: a message sent elsewhere right afterwards can be missed.
        """
        self._receive_on(f"{self._prefix}.{subject}", lambda message: receive(message.data))

    def subscribe_with_epoch(self, subject: str, receive: Callable[[bytes, str], None]) -> None:
        """The same, with the epoch that each message names; it is empty if it names none."""
        self._receive_on(f"{self._prefix}.{subject}", lambda message: receive(message.data, message.epoch))

    def subscribe_numbered(self, subjects: Iterable[tuple[int, str]]) -> None:
        """Let `numbered` receive what comes on these subjects below the prefix, on this connection."""
        if self._connection is not None:
            self._connection.subscribe_numbered((number, f"{self._prefix}.{subject}") for number, subject in subjects)

    def unsubscribe_numbered(self, numbers: Iterable[int]) -> None:
        """Receive nothing more under these numbers."""
        if self._connection is not None:
            self._connection.unsubscribe_numbered(numbers)

    def unsubscribe(self, subject: str) -> None:
        """Receive nothing more on `subject`."""
        full = f"{self._prefix}.{subject}"
        self._receivers.pop(full, None)
        if self._connection is not None:
            self._connection.unsubscribe(full)

    async def ask(self, node: str, question: str, payload: bytes, timeout: float) -> bytes:  # noqa: ASYNC109
        """The answer of a node, of at most MAX_ANSWER bytes, within `timeout` seconds.

        Raises RelayUnavailable if it cannot be had, and the AnswerError that the other side answered.
        """
        if not self.connected.is_set():
            raise RelayUnavailable(self.failure)
        return await self._asker.ask(node, f"{self._prefix}.q.{node}", question, payload, timeout)

    def answer(self, node: str, answer: Answer) -> None:
        """Answer the questions to `node`, for as long as `run` runs."""
        answerer = Answerer(self, answer)
        self._answerers.append(answerer)
        self._receive_on(f"{self._prefix}.q.{node}", lambda message: answerer.receive(message.data, message.reply))

    async def reconnect(self) -> None:
        """Give up the connection, which seems to carry nothing any more, and connect again."""
        if self._connection is not None:
            self._connection.abort(f"the connection to {self._connection.address} carried nothing any more")

    def _receive_on(self, subject: str, receive: "Callable[[Message], None]") -> None:
        if subject in self._receivers:
            raise ValueError(f"subscribed already: {subject}")
        self._receivers[subject] = receive
        if self._connection is not None:
            self._connection.subscribe(subject, receive)

    def _receive_numbered(self, data: bytes) -> None:
        if self.numbered is not None:
            self.numbered.receive(data)

    def _renew_numbered(self) -> None:
        if self.numbered is not None:
            self.numbered.renew()

    def _receive_answer(self, message: "Message") -> None:
        self._asker.receive(message.subject, message.data, unanswerable=message.unanswerable)

    async def _connect(self) -> "Connection | None":
        """A connection to the first server that takes this node; None if none does."""
        try:
            from daemon.relay.connection import Connection, ConnectionFailed  # noqa: PLC0415 - nats-py is an extra
        except ImportError:
            raise NatsUnavailable from None
        failures = []
        for _ in self._options.urls:
            connection = Connection(
                _server(self._options, self._urls[0]), self._on_refused, self._receive_numbered
            )  # fmt: skip
            self._urls.rotate(-1)
            try:
                await connection.open()
            except ConnectionFailed as failure:
                failures.append(str(failure))
            else:
                return connection
        self._fail("; ".join(sorted(failures)))
        return None

    async def _use(self, connection: "Connection") -> None:
        """Use a connection until it ends."""
        from daemon.relay.connection import ConnectionFailed  # noqa: PLC0415

        reason = "this node is stopping"
        self._connection = connection
        self._refused.clear()
        try:
            for subject, receive in self._receivers.items():
                connection.subscribe(subject, receive)
            await connection.confirm()
            self._renew_numbered()
            self.connected.set()
            log.info("relay_connected", server=connection.address)
            self._logged.clear()
            while (ended := await connection.ended(RETRY_REFUSED)) is None:
                self._retry_refused(connection)
            reason = ended
            self._fail(reason)
        except ConnectionFailed as failure:
            reason = str(failure)
            self._fail(reason)
        finally:
            self.connected.clear()
            self._connection = None
            self._asker.fail(reason)
            await connection.close()

    def _fail(self, reason: str) -> None:
        self._reason = reason
        if self._is_news(reason):
            log.warning("relay_lost", reason=reason)

    def _is_news(self, reason: str) -> bool:
        """Whether to log this: the first time in this state, and now and then. Reasons may alternate."""
        now = time.monotonic()
        if now - self._logged.get(reason, -REPEAT_DELAY) < REPEAT_DELAY:
            return False
        self._logged[reason] = now
        return True

    def _on_refused(self, text: str) -> None:
        """The server has refused a subject, as it says in `text`. The connection stays."""
        found = _REFUSED.search(text)
        what, subject = found.groups() if found else ("use", text)
        subject = self._in_rights(subject)
        verb = "subscribe" if what == "subscription" else "publish"
        reason = f'NATS does not permit this node to {verb} to "{subject}"'
        self._refused[subject] = reason
        if self._is_news(reason):
            log.warning("relay_refused", reason=reason)

    def _in_rights(self, subject: str) -> str:
        """The subject for which a right is to be given: that of answers, or of contents, is one of many."""
        for many in (f"{self._prefix.lower()}.a.", f"{self._prefix.lower()}.t."):
            if subject.startswith(many):
                return f"{many}>"
        return subject

    def _retry_refused(self, connection: "Connection") -> None:
        """Subscribe again where it was refused. What may not be published shows at the next attempt."""
        refused, self._refused = self._refused, {}
        for subject, receive in self._receivers.items():
            if self._in_rights(subject.lower()) in refused:
                connection.unsubscribe(subject)
                connection.subscribe(subject, receive)
        if f"{self._prefix.lower()}.t.>" in refused:
            self._renew_numbered()
