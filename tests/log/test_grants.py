"""From which position in the log a user may read a topic."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from daemon.core.change import Seq, Topic
from daemon.core.errors import GrantsUnavailable
from daemon.log.grants import MAX_CONCURRENT_QUERIES, MAX_KIND_QUERIES, PgGrants
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool, open_pool
from tests.support.log import leader, until_numbered

ADA, BOB, ROOM = (f"01HZZZZZZZZZZZZZZZZZZZZZZ{letter}" for letter in "ABC")
TOPIC = Topic(f"channel:{ROOM}")


@pytest.fixture
async def pool(database: str, sql: Connection) -> AsyncIterator[Pool]:
    await sql.execute(f"""
        insert into chatgenius.users (id, username, email, auth0_id)
        values ('{ADA}', 'ada', 'ada@example.com', 'a|1'), ('{BOB}', 'bob', 'bob@example.com', 'a|2');
        insert into chatgenius.channels (id, name) values ('{ROOM}', 'room');
        insert into chatgenius.channel_members (channel_id, user_id) values ('{ROOM}', '{ADA}');
    """)
    pool = await open_pool(database, application_name="test", max_size=5)
    yield pool
    await pool.close()


def grants(pool: Pool, wait: float = 60.0) -> PgGrants:
    return PgGrants(pool, lambda _: "chatgenius", wait=wait)


async def join(sql: Connection) -> None:
    await sql.execute(f"insert into chatgenius.channel_members (channel_id, user_id) values ('{ROOM}', '{BOB}')")


async def test_a_right_begins_with_the_change_that_gave_it(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
        assert await grants(pool).readable_from(BOB, TOPIC) is None
        head = (await PgLogReader(pool).head()).seq
        await join(sql)
        assert head + 1 == await grants(pool).readable_from(BOB, TOPIC)


async def test_a_right_given_several_times_begins_where_it_was_last_given(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        member = await grants(pool).readable_from(ADA, TOPIC)
        for deleted_at in ("now()", "null"):
            await sql.execute(f"update chatgenius.channels set deleted_at = {deleted_at}")
        channel = await grants(pool).readable_from(ADA, TOPIC)
        for deleted_at in ("now()", "null"):
            await sql.execute(f"update chatgenius.users set deleted_at = {deleted_at} where id = '{ADA}'")
        user = await grants(pool).readable_from(ADA, TOPIC)
        assert await grants(pool).readable_from(ADA, Topic("users")) == user
    assert member is not None
    assert channel is not None
    assert user is not None
    assert member < channel < user


async def test_a_right_from_before_the_log_begins_at_zero(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute("truncate rowcast.events")
    async with leader(database, pool):
        assert Seq(0) == await grants(pool).readable_from(ADA, TOPIC)


async def test_a_right_that_has_no_number_yet_is_waited_for(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    while await sql.fetchval("select exists (select from pg_stat_activity where application_name = 'sequencer')"):
        await asyncio.sleep(0)  # its last statement may still be running
    await join(sql)
    with pytest.raises(GrantsUnavailable):
        await grants(pool, wait=0.01).readable_from(BOB, TOPIC)
    assert await grants(pool, wait=0.01).readable_from(ADA, TOPIC) is not None  # other lookups do not wait
    lookup = asyncio.create_task(grants(pool).readable_from(BOB, TOPIC))
    async with leader(database, pool):
        begun = await lookup
    [joined] = [
        change for change in await PgLogReader(pool).read(Seq(0), 100) if BOB in change.key and change.topic == TOPIC
    ]
    assert joined.seq == begun


async def test_rights_given_by_rows_of_another_pack_do_not_count(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute(f"""
        create schema app;
        create table app.seats (id integer primary key, user_id text);
        select rowcast.watch('app.seats', $$'seats'$$, '{{id}}',
                             revokes => $$jsonb_build_object('user', r.user_id)$$);
        insert into app.seats values (1, '{ADA}');
    """)
    async with leader(database, pool):
        await until_numbered(pool)
        head = (await PgLogReader(pool).head()).seq
        begun = await grants(pool).readable_from(ADA, TOPIC)
    assert begun is not None
    assert begun < head


async def test_a_right_of_everybody_to_everything_counts_for_each_user_and_topic(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute("""
        create table chatgenius.open_days (id integer primary key);
        select rowcast.watch('chatgenius.open_days', $$'open_days'$$, '{id}', revokes => $$'{}'::jsonb$$);
    """)
    async with leader(database, pool):
        await until_numbered(pool)
        before = await grants(pool).readable_from(ADA, TOPIC)
        head = (await PgLogReader(pool).head()).seq
        await sql.execute("insert into chatgenius.open_days values (1)")
        begun = [await grants(pool).readable_from(ADA, topic) for topic in (TOPIC, Topic("users"))]
    assert before is not None
    assert before <= head
    assert [head + 1, head + 1] == begun


OTHER = Topic("channel:01HZZZZZZZZZZZZZZZZZZZZZZD")


async def test_many_lookups_take_few_statements_and_each_gets_its_own_answer(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    await sql.execute("""
        create table public.calls (backend integer, at timestamptz);
        create table public.allowed (a text, b text);
        create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
        language plpgsql as $$
        begin
            insert into public.calls values (pg_backend_pid(), statement_timestamp());
            return $1 || $2 in (select a || b from public.allowed);
        end $$;
    """)
    await sql.executemany(
        "insert into public.allowed values ($1, $2)", [(ADA, TOPIC), (ADA, "users"), (BOB, f"user:{BOB}")]
    )
    shared = grants(pool)
    crowd = [(ADA, TOPIC), (BOB, TOPIC), (ADA, Topic("users")), (ADA, OTHER), (BOB, Topic(f"user:{BOB}"))] * 100
    begun = await asyncio.gather(*(shared.readable_from(*lookup) for lookup in crowd))
    one_by_one = {lookup: await shared.readable_from(*lookup) for lookup in set(crowd)}
    assert [one_by_one[lookup] for lookup in crowd] == begun
    assert [True, False, True, False, True] == [found is not None for found in begun[:5]]
    calls = await sql.fetchval("select count(*) from public.calls")
    statements = await sql.fetchval("select count(distinct (backend, at)) from public.calls")
    assert len(crowd) + 5 == calls
    assert statements <= 2 * MAX_CONCURRENT_QUERIES + 5 + 5


async def test_a_lookup_that_fails_does_not_fail_others_of_the_same_batch(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    await sql.execute(f"""
        create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
        language plpgsql as $$
        begin
            if $2 = 'users' then raise exception 'a fault of the pack'; end if;
            return $2 = '{TOPIC}';
        end $$;
    """)
    shared = grants(pool)
    crowd = [TOPIC, Topic("users"), OTHER] * 50
    answers = await asyncio.gather(*(shared.readable_from(ADA, topic) for topic in crowd), return_exceptions=True)
    for topic, answer in zip(crowd, answers, strict=True):
        match topic:
            case "users":
                assert isinstance(answer, GrantsUnavailable)
            case _:
                assert (topic == TOPIC) == isinstance(answer, int)
                assert (topic == OTHER) == (answer is None)


async def test_cancelled_lookups_do_not_affect_the_others(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    shared = grants(pool)
    crowd = [asyncio.create_task(shared.readable_from(ADA, TOPIC)) for _ in range(40)]
    await asyncio.sleep(0)  # all lookups have begun
    for task in crowd[::2]:
        task.cancel()
    answers = await asyncio.gather(*crowd, return_exceptions=True)
    assert {asyncio.CancelledError} == {type(answer) for answer in answers[::2]}
    assert {int} == {type(answer) for answer in answers[1::2]}


async def until_asked(sql: Connection) -> None:
    """Wait until a statement asks for rights."""
    running = """
        select exists (
            select from pg_stat_activity
            where state = 'active' and query like '%may_read%' and pid <> pg_backend_pid()
        )"""
    while not await sql.fetchval(running):
        await asyncio.sleep(0.01)


async def test_a_right_that_cannot_be_worked_out_is_reported_with_its_table(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    await sql.execute("""
        create schema app;
        create table app.rooms (id integer primary key);
        create table app.gone (topic text);
        grant usage on schema app to rowcast_capture;
        grant select on app.gone to rowcast_capture;
        create function app.may(user_id text, topic text) returns boolean language plpgsql as $$
        begin return exists (select from app.gone as g where g.topic = $2); end $$;
        select rowcast.serve('app.rooms', $$'rooms:' || r.id$$, 'app.may(user_id, topic)');
        drop table app.gone;
    """)
    shared = PgGrants(pool, lambda _: "rowcast", lambda _: "app.rooms")
    with pytest.raises(GrantsUnavailable, match=r"rights of app\.rooms: UndefinedTableError 42P01"):
        await shared.readable_from(ADA, Topic("rooms:1"))


async def test_a_slow_right_of_an_own_table_ends_and_keeps_only_its_own_table_waiting(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    await sql.execute("""
        create schema app;
        create table app.slow (id integer primary key);
        create table app.fast (id integer primary key);
        create table app.hanging (held boolean);
        insert into app.hanging values (true);
        grant usage on schema app to rowcast_capture;
        grant select on app.hanging to rowcast_capture;
        create function app.waits(topic text) returns boolean language plpgsql as $$
        begin
            while topic = 'slow:x' and (select h.held from app.hanging as h) loop perform pg_sleep(0.01); end loop;
            return true;
        end $$;
        select rowcast.serve('app.slow', $$'slow:' || r.id$$, 'app.waits(topic)');
        select rowcast.serve('app.fast', $$'fast:' || r.id$$, 'true');
    """)
    own = {"slow": "app.slow", "fast": "app.fast"}
    shared = PgGrants(pool, lambda _: "rowcast", lambda topic: own[topic.partition(":")[0]])
    first = asyncio.create_task(shared.readable_from(ADA, Topic("slow:x")))
    await until_asked(sql)
    crowd = [asyncio.create_task(shared.readable_from(ADA, Topic(f"slow:{x}"))) for x in "xy" * 5]
    async with asyncio.timeout(3):  # before the first ends
        assert Seq(0) == await shared.readable_from(ADA, Topic("fast:1"))
    assert not any(lookup.done() for lookup in (first, *crowd))
    with pytest.raises(GrantsUnavailable, match="57014"):
        await first
    await sql.execute("update app.hanging set held = false")
    assert [Seq(0)] * 10 == await asyncio.gather(*crowd)


async def test_a_table_that_is_locked_keeps_only_those_waiting_who_ask_for_topics_that_need_it(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    shared = grants(pool)
    holder = await asyncpg.connect(database)
    await holder.execute("begin; lock table chatgenius.channel_members in access exclusive mode")
    crowd = [asyncio.create_task(shared.readable_from(ADA, TOPIC))]
    while MAX_KIND_QUERIES > await sql.fetchval(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%may_read%'"
    ):
        crowd.append(asyncio.create_task(shared.readable_from(ADA, TOPIC)))
        await asyncio.sleep(0.01)
    for topic in ("users", f"user:{ADA}"):
        assert await shared.readable_from(ADA, Topic(topic)) is not None
    assert not any(lookup.done() for lookup in crowd)
    await holder.execute("rollback")
    await holder.close()
    assert None not in await asyncio.gather(*crowd)


async def test_lookups_behind_one_that_takes_long_get_a_statement_beside_it(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await until_numbered(pool)
    await sql.execute("""
        create table public.held (topic text);
        create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
        language plpgsql as $$
        begin
            while exists (select from public.held as h where h.topic = $2) loop perform pg_sleep(0.01); end loop;
            return true;
        end $$;
    """)
    await sql.execute("insert into public.held values ($1)", TOPIC)
    shared = grants(pool)
    slow = asyncio.create_task(shared.readable_from(ADA, TOPIC))
    await until_asked(sql)
    async with asyncio.timeout(5):
        await asyncio.gather(*(shared.readable_from(ADA, OTHER) for _ in range(10)))
    assert not slow.done()
    await sql.execute("delete from public.held")
    assert await slow is not None
