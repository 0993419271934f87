"""The console at `/console`: what this process is doing, as JSON, and the replay of dead letters."""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs

from daemon import __version__, metrics
from daemon.core.errors import OperatorFault
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pump import Pump
from daemon.gateway.http import Call, Handler, Page, json_page, text_page
from daemon.gateway.server import Gateway
from daemon.health import Readiness
from daemon.log import dead_letters
from daemon.log.backlog import Backlog
from daemon.log.dead_letters import Refusal, Selection
from daemon.log.queries import query
from daemon.pages.access import BAD_BODY, Verify, json_body, refusal
from daemon.pages.recorder import MAX_EVENTS, Recorder
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

LOOKING: Final = 10.0  # seconds after a request for which somebody counts as looking
FRESH: Final = 0.9  # seconds for which a reading serves everybody who asks
WATCHES_FRESH: Final = 15.0  # seconds; watches change with a command
DATABASE_TIMEOUT: Final = 3.0  # seconds for the console's own statements
PATIENCE: Final = 0.5  # seconds that a request waits for the database; then it gets what was read last
REPLAY_TIMEOUT: Final = 10.0  # seconds
MAX_TOPICS: Final = 50
MAX_SESSIONS: Final = 100
MAX_DEAD_LETTERS: Final = 50


@dataclass
class _Stored:
    """What the database said last. `problem` says why it does not answer, if it does not."""

    watches: list[dict[str, Any]] = field(default_factory=list)
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    more_dead_letters: bool = False
    problem: str = ""
    watches_read_at: float = float("-inf")
    read_at: float = float("-inf")


@dataclass(frozen=True)
class ConsoleOptions:
    """Who may see the console (see `refusal`), how many workers there are, and whether `/demo.json` has users."""

    verify: Verify
    trusts_local: bool
    workers: int
    has_samples: bool


class Console:
    """Reads the parts of this process when it is asked, at most once a second, and otherwise does nothing.

    While somebody looks, the live end tells the recorder what it publishes.
    """

    def __init__(
        self,
        live: Live,
        pump: Pump,
        log_cache: LogCache,
        backlog: Backlog,
        readiness: Readiness,
        pool: Pool,
        options: ConsoleOptions,
    ) -> None:
        self._live = live
        self._hub = live.hub
        self._pump = pump
        self._log_cache = log_cache
        self._backlog = backlog
        self._readiness = readiness
        self._pool = pool
        self._options = options
        self.gateway: Gateway | None = None  # set before the first request: the gateway serves the console
        self._recorder = Recorder(live.hub.count_followers)
        self._looked_at = float("-inf")
        self._stored = _Stored()
        self._reading: asyncio.Task[None] | None = None
        self._process: dict[str, Any] = {}
        self._process_read_at = float("-inf")

    def handlers(self) -> dict[tuple[str, str], Handler]:
        """The handlers of the console, by method and path."""
        return {("GET", "/console/state"): self.state, ("POST", "/console/replay"): self.replay}

    async def state(self, call: Call) -> Page:
        """Everything that the console shows. `after` and `since` in the query leave out what the page has already."""
        if (refused := self._refusal(call)) is not None:
            return refused
        self._look()
        await self._read_database()
        now = time.monotonic()
        if now - self._process_read_at > FRESH:
            self._process, self._process_read_at = self._read_process(), now
        asked = parse_qs(call.request.query)
        stored = self._stored
        return json_page(
            self._process
            | {
                "now": time.time(),
                "events": self._recorder.events(_number(asked.get("after"))),
                "seconds": self._recorder.seconds(_number(asked.get("since"))),
                "watches": stored.watches,
                "dead_letters": stored.dead_letters,
                "more_dead_letters": stored.more_dead_letters,
                "database_problem": stored.problem,
            }
        )

    async def replay(self, call: Call) -> Page:
        """Replay one dead letter, {"seq": N}, as a new change."""
        if (refused := self._refusal(call)) is not None:
            return refused
        seq = (json_body(call) or {}).get("seq")
        if type(seq) is not int or not 0 <= seq < 2**63:
            return BAD_BODY
        refusals: list[Refusal] = []
        try:
            async with acquired(self._pool, REPLAY_TIMEOUT) as connection:
                await dead_letters.replay(connection, Selection([seq]), refusals.append)
        except dead_letters.UnknownDeadLetter:
            return text_page(f"There is no dead letter {seq} any more.", 404)
        except dead_letters.ReplayNotAllowed as fault:
            return text_page(f"{fault} `daemon dead-letters replay` as the owner does it.", 403)
        except DATABASE_ERRORS as error:
            return text_page(f"The database does not answer: {describe(error)}", 503)
        finally:
            self._stored.read_at = float("-inf")
        if refusals:
            return text_page(f"Not replayed: {dead_letters.REFUSALS[refusals[0].reason]}.", 409)
        return json_page({"replayed": seq})

    def _refusal(self, call: Call) -> Page | None:
        return refusal(call, self._options.verify, trusts_local=self._options.trusts_local)

    def _look(self) -> None:
        """Somebody looks: record what is published until nobody has asked for a while."""
        self._looked_at = time.monotonic()
        if self._live.on_publish is None:
            self._recorder.begin(self._log_cache.newest(MAX_EVENTS))
            self._live.on_publish = self._recorder.record
            asyncio.get_running_loop().call_later(LOOKING, self._look_away)

    def _look_away(self) -> None:
        left = self._looked_at + LOOKING - time.monotonic()
        if left > 0:
            asyncio.get_running_loop().call_later(left, self._look_away)
        else:
            self._live.on_publish = None

    def _read_process(self) -> dict[str, Any]:
        gateway, hub = self.gateway, self._hub
        assert gateway is not None
        counts = hub.follower_counts()
        numbers = _metric_values()
        return {
            "version": __version__,
            "process": os.getpid(),
            "workers": self._options.workers,
            "has_samples": self._options.has_samples,
            "ready": not (reasons := self._readiness.reasons()),
            "reasons": reasons,
            "warnings": self._readiness.warnings(),
            "is_leader": numbers.get("rowcast_leader") == 1,
            "epoch": hub.position.epoch,
            "position": hub.position.seq,
            "waiting": round(self._backlog.age, 3),
            "read_age": round(self._pump.read_age, 3),
            "clients": gateway.clients,
            "clients_limit": int(numbers.get("rowcast_clients_limit", 0)),
            "behind": int(numbers.get("rowcast_clients_behind", 0)),
            "subscriptions": hub.subscriptions,
            "topics": [{"topic": topic, "followers": count} for topic, count in counts.most_common(MAX_TOPICS)],
            "topic_count": len(counts),
            "sessions": [session._asdict() for session in gateway.sessions(MAX_SESSIONS)],
            "memory": int(numbers.get("process_resident_memory_bytes", 0)),
            "queue_usage": numbers.get("rowcast_queue_usage", 0.0),
        }

    async def _read_database(self) -> None:
        """Wait a moment for what the database holds; a reading that takes longer goes on."""
        if self._reading is None and time.monotonic() - self._stored.read_at > FRESH:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=PATIENCE)

    async def _read(self) -> None:
        stored = self._stored
        try:
            async with acquired(self._pool, DATABASE_TIMEOUT) as connection:
                found = await dead_letters.find(connection, Selection(limit=MAX_DEAD_LETTERS + 1))
                if time.monotonic() - stored.watches_read_at > WATCHES_FRESH:
                    stored.watches = [dict(watch) for watch in await connection.fetch(query("watches"))]
                    stored.watches_read_at = time.monotonic()
            stored.dead_letters = [_dead_letter(record) for record in found[-MAX_DEAD_LETTERS:]][::-1]
            stored.more_dead_letters = len(found) > MAX_DEAD_LETTERS
            stored.problem = ""
        except (*DATABASE_ERRORS, OperatorFault) as error:
            stored.problem = describe(error)
        finally:
            stored.read_at = time.monotonic()
            self._reading = None


def _dead_letter(record: Any) -> dict[str, Any]:  # noqa: ANN401 - a record of the driver
    names = ("seq", "at", "pack", "table_name", "topic", "kind", "key", "reason")
    return {name: record[name] for name in names}


def _number(values: Sequence[str] | None) -> int:
    text = values[0] if values else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else 0


def _metric_values() -> dict[str, float]:
    """The metrics without labels, by name."""
    return {
        sample.name: sample.value
        for family in metrics.REGISTRY.collect()
        for sample in family.samples
        if not sample.labels
    }
