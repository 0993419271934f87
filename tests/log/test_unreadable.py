"""A change that cannot be read is set aside alone: everything before and after it is delivered."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import pytest

from daemon.core.change import Change, Kind, Right, Seq, Topic
from daemon.core.errors import LogUnavailable
from daemon.delivery.pack_router import PackRouter
from daemon.log.dead_letters import DeadLetters, Selection, find
from daemon.log.queries import query
from daemon.log.reader import PgLogReader
from daemon.packs import Pack, Row
from daemon.postgres import connect as opening
from daemon.postgres.connect import SESSION, Pool, acquired, connect, open_pool
from daemon.schema import migrate
from tests.support.log import leader, until_numbered
from tests.support.postgres import Server, ignore

TABLE = """
create schema app;
create table app.notes (id text primary key, room text not null, member text, note text not null);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id,room,note}',
                     revokes => $$jsonb_build_object('user', r.member, 'topic', 'room:' || r.room)$$);
"""
BAD = r"convert_from('\xe9', 'SQL_ASCII')"
A, B = Topic("room:a"), Topic("room:b")


class Note(Row):
    id: str
    room: str
    note: str


ROUTER = PackRouter({"app": Pack("app", {"notes": Note}, (r"room:\w+",))})


@pytest.fixture
async def dsn(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """A SQL_ASCII database, which takes bytes that no client can be sent. Daemons refuse to work with one."""
    monkeypatch.setattr(opening._Opening, "_check_server", lambda *_: None)
    # Numbering would set such events aside: here they are what no conversion foresaw.
    blind = query("number_events").replace("current_setting('server_encoding') <> 'UTF8'", "false")
    monkeypatch.setitem(query.statements, "number_events", blind)
    admin = await connect(postgres.embedded.dsn_for("postgres"), application_name="test")
    await admin.execute("create database ascii template template0 encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C'")
    try:
        dsn = postgres.embedded.dsn_for("ascii")
        await migrate.apply(dsn, [], report=ignore)
        yield dsn
    finally:
        await admin.execute("drop database ascii with (force)")
        await admin.close()


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[Pool]:
    pool = await open_pool(dsn, application_name="test", server_settings=SESSION, max_size=5)
    await pool.execute(TABLE)
    yield pool
    await pool.close()


Write = Callable[..., Awaitable[None]]


@pytest.fixture
def write(dsn: str, pool: Pool) -> Write:
    """Run each text in a transaction of its own, and wait until all events are numbered."""

    async def write(*transactions: str) -> None:
        async with leader(dsn, pool):
            for transaction in transactions:
                await pool.execute(transaction)
            await until_numbered(pool)

    return write


def note(number: int, room: str = "a", text: str = "'fine'") -> str:
    return f"insert into app.notes values ('{number}', '{room}', 'ada', {text});"


async def read_all(log: PgLogReader, limit: int) -> list[Change]:
    found: list[Change] = []
    while batch := await log.read(found[-1].seq if found else Seq(0), limit):
        found += batch
        if not batch.more:
            break
    return found


async def replay(log: PgLogReader, topics: Collection[Topic], upto: Seq, limit: int) -> list[Change]:
    found: list[Change] = []
    more = True
    while more:
        batch = await log.read_topics(topics, found[-1].seq if found else Seq(0), upto, limit)
        found += batch
        more = batch.more
    return found


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
async def test_changes_that_cannot_be_read_are_set_aside_alone_wherever_they_are(
    pool: Pool, write: Write, limit: int
) -> None:
    chance = random.Random(limit)
    bad = set(chance.sample(range(1, 41), 6)) | {1, 40}
    rows = [note(n, chance.choice("ab"), BAD if n in bad else "'fine'") for n in range(1, 41)]
    transactions, place = [], 0
    while place < len(rows):  # of one to five rows
        size = chance.randint(1, 5)
        transactions.append("".join(rows[place : place + size]))
        place += size
    await write(*transactions)
    log = PgLogReader(pool)
    changes = await read_all(log, limit)
    assert list(range(1, 41)) == [change.seq for change in changes]
    reasons = {change.key: change.unreadable for change in changes if change.kind is Kind.LIMIT or change.unreadable}
    assert {"{}": "CharacterNotInRepertoireError 22021"} == reasons
    assert len(bad) == sum(change.kind is Kind.LIMIT for change in changes)
    for topics in ([A], [B], [A, B]):
        expected = [(change.seq, change.kind) for change in changes if change.topic in topics]
        assert expected == [(change.seq, change.kind) for change in await replay(log, topics, changes[-1].seq, limit)]


async def test_an_unreadable_change_resets_its_topic_and_becomes_a_dead_letter_without_its_record(
    pool: Pool,
    write: Write,
) -> None:
    await write(note(1), note(2, "b", BAD), note(3))
    changes = await read_all(PgLogReader(pool), 1000)
    valid, invalid = ROUTER.validate(changes)
    assert [(1, A, Kind.INSERT), (2, B, Kind.LIMIT), (3, A, Kind.INSERT)] == [
        (change.seq, change.topic, change.kind) for change in valid
    ]
    for _ in range(2):  # every daemon stores it
        await DeadLetters(pool).store_dead_letters(invalid)
    async with acquired(pool, 10) as connection:
        [found] = await find(connection, Selection())
    assert (2, "room:b", "insert", "unreadable: CharacterNotInRepertoireError 22021") == (
        found["seq"],
        found["topic"],
        found["kind"],
        found["reason"],
    )


async def test_a_dead_letter_whose_record_cannot_be_stored_does_not_hold_up_the_others(
    pool: Pool,
    write: Write,
) -> None:
    await write(note(1), note(2, "a"), note(3))
    changes = await read_all(PgLogReader(pool), 1000)
    await pool.execute(
        """create function app.refuse() returns trigger language plpgsql as $$
           begin
               if new.seq = 2 and new.record is not null then raise exception sqlstate '54000'; end if;
               return new;
           end $$;
           create trigger refuse before insert on rowcast.dead_letters for each row execute function app.refuse()"""
    )
    await DeadLetters(pool).store_dead_letters([(change, "app", "a test") for change in changes])
    found = await pool.fetch("select seq, record is not null as whole from rowcast.dead_letters order by seq")
    assert [(1, True), (2, False), (3, True)] == [tuple(row) for row in found]


async def test_a_right_that_ends_with_an_unreadable_change_still_ends(
    pool: Pool,
    write: Write,
) -> None:
    await write(note(1, "a", BAD), "delete from app.notes")
    changes = await read_all(PgLogReader(pool), 1000)
    assert [(2, Right("ada", A))] == [(change.seq, change.ends) for change in changes if change.ends]
    await pool.execute(f"insert into app.notes values ('2' || {BAD}, 'a', 'bob', 'fine')")
    await write("delete from app.notes")
    deleted = (await read_all(PgLogReader(pool), 1000))[-1]
    assert (Kind.LIMIT, Right("bob", A)) == (deleted.kind, deleted.ends)


async def test_a_topic_that_cannot_be_read_resets_the_whole_pack_and_ends_every_right(
    pool: Pool,
    write: Write,
) -> None:
    await write(f"insert into app.notes values ('1', 'a' || {BAD}, 'ada', 'fine')", "delete from app.notes")
    changes = await read_all(PgLogReader(pool), 1000)
    assert [Topic("*app")] * 2 == [change.topic for change in changes]
    assert [Right(None, None)] == [change.ends for change in changes if change.ends]
    [end] = ROUTER.right_ends(ROUTER.ended_rights(changes))
    assert end.serves(A)


async def test_a_too_large_transaction_with_a_topic_that_cannot_be_read_resets_everything(
    pool: Pool,
    write: Write,
) -> None:
    bad = f"insert into app.notes values ('7', 'a' || {BAD}, 'ada', 'fine');"
    await write("".join(map(note, range(5))) + bad, note(9))
    changes = await read_all(PgLogReader(pool, transaction_changes=3), 1000)
    assert [("*", Kind.LIMIT), (A, Kind.INSERT)] == [(change.topic, change.kind) for change in changes]


async def test_a_kind_of_a_newer_schema_is_set_aside_like_what_cannot_be_read(
    pool: Pool,
    write: Write,
) -> None:
    await pool.execute("alter type rowcast.kind add value 'merge'")
    await write(note(1), note(2))
    await pool.execute("update rowcast.events set kind = 'merge' where key ->> 'id' = '1'")
    changes = await read_all(PgLogReader(pool), 1000)
    assert [(Kind.LIMIT, "kind: merge"), (Kind.INSERT, None)] == [
        (change.kind, change.unreadable) for change in changes
    ]


async def test_an_error_that_is_not_about_data_is_reported_and_sets_nothing_aside(
    pool: Pool,
    write: Write,
) -> None:
    await write(note(1))
    await pool.execute("alter view rowcast.changes rename to elsewhere")
    with pytest.raises(LogUnavailable, match="42P01"):
        await PgLogReader(pool).read(Seq(0), 1000)
