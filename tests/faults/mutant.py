"""Starts the daemon with protections taken away: `python -m tests.faults.mutant NAME[,NAME] [ARGUMENTS]`.

What a test of a fault finds with all protections must be gone with one taken away, or the test had no teeth. This
file is the only place where they can be taken away, and it is not shipped.
"""

import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Final

from daemon.cli import root
from daemon.core import hub, session
from daemon.core.change import Position, Seq
from daemon.delivery import log_cache, pump
from daemon.gateway import connection, limits
from daemon.log import grants, notifier, queries, reader, retention, sequencer


def _put(owner: Any, name: str, mutated: object) -> None:
    assert hasattr(owner, name), name
    setattr(owner, name, mutated)


def _resume(shift: Callable[[Position | None], Position | None]) -> None:
    receive = session.Session.receive

    def mutated(self: session.Session, *arguments: Any, **more: Any) -> list[session.Action]:
        return [
            dataclasses.replace(action, since=shift(action.since)) if isinstance(action, session.Follow) else action
            for action in receive(self, *arguments, **more)
        ]

    _put(session.Session, "receive", mutated)


def resume_from_head() -> None:
    """A client that comes back is live at once, whatever its position."""
    _resume(lambda _: None)


def resume_too_early() -> None:
    """A client that comes back is told its last change once more."""
    _resume(lambda since: since and Position(since.epoch, Seq(max(since.seq - 5, 0))))


def no_continuity() -> None:
    """Every position can be continued."""

    async def continuity(*_: object) -> None:
        return None

    _put(reader.PgLogReader, "continuity", continuity)
    _put(log_cache.LogCache, "continuity", continuity)


def no_catch_up() -> None:
    """The log is not read after a LISTEN."""

    class Silent(dict[str, Any]):
        def values(self) -> Any:
            return ()

    init = notifier.Notifier.__init__

    def mutated(self: notifier.Notifier, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more)
        self._wakeups = Silent(self._wakeups)

    _put(notifier.Notifier, "__init__", mutated)


def no_beat_limit() -> None:
    """A listener that hears nothing is waited for."""
    init = notifier.Notifier.__init__

    def mutated(self: notifier.Notifier, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more | {"beat_limit": 1e6})

    _put(notifier.Notifier, "__init__", mutated)


def _replace(name: str, old: str, new: str) -> None:
    text = queries.query(name)
    assert old in text, f"{name} does not say {old!r} any more"
    queries.query.statements[name] = text.replace(old, new)


LAG: Final = 0.5  # seconds
NEW: Final = "e.xid >= $3::text::xid8"
RUNNING: Final = "e.xid = any ($4::text []::xid8 [])"


def naive_cursor() -> None:
    """New is what has a larger id than anything in the log."""
    _replace(
        "number_events",
        NEW,
        "$3::text is not null and e.id > coalesce((select max(l.event_id) from rowcast.log as l), 0)",
    )
    _replace("number_events", RUNNING, "$4::text [] is null")


def xmin_watermark() -> None:
    """New is what has no number yet and is older than every open transaction; by transaction."""
    _replace(
        "number_events",
        NEW,
        "$3::text is not null and e.xid < pg_snapshot_xmin(pg_current_snapshot())"
        " and not exists (select from rowcast.log as l where l.event_id = e.id)",
    )
    _replace("number_events", RUNNING, "$4::text [] is null")
    _replace("number_events", "max(f.id) over (partition by f.xid) as tx", "f.xid::text::bigint as tx")


def order_by_time() -> None:
    """The statements' times give the order."""
    _replace("number_events", "max(f.id) over", "max(f.at) over")
    _replace("number_events", "e.id, e.xid, e.topic,", "e.id, e.xid, e.at, e.topic,")


def begins_with_what_is_new() -> None:
    """No leader but the first goes on from what was seen before."""
    begins = "case when term = 1 then snapshot else pg_current_snapshot() end::text as snapshot"
    _replace("open_term", "snapshot::text as snapshot", begins)


def no_patience() -> None:
    """Reading the log is given up sooner than a bad line lets anything through."""
    for limit in ("ANSWER_TIMEOUT", "READ_TIMEOUT", "TRANSACTION_TIMEOUT"):
        assert hasattr(reader, limit)
        _put(reader, limit, 0.15)
    _put(sequencer, "NUMBER_TIMEOUT", 0.15)


def everybody_asks_at_once() -> None:
    """Questions about rights may take every connection."""
    _put(grants, "MAX_CONCURRENT_QUERIES", 1_000_000)


def nothing_is_handed_over() -> None:
    """The leader reads what it has numbered, as its followers do."""
    _put(pump.Pump, "offer", lambda self, *_: self._wakeup.set())


def everybody_in_step() -> None:
    """Nobody is told more until all have taken what they were told."""
    bury_letters = pump.Pump._store_pending

    def later(self: pump.Pump, after: Any, changes: Any) -> None:
        self._offered.append((after, changes))
        self._wakeup.set()

    async def mutated(self: pump.Pump) -> None:
        await bury_letters(self)
        known: list[dict[Any, Any]] = [*self._hub._followers.values(), *self._hub._pending.values()]
        for follower in {follower for followers in known for follower in followers}:
            await follower.drained()

    _put(pump.Pump, "offer", later)
    _put(pump.Pump, "_store_pending", mutated)


def no_usage() -> None:
    """Nobody asks how full the queue is, which is what empties it."""
    _replace("send_heartbeat", "pg_notification_queue_usage()", "0::float8")


def rights_at_subscribe() -> None:
    """Rights are looked up once, and never end."""

    def none(self: hub.Hub, ended_rights: Iterable[object]) -> dict[Any, Any]:
        return {}

    _put(hub.Hub, "_revocations", none)


def rights_from_the_first() -> None:
    """Whoever may read a topic may read all of its past."""
    readable_from = grants.PgGrants.readable_from

    async def mutated(self: grants.PgGrants, *arguments: Any) -> Seq | None:
        return None if await readable_from(self, *arguments) is None else Seq(0)

    _put(grants.PgGrants, "readable_from", mutated)


def rights_of_the_live() -> None:
    """Rights end for who is live, and not for who is being replayed."""
    _put(hub.Hub, "watch_rights", lambda *_: None)


def no_wait_for_the_hub() -> None:
    """A client that was told more by another daemon joins at once."""

    async def at_once(*_: object) -> None:
        return

    _put(pump.Pump, "wait_until_delivered", at_once)


def slow_reader() -> None:
    """No protection is taken away: this daemon reads what is new in the log half a second late."""
    read = reader.PgLogReader.read

    async def mutated(self: reader.PgLogReader, *arguments: Any) -> Any:
        await asyncio.sleep(LAG)
        return await read(self, *arguments)

    _put(reader.PgLogReader, "read", mutated)


def _limits(**values: float) -> None:
    init = limits.Limits.__init__

    def mutated(self: limits.Limits, **more: Any) -> None:
        init(self, **more | values)

    _put(limits.Limits, "__init__", mutated)


def quick_pings() -> None:
    """No protection is taken away: silence is noticed in two seconds instead of thirty."""
    _limits(ping_every=1.0, ping_timeout=1.0, tick_every=0.1)


def no_pings() -> None:
    """Nobody is asked whether he still lives."""
    _limits(ping_every=1e6, tick_every=0.1)


def quick_drain() -> None:
    """No protection is taken away, but pings are: who reads nothing is noticed in two seconds instead of thirty."""
    _limits(ping_every=1e6, drain_timeout=2.0, tick_every=0.1)


def no_drain_limit() -> None:
    """Nobody is asked whether he still lives, and who reads nothing may do so for ever."""
    _limits(ping_every=1e6, drain_timeout=1e6, tick_every=0.1)


def short_retention() -> None:
    """No protection is taken away: what is older than two seconds is dropped; operators cannot ask for so little."""
    init = retention.Retention.__init__

    def mutated(self: retention.Retention, *arguments: Any, **more: Any) -> None:
        short: list[Any] = [timedelta(seconds=2) if isinstance(one, timedelta) else one for one in arguments]
        init(self, *short, **more)

    _put(retention.Retention, "__init__", mutated)


def plain_detach() -> None:
    """Segments are detached as if nobody read."""
    _replace("expired", "else 'concurrently' end", "else '' end")


def no_tombstones() -> None:
    """What came before a deletion is told as it was."""
    _replace(
        "number_events", "from numbered as n where n.kind = 'delete'", "from numbered as n where n.kind = 'lost'"
    )


def memory_keeps_content() -> None:
    """What came before a deletion is told as it was, if it is held in memory."""
    _put(log_cache.LogCache, "_hide", lambda *_: None)


def wild_clock() -> None:
    """No protection is taken away: the clock of the day jumps by up to an hour, back and forth, at each look."""
    real, real_ns = time.time, time.time_ns
    jumps = [0.0, 3000.0, -3000.0, 3600.0, -3599.0, 1.0, -1.0]
    looks = [0]

    def skew() -> float:
        looks[0] += 1
        return jumps[looks[0] % len(jumps)]

    time.time = lambda: real() + skew()
    time.time_ns = lambda: real_ns() + int(skew() * 1e9)


def names_by_the_clock() -> None:
    """A session's name says in which hour it began, and nothing else."""
    _put(connection, "ULID", lambda: int(time.time() / 3600))


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    mutant.__name__: mutant
    for mutant in (
        resume_from_head,
        resume_too_early,
        no_continuity,
        no_catch_up,
        no_beat_limit,
        naive_cursor,
        xmin_watermark,
        order_by_time,
        begins_with_what_is_new,
        no_patience,
        everybody_asks_at_once,
        nothing_is_handed_over,
        everybody_in_step,
        no_usage,
        rights_at_subscribe,
        rights_from_the_first,
        rights_of_the_live,
        no_wait_for_the_hub,
        slow_reader,
        quick_pings,
        no_pings,
        quick_drain,
        no_drain_limit,
        short_retention,
        plain_detach,
        no_tombstones,
        memory_keeps_content,
        wild_clock,
        names_by_the_clock,
    )
}

if __name__ == "__main__":
    for _name in sys.argv.pop(1).split(","):
        MUTANTS[_name]()
    root.main()
