"""The console at `/console`: what this process is doing, as JSON, and the replay of dead letters."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

from daemon import __version__, metrics
from daemon.delivery.live import Live
from daemon.gateway.http import Call, Handler, Page, json_page
from daemon.gateway.server import Gateway
from daemon.health import Readiness
from daemon.pages.access import Verify, refusal
from daemon.pages.kept import NOTHING, KeptUnavailable, ReadKept
from daemon.pages.recorder import MAX_EVENTS, Recorder

LOOKING: Final = 10.0  # seconds after a request for which somebody counts as looking
FRESH: Final = 0.9  # seconds for which a reading serves everybody who asks
PATIENCE: Final = 0.5  # seconds that a request waits for the database; then it gets what was read last
MAX_TOPICS: Final = 50
MAX_SESSIONS: Final = 100


@dataclass(frozen=True)
class ConsoleOptions:
    """Who may see the console (see `refusal`), how many workers there are, and whether `/demo.json` has users."""

    verify: Verify
    trusts_local: bool
    workers: int
    has_samples: bool


class Lag(NamedTuple):
    """For how many seconds changes have been waiting to be numbered, and the log to be read; 0 if none wait."""

    waiting: float
    read_age: float


class Console:
    """Reads the parts of this process when it is asked, at most once a second, and otherwise does nothing.

    While somebody looks, the live end tells the recorder what it publishes.
    """

    def __init__(
        self,
        live: Live,
        lag: Callable[[], Lag],
        readiness: Readiness,
        read_kept: ReadKept,
        replay: Handler,
        options: ConsoleOptions,
    ) -> None:
        self._live = live
        self._hub = live.hub
        self._lag = lag
        self._readiness = readiness
        self._read_kept = read_kept
        self._replay = replay
        self._options = options
        self.gateway: Gateway | None = None  # set before the first request: the gateway serves the console
        self._recorder = Recorder(live.hub.count_followers)
        self._looked_at = float("-inf")
        self._kept = NOTHING
        self._problem = ""  # why it cannot be read
        self._kept_read_at = float("-inf")
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
        kept = self._kept
        return json_page(
            self._process
            | {
                "now": time.time(),
                "events": self._recorder.events(_number(asked.get("after"))),
                "seconds": self._recorder.seconds(_number(asked.get("since"))),
                **kept._asdict(),
                "database_problem": self._problem,
            }
        )

    async def replay(self, call: Call) -> Page:
        """Replay one dead letter, {"seq": N}, as a new change."""
        if (refused := self._refusal(call)) is not None:
            return refused
        try:
            return await self._replay(call)
        finally:
            self._kept_read_at = float("-inf")

    def _refusal(self, call: Call) -> Page | None:
        return refusal(call, self._options.verify, trusts_local=self._options.trusts_local)

    def _look(self) -> None:
        """Somebody looks: record what is published until nobody has asked for a while."""
        self._looked_at = time.monotonic()
        if self._live.on_publish is None:
            self._recorder.begin(self._live.log_cache.newest(MAX_EVENTS))
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
        numbers, lag = _metric_values(), self._lag()
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
            "waiting": round(lag.waiting, 3),
            "read_age": round(lag.read_age, 3),
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
        if self._reading is None and time.monotonic() - self._kept_read_at > FRESH:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=PATIENCE)

    async def _read(self) -> None:
        try:
            self._kept, self._problem = await self._read_kept(), ""
        except KeptUnavailable as error:
            self._problem = error.reason
        finally:
            self._kept_read_at = time.monotonic()
            self._reading = None


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
