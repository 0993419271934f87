"""`daemon explain`: whether a user gets a topic, or one change of it, and if not, why not."""

import sys
from collections.abc import AsyncIterator
from typing import NamedTuple

import click

from daemon.core.change import CONTENT, RESET_KINDS, Change, Kind, Seq, Topic, can_be_named
from daemon.core.errors import GrantsUnavailable, LogUnavailable, LogUnreadable
from daemon.delivery.own_tables import pack_of
from daemon.delivery.pack_router import PackRouter
from daemon.log.grants import PgGrants
from daemon.log.own_tables import PgOwnTableReader
from daemon.log.reader import PgLogReader
from daemon.packs import by_schema
from daemon.postgres.connect import SESSION, open_pool
from daemon.settings import Settings

PENDING_TIMEOUT = 3.0  # seconds for the number of a right that was given just now


class Step(NamedTuple):
    """One thing that decides whether the user gets it. With `stops` the answer is no."""

    what: str
    text: str
    stops: bool = False


class Explainer:
    """Follows the way that a change takes to a client, and says at each step what happens."""

    def __init__(self, log: PgLogReader, grants: PgGrants, router: PackRouter) -> None:
        self._log = log
        self._grants = grants
        self._router = router

    async def steps(self, topic: Topic, user: str, seq: int | None) -> AsyncIterator[Step]:
        """The steps, in order. Raises LogUnavailable and GrantsUnavailable."""
        schema = self._router.schema_of(topic)
        if schema is None:
            why = "no configured pack or watched table has such a topic"
            if not can_be_named(topic):
                why = "no client can name such a topic"
            yield Step("topic", f"{why}: check its spelling, ROWCAST_PACKS, and `daemon watches`", stops=True)
            return
        pack = self._router.packs.get(schema)
        yield Step("topic", f"{f'the pack {pack.name}' if pack else 'a table without a pack'} serves {topic}")
        if seq is not None:
            async for step in self._of_change(topic, Seq(seq)):
                yield step
        yield await self._of_right(topic, user, seq)

    async def _of_right(self, topic: Topic, user: str, seq: int | None) -> Step:
        begun = await self._grants.readable_from(user, topic)
        if begun is None:
            return Step("right", f"may_read says that {user} may not read {topic} at present", stops=True)
        head = await self._log.head()
        since = f"since {head.epoch}:{begun}" if begun else "from before the log, or at all times"
        if seq is not None and seq < begun:
            return Step(
                "right",
                f"{user} may read {topic} {since}, which is after this change: a client that resumes from before "
                "gets a `reset` with the reason `rights`",
                stops=True,
            )
        return Step("right", f"{user} may read {topic} {since}; the log is at {head}")

    async def _of_change(self, topic: Topic, seq: Seq) -> AsyncIterator[Step]:
        head, floor = await self._log.head(), await self._log.floor()
        if seq > head.seq:
            yield Step(
                "log",
                f"no change has the number {seq} yet, the newest is {head.seq}: if a write is missing, see "
                "`daemon check` for its table, and `daemon status` for numbering",
                stops=True,
            )
            return
        if seq <= floor:
            yield Step("log", f"{seq} was dropped: the log begins after {floor} (ROWCAST_RETENTION)", stops=True)
            return
        found = await self._log.find(seq)
        if found is None:
            yield Step("log", f"no change has the number {seq}: numbers between two terms are left out", stops=True)
            return
        change, is_large = found
        table = f"{change.schema}.{change.table}"
        yield Step("log", f"{seq} is {_article(change.kind)} of {table} {change.key}, written at {change.at}")
        if change.topic != topic and change.kind not in RESET_KINDS:
            yield Step("log", f"it is in the topic {change.topic}, not in {topic}", stops=True)
            return
        for step in self._of_content(change, is_large=is_large):
            yield step

    def _of_content(self, change: Change, *, is_large: bool) -> list[Step]:
        if is_large:
            return [
                Step(
                    "size",
                    "its transaction is too large to send change by change: the topic gets a `reset` with the reason "
                    "`limit` (ROWCAST_TRANSACTION_CHANGES, ROWCAST_TRANSACTION_BYTES)",
                    stops=True,
                )
            ]
        if change.record is None and change.kind in CONTENT:
            return [
                Step("content", "its row was deleted since, or set aside, so its content is not sent any more", True)
            ]
        sendable, invalid = self._router.validate([change])
        if invalid:
            return [
                Step(
                    "model",
                    f"it must not be sent ({invalid[0].reason}), and became a dead letter: see `daemon dead-letters "
                    f"show {change.seq}`; its topic gets a `reset`",
                    stops=True,
                )
            ]
        if not sendable:
            return [Step("model", f"no configured pack lives in the schema {change.schema}", stops=True)]
        if change.kind in RESET_KINDS:
            return [Step("model", f"it is sent as a `reset` with the reason `{change.kind.value}`")]
        return [Step("model", "it fits its row model")]


def _article(kind: Kind) -> str:
    return f"{'an' if kind.value[0] in 'aeiou' else 'a'} {kind.value}"


async def explain(settings: Settings, topic: str, user: str, seq: int | None) -> None:
    """Print the steps and the answer; exit with 1 if it is no. Raises an OperatorFault."""
    pool = await open_pool(
        settings.require_dsn(),
        application_name="rowcast explain",
        server_settings=SESSION,
        target="primary",
        max_size=2,
        attempts=1,
    )
    router = PackRouter(by_schema(settings.schemas))
    log = PgLogReader(pool, settings.transaction_changes, settings.transaction_bytes)
    explainer = Explainer(log, PgGrants(pool, router.schema_of, router.own_table_of, wait=PENDING_TIMEOUT), router)
    stops = False
    try:
        own = await PgOwnTableReader(pool).read()
        router.own = {(table.schema, table.table): pack_of(table) for table in own}
        async for step in explainer.steps(Topic(topic), user, seq):
            click.echo(f"{'no' if step.stops else 'yes':4} {step.what:8} {step.text}")
            stops = stops or step.stops
    except (LogUnavailable, GrantsUnavailable) as error:
        raise LogUnreadable(error.reason) from None
    finally:
        pool.terminate()
    what = f"{topic} from now on" if seq is None else f"the change {seq}"
    click.echo(f"{user} {'does not get' if stops else 'gets'} {what}.")
    if stops:
        sys.exit(1)
