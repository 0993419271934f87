"""Starts the daemon with safeguards removed: `python -m tests.faults.mutant NAME[,NAME] [ARGUMENTS]`.

A fault test that passes must fail when the safeguard is removed, or it proves nothing. Safeguards can be removed
only here, and this file is not shipped.
"""

import asyncio
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Final

from daemon.app import build, gateway, serve
from daemon.cli import root
from daemon.core import hub, session
from daemon.core.batch import LogBatch
from daemon.core.change import RESET_KINDS, Position, Seq
from daemon.delivery import feed, live, log_cache, pump
from daemon.gateway import client_connection, limits
from daemon.log import backlog, grants, notifier, queries, reader, retention, sequencer
from daemon.postgres.connect import SESSION
from daemon.relay import codec, link, publisher, remote


def _put(owner: Any, name: str, mutated: object) -> None:
    assert hasattr(owner, name), name
    setattr(owner, name, mutated)


def _resume(shift: Callable[[Position | None], Position | None]) -> None:
    receive = session.Session.receive

    def mutated(self: session.Session, frame: Any) -> list[session.Action]:
        actions = receive(self, frame)
        for place, action in enumerate(actions):
            if isinstance(action, session.Follow):
                actions[place] = self.topics[action.topic] = dataclasses.replace(action, since=shift(action.since))
        return actions

    _put(session.Session, "receive", mutated)


def resume_from_head() -> None:
    """A client that resumes is live immediately, whatever its position."""
    _resume(lambda _: None)


def resume_too_early() -> None:
    """A client that resumes receives its last changes once more."""
    _resume(lambda since: since and Position(since.epoch, Seq(max(since.seq - 5, 0))))


def no_continuity() -> None:
    """Every position is accepted as one to continue from."""

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
    """A listener that receives no heartbeats is never given up."""
    init = notifier.Notifier.__init__

    def mutated(self: notifier.Notifier, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more | {"beat_limit": 1e6})

    _put(notifier.Notifier, "__init__", mutated)


def _replace(name: str, old: str, new: str) -> None:
    text = queries.query(name)
    assert old in text, f"{name} does not contain {old!r}"
    queries.query.statements[name] = text.replace(old, new)


def _replace_numbering(old: str, new: str) -> None:
    for name in ("number_events", "number_few"):
        _replace(name, old, new)


LAG: Final = 1.0  # seconds
NEW: Final = "e.xid >= $3::text::xid8"
RUNNING: Final = "e.xid = any ($4::text []::xid8 [])"


def naive_cursor() -> None:
    """An event is new if its id is larger than any in the log."""
    _replace_numbering(
        NEW,
        "$3::text is not null and e.id > coalesce((select max(l.event_id) from rowcast.log as l), 0)",
    )
    _replace_numbering(RUNNING, "$4::text [] is null")


def xmin_watermark() -> None:
    """An event is new if it has no number and is older than every open transaction; ordered by transaction."""
    _replace_numbering(
        NEW,
        "$3::text is not null and e.xid < pg_snapshot_xmin(pg_current_snapshot())"
        " and not exists (select from rowcast.log as l where l.event_id = e.id)",
    )
    _replace_numbering(RUNNING, "$4::text [] is null")
    _replace_numbering("max(f.id) over (partition by f.xid) as tx", "f.xid::text::bigint as tx")


def order_by_time() -> None:
    """Events are ordered by the times of their statements."""
    _replace_numbering("max(f.id) over", "max(f.at) over")
    _replace("number_events", "e.id, e.xid, e.topic,", "e.id, e.xid, e.at, e.topic,")


def no_stored_snapshot() -> None:
    """Only the first leader uses the stored snapshot; later ones begin with the current one."""
    snapshot = "case when term = 1 then snapshot else pg_current_snapshot() end::text as snapshot"
    _replace("open_term", "snapshot::text as snapshot", snapshot)


def no_expiry() -> None:
    """The lease of a leader that does nothing does not expire."""
    _put(sequencer, "LEASE", timedelta(hours=1))


def no_halving() -> None:
    """A batch that cannot be numbered is tried again as it is."""
    _put(sequencer, "may_blame_an_event", lambda _: False)


def no_look_at_the_log() -> None:
    """A leader trusts that the log is the one that it wrote, and that a position in range is on record."""
    _replace("renew_lease", "rowcast.on_record($3) and exists", "$3::bigint is not null or exists")
    _replace("renew_lease", "where l.nonce = $1 and l.xmin = l.xid::xid", "where l.nonce = $1")
    _replace_numbering("where l.nonce = $1 and l.xmin = l.xid::xid", "where l.nonce = $1")
    _replace("continuity", "rowcast.on_record($1)", "true")


def no_backlog() -> None:
    """Nobody watches whether numbering moves."""
    _put(backlog.Backlog, "reasons", lambda _: [])


def short_timeouts() -> None:
    """Reads of the log time out before a bad connection lets anything through."""
    for limit in ("ANSWER_TIMEOUT", "READ_TIMEOUT", "TRANSACTION_TIMEOUT"):
        assert hasattr(reader, limit)
        _put(reader, limit, 0.15)
    _put(sequencer, "NUMBER_TIMEOUT", 0.15)


def unlimited_permission_checks() -> None:
    """Permission checks may use every connection, for as long as their locks take."""
    _put(grants, "MAX_CONCURRENT_QUERIES", 1_000_000)
    _put(grants, "MAX_KIND_QUERIES", 1_000_000)
    _put(grants, "MAX_QUERY_SIZE", 1)
    _put(grants, "HELP_DELAY", 0.001)
    _put(grants, "ANSWER_TIMEOUT", 60.0)
    for module in (build, serve):
        _put(module, "SESSION", {**SESSION, "lock_timeout": "60s"})


def leader_reads_the_log() -> None:
    """The leader reads what it has numbered from the log, as its followers do."""
    _put(pump.Pump, "offer", lambda self, *_: self._wakeup.set())


def lockstep_delivery() -> None:
    """Nothing more is sent to anyone until all clients have drained what they were sent."""
    store_pending = pump.Pump._store_pending

    def later(self: pump.Pump, after: Any, changes: Any) -> None:
        self._offered.append((after, changes))
        self._wakeup.set()

    async def mutated(self: pump.Pump) -> None:
        await store_pending(self)
        known: list[dict[Any, Any]] = [*self._live.hub._followers.values(), *self._live.hub._pending.values()]
        for follower in {follower for followers in known for follower in followers}:
            await follower.drained()

    _put(pump.Pump, "offer", later)
    _put(pump.Pump, "_store_pending", mutated)


def no_queue_usage_query() -> None:
    """Nobody queries the usage of the queue, which is what makes Postgres clean it up."""
    for name in ("send_heartbeat", "notify_queue"):
        _replace(name, "pg_notification_queue_usage()", "1::float8")


def let_writers_notify() -> None:
    """The leader sleeps, and lets writers notify, although notifications are blocked."""
    _put(notifier.Notifier, "is_blocked", False)


def rights_at_subscribe() -> None:
    """Rights are checked once, at the subscribe, and never end."""

    def none(self: hub.Hub, ended_rights: Iterable[object]) -> dict[Any, Any]:
        return {}

    _put(hub.Hub, "_revocations", none)


def rights_without_a_start() -> None:
    """A client that may read a topic may read all of its past."""
    readable_from = grants.PgGrants.readable_from

    async def mutated(self: grants.PgGrants, *arguments: Any) -> Seq | None:
        return None if await readable_from(self, *arguments) is None else Seq(0)

    _put(grants.PgGrants, "readable_from", mutated)


def no_revocation_during_replay() -> None:
    """Rights end for live clients, but not for those that are being replayed."""
    _put(hub.Hub, "watch_rights", lambda *_: None)


def no_wait_for_catch_up() -> None:
    """A client that is ahead of this daemon joins the live stream immediately."""

    async def at_once(*_: object) -> None:
        return

    _put(live.Live, "wait_until_delivered", at_once)


def slow_reader() -> None:
    """No safeguard is removed: this daemon reads the log a second late."""
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
    """No safeguard is removed: silence is detected in two seconds instead of thirty."""
    _limits(ping_every=1.0, ping_timeout=1.0, tick_every=0.1)


def quick_relay_pings() -> None:
    """No safeguard is removed: a silent connection to NATS is given up in less than a second instead of six."""
    from daemon.relay import connection  # noqa: PLC0415 - nats-py is an extra

    _put(connection, "PING_INTERVAL", 0.2)


def no_pings() -> None:
    """Clients are not pinged."""
    _limits(ping_every=1e6, tick_every=0.1)


def quick_drain() -> None:
    """A client that reads nothing is detected in two seconds instead of thirty, and without pings."""
    _limits(ping_every=1e6, drain_timeout=2.0, tick_every=0.1)


def no_drain_limit() -> None:
    """Clients are not pinged, and one that reads nothing is never disconnected."""
    _limits(ping_every=1e6, drain_timeout=1e6, tick_every=0.1)


def short_retention() -> None:
    """No safeguard is removed: segments older than two seconds are dropped, which no setting allows."""
    init = retention.Retention.__init__

    def mutated(self: retention.Retention, *arguments: Any, **more: Any) -> None:
        short: list[Any] = [timedelta(seconds=2) if isinstance(one, timedelta) else one for one in arguments]
        init(self, *short, **more)

    _put(retention.Retention, "__init__", mutated)


def plain_detach() -> None:
    """Segments are detached without `concurrently`, as if there were no readers."""
    _replace("expired", "else 'concurrently' end", "else '' end")


def no_tombstones() -> None:
    """Changes from before a delete are replayed with their content."""
    _replace("number_events", "having bool_or(n.kind = 'delete')", "having bool_or(n.kind = 'lost')")


def memory_keeps_content() -> None:
    """Changes from before a delete are replayed with their content if they are in memory."""
    _put(log_cache.LogCache, "_hide", lambda *_: None)


def lossy_relay() -> None:
    """No safeguard is removed: of the messages about batches, one in ten is lost, and one in fifty arrives twice."""
    receive_batch = gateway.Members.receive_batch
    chance = random.Random(1)

    def mutated(self: gateway.Members, payload: bytes) -> None:
        share = chance.random()
        for _ in range(0 if share < 0.1 else 2 if share < 0.12 else 1):
            receive_batch(self, payload)

    _put(gateway.Members, "receive_batch", mutated)


def no_prev() -> None:
    """A gateway publishes a batch whatever it continues from."""
    fits = feed.Feed._fits

    def mutated(self: feed.Feed, batch: Any) -> bool:
        return fits(self, batch._replace(after=min(batch.after, self._live.position.seq)))

    _put(feed.Feed, "_fits", mutated)


def no_fill() -> None:
    """A gateway does not ask for what is missing before a batch."""
    publish_queued = feed.Feed._publish_queued

    async def mutated(self: feed.Feed) -> None:
        if self._queue and self._queue[0].after > self._live.position.seq:
            self._queue[0] = self._queue[0]._replace(after=self._live.position.seq)
        await publish_queued(self)

    _put(feed.Feed, "_publish_queued", mutated)


def _without(field: str) -> None:
    publish = feed.Feed._publish

    def mutated(self: feed.Feed, batch: Any) -> None:
        publish(self, batch._replace(**{field: ()}))

    _put(feed.Feed, "_publish", mutated)


def no_ends() -> None:
    """A gateway does not pass on which rights end."""
    _without("ends")


def no_gone() -> None:
    """A gateway does not pass on which rows are deleted."""
    _without("gone")


def no_resets() -> None:
    """A gateway does not pass on what resets topics."""
    publish = feed.Feed._publish

    def mutated(self: feed.Feed, batch: Any) -> None:
        publish(self, batch._replace(changes=[each for each in batch.changes if each.kind not in RESET_KINDS]))

    _put(feed.Feed, "_publish", mutated)


def nothing_is_missing() -> None:
    """Where a gateway should ask for what it did not hear, it takes it that nothing was written."""

    async def mutated(self: remote.RemoteLogReader, after: Position) -> tuple[Position, list[LogBatch]]:
        head = await self.head()
        is_behind = head.epoch == after.epoch and head.seq > after.seq
        return head, [LogBatch(head.epoch, after.seq, head.seq)] if is_behind else []

    _put(remote.RemoteLogReader, "batches", mutated)


def silence_is_proof() -> None:
    """A gateway that hears nothing takes it that nothing was written."""
    _put(feed.Feed, "age", property(lambda _: 0.0))


def freshness_from_the_clock() -> None:
    """How old the newest proof is that nothing is missing, a gateway reads from the wall clock."""
    _put(feed, "time", SimpleNamespace(monotonic=lambda: time.time()))  # noqa: PLW0108 - another one by then


def no_subscribe_again() -> None:
    """After a reconnect to NATS nothing is subscribed to."""
    use = link.Link._use

    async def mutated(self: link.Link, connection: Any) -> None:
        await use(self, connection)
        self._receivers = {}

    _put(link.Link, "_use", mutated)


def one_server() -> None:
    """Only one of several NATS servers is tried."""
    init = link.Link.__init__

    def mutated(self: link.Link, *arguments: Any) -> None:
        init(self, *arguments)
        self._urls = type(self._urls)([self._urls[0]])

    _put(link.Link, "__init__", mutated)


def no_silence_limit() -> None:
    """A gateway does not give up a connection to NATS over which beats come no more."""
    _put(gateway, "FRESH", 1e6)


def no_relay_pings() -> None:
    """NATS is not pinged."""
    from daemon.relay import connection  # noqa: PLC0415 - nats-py is an extra

    _put(connection, "PING_INTERVAL", 1_000_000)


def only_the_leader_beats() -> None:
    """Members that do not lead do not tell gateways how far they are."""

    async def mutated(self: publisher.Publisher) -> None:
        while True:
            await self._link.connected.wait()
            if self._is_leading():
                self._link.publish(publisher.BEAT, codec.BEAT.encode(self._beat()))
            await asyncio.sleep(publisher.BEAT_INTERVAL)

    _put(publisher.Publisher, "run", mutated)


def no_reset() -> None:
    """Where the log does not continue, the hub moves on and tells no client."""

    def mutated(self: hub.Hub, position: Position, reason: str) -> None:
        self.position = position

    _put(hub.Hub, "move", mutated)


def wild_clock() -> None:
    """No safeguard is removed: the wall clock jumps by up to an hour, back or forth, at each call."""
    real, real_ns = time.time, time.time_ns
    jumps = [0.0, 3000.0, -3000.0, 3600.0, -3599.0, 1.0, -1.0]
    calls = [0]

    def skew() -> float:
        calls[0] += 1
        return jumps[calls[0] % len(jumps)]

    time.time = lambda: real() + skew()
    time.time_ns = lambda: real_ns() + int(skew() * 1e9)


def session_ids_from_the_clock() -> None:
    """A session's id is the hour in which it began."""
    _put(client_connection, "ULID", lambda: int(time.time() / 3600))


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
        no_stored_snapshot,
        no_expiry,
        no_halving,
        no_look_at_the_log,
        no_backlog,
        short_timeouts,
        unlimited_permission_checks,
        leader_reads_the_log,
        lockstep_delivery,
        no_queue_usage_query,
        let_writers_notify,
        rights_at_subscribe,
        rights_without_a_start,
        no_revocation_during_replay,
        no_wait_for_catch_up,
        slow_reader,
        quick_pings,
        quick_relay_pings,
        no_pings,
        quick_drain,
        no_drain_limit,
        short_retention,
        plain_detach,
        no_tombstones,
        memory_keeps_content,
        lossy_relay,
        no_prev,
        no_fill,
        no_ends,
        no_gone,
        no_resets,
        nothing_is_missing,
        silence_is_proof,
        freshness_from_the_clock,
        no_subscribe_again,
        one_server,
        no_silence_limit,
        no_relay_pings,
        only_the_leader_beats,
        no_reset,
        wild_clock,
        session_ids_from_the_clock,
    )
}

if __name__ == "__main__":
    for _name in sys.argv.pop(1).split(","):
        MUTANTS[_name]()
    root.main()
