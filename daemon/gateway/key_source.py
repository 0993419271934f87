"""Where the keys come from: secrets, files and a JSON Web Key Set at a URL, which is fetched again as keys change."""

import asyncio
import http.client
import io
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from daemon import __version__, metrics
from daemon.core.errors import OperatorFault
from daemon.gateway.keys import (
    MAX_SET,
    BadKeySet,
    Key,
    KeyTable,
    parse_key_set,
    read_key_set,
    read_public_key,
    secret_key,
)
from daemon.health import Progress
from daemon.logs import get_logger

log = get_logger()

FETCH_TIMEOUT: Final = 3.0  # seconds for a whole answer, however slowly it comes; less than a client waits
REFRESH_EVERY: Final = 300.0  # seconds between two fetches
RETRY_EVERY: Final = 30.0  # seconds until a failed one is repeated
COOLDOWN: Final = 10.0  # seconds in which tokens with unknown keys cause one fetch at most
MAX_HEADERS: Final = 32 * 1024  # bytes


class KeysUnavailable(OperatorFault):
    """The keys at {url} cannot be fetched ({reason}): correct ROWCAST_JWKS, or try again once they can."""

    exit_code: ClassVar[int] = 49

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason


@dataclass(frozen=True)
class KeyPlaces:
    """Where the keys are. `key_set` is a path or a URL."""

    secrets: Sequence[bytes] = ()
    public_keys: Sequence[Path] = ()
    key_set: str | None = None

    @property
    def url(self) -> str | None:
        """The URL of the key set, if it is not in a file."""
        return self.key_set if self.key_set is not None and "://" in self.key_set else None

    def read(self) -> list[Key]:
        """The keys that are not at a URL. Raises BadSecret and KeyFileUnusable."""
        keys = [*map(secret_key, self.secrets), *map(read_public_key, self.public_keys)]
        if self.key_set is not None and self.url is None:
            keys += read_key_set(Path(self.key_set))
        return keys


class KeySource:
    """Keeps a table of keys current.

    A set at a URL is fetched every REFRESH_EVERY seconds, and once more when a token names a key that nobody knows,
    but not twice within COOLDOWN: else anybody could make this daemon send requests. Those who wait for a fetch share
    it. If it fails, the keys that were fetched last stay.
    """

    def __init__(
        self, places: KeyPlaces, use: Callable[[KeyTable], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._places = places
        self._use = use
        self._clock = clock
        self._local: Sequence[Key] = ()
        self._remote: Sequence[Key] = ()
        self._remote_text = b""
        self._table = KeyTable()
        self._fetching: asyncio.Task[None] | None = None
        self._fetched_at = -COOLDOWN  # when the last fetch began
        self._progress = Progress(clock)

    @property
    def age(self) -> float:
        """For how many seconds a fetch has been failing; 0 if the last one succeeded."""
        return self._progress.age

    def warnings(self) -> list[str]:
        """Why the keys at the URL may be out of date."""
        return [f"the keys cannot be fetched: {self._progress.failure}"] if self._progress.failure else []

    async def load(self, places: KeyPlaces | None = None) -> int:
        """Read all keys, from `places` if they have changed, and use them. Returns their number.

        If anything cannot be read, everything stays as it was; but keys that were fetched from the same URL before
        are good enough. Raises BadSecret, KeyFileUnusable and KeysUnavailable.
        """
        places = self._places if places is None else places
        local = await asyncio.to_thread(places.read)
        text: bytes = b""
        remote: Sequence[Key] = ()
        if places.url is not None:
            try:
                text = await fetch(places.url)
                remote = parse_key_set(text)
            except (OSError, ValueError) as error:
                if not self._remote or places.url != self._places.url:
                    raise KeysUnavailable(places.url, reason_of(error)) from None
                self._failed(error)
                text, remote = self._remote_text, self._remote
            else:
                self._succeeded()
        self._places, self._local = places, local
        self._replace(remote, text)
        return len(local) + len(remote)

    async def run(self) -> None:
        """Fetch the set again and again."""
        while True:
            await asyncio.sleep(RETRY_EVERY if self._progress.failure else REFRESH_EVERY)
            if self._places.url is not None:
                await self._refresh()

    def may_learn(self, kid: str) -> bool:
        """Whether a fetch might find a key of this name."""
        if self._places.url is None or self._table.knows(kid):
            return False
        return self._fetching is not None or self._clock() - self._fetched_at >= COOLDOWN

    async def learn(self) -> None:
        """Fetch the set, or wait for a fetch that runs. Its failure is logged, not raised."""
        await self._refresh()

    async def _refresh(self) -> None:
        if self._fetching is None:
            self._fetched_at = self._clock()
            self._fetching = asyncio.create_task(self._fetch_once())
        # Shielded: whoever waits may leave, and the others still wait for it.
        await asyncio.shield(self._fetching)

    async def _fetch_once(self) -> None:
        url = self._places.url
        try:
            if url is None:
                return
            text = await fetch(url)
            keys = parse_key_set(text)
        except (OSError, ValueError) as error:
            self._failed(error)
        else:
            self._succeeded()
            if url == self._places.url and text != self._remote_text:
                self._replace(keys, text)
                log.info("keys_changed", url=url, keys=len(keys))
        finally:
            self._fetching = None

    def _failed(self, error: OSError | ValueError) -> None:
        metrics.KEY_FETCHES.labels(outcome="failed").inc()
        if self._progress.fail(reason_of(error)):
            log.warning("keys_unavailable", url=self._places.url, reason=self._progress.failure)

    def _succeeded(self) -> None:
        metrics.KEY_FETCHES.labels(outcome="done").inc()
        self._progress.end()

    def _replace(self, remote: Sequence[Key], text: bytes) -> None:
        self._remote, self._remote_text = remote, text
        self._table = KeyTable([*self._local, *self._remote])
        self._use(self._table)


def reason_of(error: OSError | ValueError) -> str:
    """Why a fetch failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no whole answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, OSError):
        return (error.strerror or str(error) or type(error).__name__).lower()
    return str(error)


async def fetch(url: str) -> bytes:
    """The body of a page, which must answer 200 itself: a redirect is not followed. Raises OSError and BadKeySet."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host, path = parts.hostname or "", parts.path or "/"
    request = (
        f"GET {path}{'?' if parts.query else ''}{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"User-Agent: rowcast/{__version__}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    )
    async with asyncio.timeout(FETCH_TIMEOUT):
        context = await asyncio.to_thread(ssl.create_default_context) if secure else None
        reader, writer = await asyncio.open_connection(host, parts.port or (443 if secure else 80), ssl=context)
        try:
            writer.write(request.encode())
            answer = await _read_all(reader)
        finally:
            writer.transport.abort()
    return _body(answer)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    while chunk := await reader.read(65536):
        answer += chunk
        if len(answer) > MAX_HEADERS + 2 * MAX_SET:  # a body in small chunks is larger than its content
            raise BadKeySet("its answer is too large")
    return bytes(answer)


class _Received:
    """What http.client reads from instead of a socket."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._answer)


def _body(answer: bytes) -> bytes:
    response = http.client.HTTPResponse(_Received(answer))  # type: ignore[arg-type]
    try:
        response.begin()
        if response.status != http.client.OK:
            raise BadKeySet(f"it answers {response.status}, not 200")
        return response.read(MAX_SET + 1)
    except (http.client.HTTPException, ValueError) as error:
        if isinstance(error, BadKeySet):
            raise
        raise BadKeySet("its answer is not HTTP") from None
