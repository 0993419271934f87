"""The connection: a websocket and a timer for the engine."""

import asyncio
import inspect
import json
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from rowcast_client.engine import Change, Engine, Frame, People, Row, RowcastError, Snapshot, TopicRows, identity

BUFFER: Final = 10_000  # changes that may wait in a loop before the client disconnects
CLOSE_TIMEOUT: Final = 2.0  # seconds

Token = str | Callable[..., str | Awaitable[str | None] | None]
"""The token, or a function that fetches one.

It is called with `fresh=True` if a new one is needed: the server refused the last, or it expires soon.
"""

_log = logging.getLogger("rowcast_client")


class Callbacks:
    """Functions to call back. Their errors are logged, and do not keep others from being called."""

    def __init__(self) -> None:
        self._functions: list[Callable[..., object]] = []

    def add(self, function: Callable[..., object]) -> Callable[[], None]:
        """Add a function; returns one that removes it."""
        self._functions.append(function)
        return lambda: self._functions.remove(function) if function in self._functions else None

    def __call__(self, *values: object) -> None:
        """Call all of them."""
        for function in list(self._functions):
            try:
                function(*values)
            except Exception:  # noqa: BLE001
                _log.exception("A callback failed.")


class _Quiet:
    """A sink that is not present, and does not want signals."""

    shown: dict[str, Any] | None = None

    def receive_signal(self, frame: Frame) -> None:
        """For the engine."""

    def receive_people(self, people: People) -> None:
        """For the engine."""


class Collection(_Quiet):
    """The rows of one table in one topic.

    `ready`: all changes, and the snapshot if you asked for one, have been received. `error`: why the collection is
    not followed any more. Do not change the rows.
    """

    keeps_rows = True

    def __init__(self, table: str, order: Callable[[Row], Any] | None, close: Callable[["Collection"], None]) -> None:
        self.ready = False
        self.error: RowcastError | None = None
        self.source: TopicRows | None = None
        self._table = table
        self._order = order
        self._close = close
        self._rows: tuple[Row, ...] | None = None
        self._callbacks = Callbacks()
        self._changed = asyncio.Event()

    @property
    def rows(self) -> tuple[Row, ...]:
        """In order, by default of the key; the same tuple until a row changes."""
        if self._rows is None:
            stored = self.source.of(self._table).values() if self.source else ()
            found = [row for _, row in sorted(stored, key=lambda pair: pair[0])]
            self._rows = tuple(sorted(found, key=self._order) if self._order else found)
        return self._rows

    def get(self, key: Mapping[str, Any]) -> Row | None:
        """The row with this key."""
        stored = self.source.of(self._table).get(identity(key)) if self.source else None
        return stored[1] if stored else None

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call back after each change of rows, `ready` or `error`; returns a function that ends it."""
        return self._callbacks.add(callback)

    async def until(self, condition: Callable[["Collection"], bool]) -> tuple[Row, ...]:
        """Wait until the condition holds; returns the rows. Raises what ended the collection."""
        while not condition(self):
            if self.error:
                raise self.error
            self._changed.clear()
            await self._changed.wait()
        return self.rows

    def close(self) -> None:
        """Follow it no longer."""
        self._close(self)

    def receive(self, changes: list[Change]) -> None:
        """For the engine."""
        if any(change.get("table", self._table) == self._table for change in changes):
            self._update()

    def set_ready(self, ready: bool, /) -> None:
        """For the engine."""
        if self.ready != ready:
            self.ready = ready
            self._update()

    def end(self, error: RowcastError | None) -> None:
        """For the engine."""
        self.ready, self.error = False, error
        self._update()

    def _update(self) -> None:
        self._rows = None
        self._changed.set()
        self._callbacks()


class _Conversation(Protocol):
    """What a channel asks for."""

    def send_signal(self, topic: str, name: str, data: object) -> bool: ...

    def present(self, topic: str, channel: "Channel") -> None: ...

    def unfollow(self, topic: str, channel: "Channel") -> None: ...


class Channel:
    """What clients that follow a topic say to one another: signals, and who is present.

    `presence`: by user, a list of `{"device": …, "data": …, "since": …}`, one for each device; empty unless you are
    present. `error`: why the topic is not followed any more.
    """

    keeps_rows = False

    def __init__(self, rowcast: _Conversation, topic: str, shown: dict[str, Any] | None) -> None:
        self.presence: People = {}
        self.error: RowcastError | None = None
        self.source: TopicRows | None = None
        self.shown = shown
        self._rowcast = rowcast
        self._topic = topic
        self._listeners: dict[str, Callbacks] = defaultdict(Callbacks)

    def signal(self, name: str, data: object = None) -> bool:
        """Send a signal to the other clients that follow the topic: at most once, and stored nowhere.

        False if there is no connection at the moment.
        """
        return self._rowcast.send_signal(self._topic, name, data)

    def show(self, data: dict[str, Any] | None) -> None:
        """Be present, and let others see this, a JSON object of up to 1 KiB; None: be present no longer."""
        self.shown = data
        self._rowcast.present(self._topic, self)

    def on(self, name: str, callback: Callable[[Any], object]) -> Callable[[], None]:
        """Call back at every `signal` with `{"name": …, "data": …, "user": …}`, or `presence` with who is.

        Returns a function that ends it.
        """
        return self._listeners[name].add(callback)

    def close(self) -> None:
        """Follow it no longer."""
        self._rowcast.unfollow(self._topic, self)

    def receive(self, changes: list[Change]) -> None:
        """For the engine."""

    def receive_signal(self, frame: Frame) -> None:
        """For the engine."""
        self._listeners["signal"]({name: frame[name] for name in ("name", "data", "user")})

    def receive_people(self, people: People) -> None:
        """For the engine."""
        self.presence = people
        self._listeners["presence"](people)

    def set_ready(self, ready: bool, /) -> None:
        """For the engine."""

    def end(self, error: RowcastError | None) -> None:
        """For the engine."""
        self.error = error
        self.receive_people({})


class ChangeStream(_Quiet):
    """The changes of a topic that wait for a loop."""

    keeps_rows = False

    def __init__(self, limit: int, on_full: Callable[["ChangeStream"], None]) -> None:
        self.source: TopicRows | None = None
        self.waiting: deque[Change] = deque()
        self.ended = False
        self.error: RowcastError | None = None
        self.arrived = asyncio.Event()
        self._limit = limit
        self._on_full = on_full

    def receive(self, changes: list[Change]) -> None:
        """For the engine."""
        self.waiting.extend(changes)
        self.arrived.set()
        if len(self.waiting) > self._limit:
            self._on_full(self)

    def set_ready(self, ready: bool, /) -> None:
        """For the engine."""

    def end(self, error: RowcastError | None) -> None:
        """For the engine."""
        self.ended, self.error = True, error
        self.arrived.set()


class Rowcast:
    """One user's connection to Rowcast: `async with Rowcast(url, token=…) as rowcast`.

    It connects at once, and again whenever the connection breaks. With `numbers="string"`, values of bigint and
    numeric columns are strings with all their digits. `device` names this client among those of its user: choose one
    that stays if it is to begin where it has acknowledged, which it does if `stored`.
    """

    def __init__(
        self, url: str, *, token: Token, numbers: str | None = None, device: str | None = None, stored: bool = False
    ) -> None:
        self._url = url
        self._token = token
        self._engine = Engine(self, numbers=numbers, device=device or secrets.token_hex(8), stored=stored)
        self._listeners: dict[str, Callbacks] = defaultdict(Callbacks)
        self._full: set[ChangeStream] = set()
        self._current: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox: asyncio.Queue[Frame] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def status(self) -> str:
        """`idle`, `connecting`, `resuming`, `live`, `waiting`, `paused`, `stopped` or `closed`: see the README."""
        return self._engine.status

    @property
    def stale(self) -> bool:
        """Whether the server cannot tell what has changed at the moment."""
        return self._engine.stale

    def on(self, name: str, callback: Callable[[Any], object]) -> Callable[[], None]:
        """Call back at every `reset`, `revoked`, `stale`, `status`, `error` or `welcome`.

        Returns a function that ends it.
        """
        return self._listeners[name].add(callback)

    def collection(
        self,
        topic: str,
        *,
        table: str,
        snapshot: Snapshot | None = None,
        order: Callable[[Row], Any] | None = None,
        where: Mapping[str, Any] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Collection:
        """The rows of one table in a topic.

        With `snapshot` (True, or `{"limit": 50}`), it begins with the rows that exist, else with those that change
        from now on. `where` and `columns` say which rows of each table, and what of them. Raises RowcastError if the
        client is closed, or the topic is followed without a snapshot, or with another filter, already.
        """
        collection = Collection(table, order, lambda it: self._run(self._engine.unfollow, topic, it))
        self._run(self._engine.follow, topic, collection, snapshot, _filter(where, columns))
        return collection

    def channel(self, topic: str, *, presence: dict[str, Any] | None = None) -> Channel:
        """The signals of a topic, and with `presence`, which others see, who is present."""
        channel = Channel(self, topic, presence)
        self._run(self._engine.follow, topic, channel)
        return channel

    def ack(self) -> None:
        """Let the server keep how far this device is: everything received so far is processed."""
        self._run(self._engine.ack)

    async def changes(
        self,
        topic: str,
        *,
        buffer: int = BUFFER,
        where: Mapping[str, Any] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Change]:
        """The changes of a topic from now on, each once and in order; a reset is one of `kind` `reset`.

        `where` and `columns` say of which rows of each table, and what of them.
        If the loop falls behind by `buffer` changes, the client disconnects, and resumes once the loop has caught up.
        Raises TopicEnded or ConnectionStopped at the end.
        """
        stream = ChangeStream(buffer, self._pause)
        self._run(self._engine.follow, topic, stream, None, _filter(where, columns))
        try:
            while True:
                while stream.waiting:
                    yield stream.waiting.popleft()
                if stream.error:
                    raise stream.error
                if stream.ended:
                    return
                stream.arrived.clear()
                self._release(stream)
                await stream.arrived.wait()
        finally:
            self._run(self._engine.unfollow, topic, stream)
            self._release(stream)

    async def __aenter__(self) -> Self:
        self._run(self._engine.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Disconnect for good."""
        self._run(self._engine.close)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What the engine asks for

    def open(self, *, fresh: bool) -> None:
        """For the engine."""
        self._outbox = asyncio.Queue()
        self._current = self._begin(self._connect(fresh=fresh, outbox=self._outbox))

    def renew(self) -> None:
        """For the engine."""
        self._renewal = self._begin(self._fetch_another())

    def send(self, frame: Frame) -> None:
        """For the engine."""
        self._outbox.put_nowait(frame)

    def close(self) -> None:
        """For the engine."""
        tasks, self._current, self._renewal = (self._current, self._renewal), None, None
        for task in tasks:
            if task is not None and task is not asyncio.current_task():  # that one ends by itself, in `_converse`
                task.cancel()

    def emit(self, name: str, value: object) -> None:
        """For the engine."""
        self._listeners[name](value)

    # What a channel asks for

    def send_signal(self, topic: str, name: str, data: object) -> bool:
        """For a channel."""
        return self._engine.signal(topic, name, data)

    def present(self, topic: str, channel: Channel) -> None:
        """For a channel."""
        self._run(self._engine.present, topic, channel)

    def unfollow(self, topic: str, channel: Channel) -> None:
        """For a channel."""
        self._run(self._engine.unfollow, topic, channel)

    # The rest

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fetch_another(self) -> None:
        """Fetch another token for the open connection; after a failure, it is fetched again, or when this expires."""
        if isinstance(self._token, str):
            return  # there is no other
        try:
            token = await self._fetch_token(fresh=True)
        except TokenUnavailable:
            self._run(self._engine.renew, None)
            return
        if token is None:
            self._run(self._engine.stop, 4401, "there is no token")
        else:
            self._run(self._engine.renew, token)

    def _pause(self, stream: ChangeStream) -> None:
        self._full.add(stream)
        self._engine.pause()

    def _release(self, stream: ChangeStream) -> None:
        if stream in self._full:
            self._full.remove(stream)
            if not self._full:
                self._run(self._engine.unpause)

    def _run(self, step: Callable[..., None], *values: Any) -> None:  # noqa: ANN401
        """Let the engine do something, and set the timer that it wants."""
        try:
            step(*values)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            deadline = self._engine.deadline
            if deadline is not None:
                delay = max(0.0, deadline - time.monotonic())
                self._timer = asyncio.get_running_loop().call_later(delay, self._run, self._engine.tick)

    async def _connect(self, *, fresh: bool, outbox: asyncio.Queue[Frame]) -> None:
        code, reason = 1006, ""
        try:
            token = await self._fetch_token(fresh=fresh)
            if token is None:
                self._run(self._engine.stop, 4401, "there is no token")
                return
            self._run(self._engine.dialing)
            code, reason = await self._converse(token, outbox)
        except InvalidStatus as error:
            code = 1013 if error.response.status_code in {429, 503} else 1006
            reason = str(error)
        except (OSError, WebSocketException, TokenUnavailable) as error:
            reason = str(error)
        if self._current is asyncio.current_task():
            self._current = None
            self._run(self._engine.closed, code, reason)

    async def _fetch_token(self, *, fresh: bool) -> str | None:
        if isinstance(self._token, str):
            return self._token
        try:
            found = self._token(fresh=fresh)
            return await found if inspect.isawaitable(found) else found
        except Exception as error:
            _log.exception("The function that fetches the token failed.")
            raise TokenUnavailable(str(error)) from error

    async def _converse(self, token: str, outbox: asyncio.Queue[Frame]) -> tuple[int, str]:
        """Exchange frames until the connection ends; returns the close code and reason."""
        async with connect(
            self._url,
            subprotocols=[Subprotocol("rowcast.v1")],
            max_size=None,
            ping_interval=None,  # the engine notices a dead connection by the missing heartbeat
            open_timeout=None,
            close_timeout=CLOSE_TIMEOUT,
        ) as connection:
            self._run(self._engine.opened, token)
            writer = asyncio.create_task(_write(connection, outbox))
            try:
                async for text in connection:
                    self._run(self._engine.receive, json.loads(text))
                    if self._current is not asyncio.current_task():
                        break
            except ConnectionClosed:
                pass
            finally:
                writer.cancel()
            return connection.close_code or 1006, connection.close_reason or ""


class TokenUnavailable(RowcastError):
    """The function that fetches the token failed: it is called again."""


async def _write(connection: ClientConnection, outbox: asyncio.Queue[Frame]) -> None:
    try:
        while True:
            await connection.send(json.dumps(await outbox.get()))
    except ConnectionClosed:
        pass  # the reader notices


def _filter(where: Mapping[str, Any] | None, columns: Mapping[str, Any] | None) -> dict[str, Any]:
    asked = {"where": where, "columns": columns}
    return {name: value for name, value in asked.items() if value is not None}
