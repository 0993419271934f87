"""Events that cannot be numbered: they are set aside, and everything else flows in order."""

import asyncio
import json
import logging
import random
import secrets
from collections.abc import Sequence
from uuid import uuid4

import asyncpg
import pytest

from daemon.core.change import Change, Kind, Right, Seq
from daemon.log.reader import PgLogReader
from daemon.log.retention import PURGE_ROWS
from daemon.log.set_aside import set_aside_events
from daemon.postgres.connect import Connection, Pool, connect, open_pool
from daemon.schema import migrate
from tests.support.log import ROWS, leader, until_numbered
from tests.support.postgres import Server

LONG = "(select string_agg(md5(random()::text), '') from generate_series(1, 200))"
INSERT = "insert into rowcast.events (watch, topic, kind, key, record, revokes, grants) select w.id,"
UPDATE = "update app.rows set version = version + 1 where id = "

BROKEN = {
    "a grant to 6,400 random characters": (
        f"'row:1', 'insert', '{{\"id\": 1}}', '{{}}', null, jsonb_build_object('user', {LONG})"
    ),
    "a deletion of a key of 6,400 random characters": (
        f"'row:1', 'delete', json_build_object('id', {LONG}), null, '{{\"user\": \"ada\"}}', null"
    ),
}


async def everything(pool: Pool) -> Sequence[Change]:
    return await PgLogReader(pool).read(Seq(0), 10_000)


async def insert(sql: Connection, values: str) -> None:
    await sql.execute(f"{INSERT} {values} from rowcast.watched as w where w.schema_name = 'app'")


async def dead_letters(pool: Pool) -> list[dict[str, object]]:
    """The dead letters, once no other waits to be stored."""
    while await pool.fetchval("select exists (select from rowcast.set_aside)"):
        pass
    return [dict(row) for row in await pool.fetch("select * from rowcast.dead_letters order by seq")]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("broken", BROKEN)
async def test_one_event_that_cannot_be_numbered_stops_nobody(
    database: str, pool: Pool, sql: Connection, broken: str
) -> None:
    async with leader(database, pool, max_offered=100):
        async with sql.transaction():
            await sql.execute(UPDATE + "1")
            await insert(sql, BROKEN[broken])
            await sql.execute(UPDATE + "2")
        await sql.execute(UPDATE + "3")
        await until_numbered(pool)
        [letter] = await dead_letters(pool)
    one, *others = await everything(pool)
    [limit] = [change for change in (one, *others) if change.kind is Kind.LIMIT]
    assert {"row:1", "row:2", "row:3"} == {change.topic for change in (one, *others) if change is not limit}
    assert ("{}", None) == (limit.key, limit.record)
    assert ("*app" if "grant" in broken else "row:1") == limit.topic
    assert (Right("ada", None) if "deletion" in broken else None) == limit.ends
    assert (limit.seq, "rows", "cannot be numbered: ProgramLimitExceededError 54000") == (
        letter["seq"],
        letter["table_name"],
        letter["reason"],
    )
    if "grant" in broken:  # fail closed: nobody reads from before it without a reset
        [grant] = await pool.fetch("select * from rowcast.grants")
        assert (None, None) == (grant["user_id"], grant["topic"])


@pytest.mark.usefixtures("rows")
async def test_many_broken_events_among_others_are_found_and_order_is_kept(
    database: str, pool: Pool, sql: Connection
) -> None:
    seed = random.randrange(2**32)
    logging.getLogger("test").info("seed %d", seed)  # shown when the test fails
    chance, expected = random.Random(seed), list[str]()
    for _ in range(12):
        async with sql.transaction():
            for _ in range(chance.randint(1, 6)):
                if chance.random() < 0.2:
                    await insert(sql, BROKEN["a grant to 6,400 random characters"])
                    expected.append("*app")
                else:
                    row = chance.randint(1, 8)
                    await sql.execute(f"{UPDATE}{row}")
                    expected.append(f"row:{row}")
    async with leader(database, pool, killed=True):  # a change of leader loses nothing of it
        await until_numbered(pool)
    async with leader(database, pool):
        assert expected.count("*app") == len(await dead_letters(pool))
    changes = await everything(pool)
    assert sorted(expected) == sorted(change.topic for change in changes)
    versions: dict[str, list[int]] = {}
    for change in changes:
        if change.record:
            versions.setdefault(change.topic, []).append(json.loads(change.record)["version"])
    assert versions == {topic: sorted(history) for topic, history in versions.items()}


@pytest.mark.usefixtures("rows")
async def test_the_content_of_a_row_whose_deletion_is_set_aside_is_removed(
    database: str, pool: Pool, sql: Connection
) -> None:
    key = json.dumps({"id": secrets.token_hex(3000)})
    async with leader(database, pool):
        await insert(sql, f"'row:1', 'leave', '{key}', null, null, null")
        await sql.execute("update rowcast.events set record = '{\"secret\": 1}' where key::text = $1", key)
        await until_numbered(pool)
        async with sql.transaction():
            await insert(sql, f"'row:1', 'insert', '{key}', '{{\"secret\": 2}}', null, null")
            await insert(sql, f"'row:1', 'delete', '{key}', null, null, null")
        await until_numbered(pool)
        assert 1 == len(await dead_letters(pool))
    assert 0 == await pool.fetchval("select count(*) from rowcast.events where record::text like '%secret%'")
    assert PURGE_ROWS > 0


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("fault", "sqlstate"),
    [
        ("alter table rowcast.log add constraint never check (seq < 0) not valid", "23514"),
        ("alter table rowcast.log rename column topic to subject", "42703"),
        (
            "create function app.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$;"
            " create trigger refuse before insert on rowcast.log for each row execute function app.refuse()",
            "P0001",
        ),
    ],
)
async def test_a_fault_of_the_database_sets_no_event_aside(
    database: str, pool: Pool, sql: Connection, fault: str, sqlstate: str
) -> None:
    await sql.execute(fault)
    await sql.execute(UPDATE + "1")
    async with leader(database, pool, leads=False) as sequencer:
        while sqlstate not in sequencer.failure:
            await asyncio.sleep(0.01)
    assert 0 == await pool.fetchval("select count(*) from rowcast.set_aside")
    assert ["update"] == [row["kind"] for row in await pool.fetch("select kind::text from rowcast.events")]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("failures", range(1, 9))
async def test_a_fault_that_ends_during_the_search_is_blamed_on_no_event(
    pool: Pool, sql: Connection, failures: int
) -> None:
    """A role loses a right and gets it back: each number of attempts in between, of those that a search makes."""
    for row in range(1, 5):
        await sql.execute(f"{UPDATE}{row}")
    events = await sql.fetch("select e.xid::text, e.id from rowcast.events as e")
    attempts = 0

    async def attempt(ids: Sequence[int]) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= failures:
            raise missing

    missing = asyncpg.InsufficientPrivilegeError("permission denied for table log")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await set_aside_events(sql, events, attempt, uuid4(), 0, missing)
    assert 0 == await pool.fetchval("select count(*) from rowcast.set_aside")


@pytest.mark.parametrize("max_offered", [0, 100])
async def test_bytes_that_are_no_text_stop_nobody(postgres: Server, max_offered: int) -> None:
    """A byte that an encoding leaves undefined can be stored, but has no equivalent in UTF-8."""
    async with postgres.database(options="encoding 'win1252' lc_collate 'C' lc_ctype 'C'") as dsn:
        await migrate.apply(dsn, ["chatgenius"], report=lambda _: None)
        sql = await connect(dsn, application_name="test")
        pool = await open_pool(dsn, application_name="test")
        await sql.execute(ROWS)
        async with leader(dsn, pool, max_offered=max_offered):
            await sql.execute(UPDATE + "1")
            broken = "convert_from('\\x228122', 'WIN1252')"
            await insert(sql, f"'row:1', 'update', ('{{\"id\":' || {broken} || '}}')::json, '{{}}', null, null")
            await insert(sql, f"'row:2', 'update', '{{\"id\": 2}}', ({broken})::json, null, null")
            await insert(sql, f"{broken}, 'update', '{{\"id\": 4}}', '{{}}', null, null")
            await sql.execute(UPDATE + "3")
            await until_numbered(pool)
            assert ["22P05"] * 3 == [str(letter["reason"])[-5:] for letter in await dead_letters(pool)]
        assert ["row:1", "row:1", "row:2", "*app", "row:3"] == [change.topic for change in await everything(pool)]
        await sql.close()
        await pool.close()
