"""From an INSERT to the frame that a client receives: a real daemon, a real Postgres, a real websocket."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, Frame, daemon_process
from tests.support.postgres import Server


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module")
async def daemon(database: str) -> AsyncIterator[Daemon]:
    async with daemon_process(database) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


def kinds(changes: list[Frame]) -> list[tuple[str, str]]:
    return [(change["table"], change["kind"]) for change in changes]


async def test_a_message_reaches_a_member_who_follows_its_channel(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        assert "subscribed" == (await client.subscribe(chat.topic, id=7))["op"]
        message = await chat.say("hello")
        [change] = await client.changes()
    assert ("messages", "insert", {"id": message}) == (change["table"], change["kind"], change["key"])
    assert {"id", "channel_id", "user_id", "content", "metadata", "created_at", "updated_at"} == set(change["record"])
    assert "hello" == change["record"]["content"]


async def test_every_change_of_a_message_is_delivered_in_order(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        message = await chat.say("hello")
        [insert] = await client.changes()
        changes = []
        for statement in (
            "update chatgenius.messages set content = 'edited' where id = $1",
            "update chatgenius.messages set deleted_at = now() where id = $1",
            "update chatgenius.messages set content = 'unseen', deleted_at = null where id = $1",
            "delete from chatgenius.messages where id = $1",
        ):
            await chat.sql.execute(statement, message)
            changes += await client.changes()  # read before the next deletion hides the content
        update, soft_delete, restore, delete = changes
    assert ["insert", "update", "delete", "restore", "delete"] == [
        change["kind"] for change in (insert, update, soft_delete, restore, delete)
    ]
    assert ["content", "updated_at"] == update["changed"]
    assert "edited" == update["record"]["content"]
    assert {"id": message} == soft_delete["key"]
    assert "record" not in soft_delete
    assert "unseen" == restore["record"]["content"]
    assert "record" not in delete


async def test_a_message_that_moves_leaves_one_channel_and_enters_the_other(daemon: Daemon, chat: Chat) -> None:
    message = await chat.say("hello")
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as here, daemon.client(chat.ada) as there:
        await here.subscribe(chat.topic)
        await there.subscribe(f"channel:{chat.other}")
        await chat.sql.execute("update chatgenius.messages set channel_id = $1", chat.other)
        [left], [entered] = await here.changes(), await there.changes()
    assert ("delete", True, {"id": message}) == (left["kind"], left["left"], left["key"])
    assert ("insert", "hello") == (entered["kind"], entered["record"]["content"])


async def test_everything_that_belongs_to_a_channel_is_published_in_its_topic(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        message = await chat.say("hello")
        await chat.sql.execute(
            "insert into chatgenius.reactions (message_id, user_id, emoji) values ($1, $2, '+1')", message, chat.ada
        )
        await chat.sql.execute(
            "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', 1, 'u')", message
        )
        await chat.sql.execute("insert into chatgenius.message_reads values ($1, $2)", message, chat.ada)
        await chat.sql.execute("insert into chatgenius.channel_members values ($1, $2)", chat.channel, chat.bob)
        await chat.sql.execute("update chatgenius.channels set name = 'renamed' where id = $1", chat.channel)
        assert [
            ("messages", "insert"),
            ("reactions", "insert"),
            ("files", "insert"),
            ("message_reads", "insert"),
            ("channel_members", "insert"),
            ("channels", "update"),
        ] == kinds(await client.changes(6))
        await chat.sql.execute("delete from chatgenius.messages where id = $1", message)
        gone = await client.changes(4)
    assert [("files", True), ("message_reads", False), ("messages", False), ("reactions", False)] == sorted(
        (change["table"], change.get("left", False)) for change in gone
    )
    assert "messages" == gone[-1]["table"]


async def test_users_and_their_own_rows_are_published_without_personal_data(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe("users")
        await client.subscribe(f"user:{chat.ada}")
        await chat.sql.execute(
            "update chatgenius.users set full_name = 'Ada L.', email = 'new@example.com' where id = $1", chat.ada
        )
        await chat.sql.execute("insert into chatgenius.user_status (user_id, status) values ($1, 'online')", chat.ada)
        await chat.sql.execute("insert into chatgenius.user_settings (user_id) values ($1)", chat.ada)
        await chat.sql.execute("insert into chatgenius.sync_state (user_id, sync_type) values ($1, 'full')", chat.ada)
        await chat.sql.execute("delete from chatgenius.channel_members where channel_id = $1", chat.other)
        changes = await client.changes(5)
    assert [
        ("users", "update"),
        ("user_status", "insert"),
        ("user_settings", "insert"),
        ("sync_state", "insert"),
        ("channel_members", "delete"),
    ] == kinds(changes)
    assert "example.com" not in json.dumps(changes)
    assert "auth0" not in json.dumps(changes)


async def test_a_message_of_a_megabyte_arrives_whole(daemon: Daemon, chat: Chat) -> None:
    content = "€uro " * 200_000
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.say(content)
        [change] = await client.changes()
    assert content == change["record"]["content"]


async def test_an_update_of_ten_thousand_rows_is_ten_thousand_changes_in_one_frame(
    daemon: Daemon, chat: Chat
) -> None:
    await chat.sql.execute(
        """insert into chatgenius.messages (channel_id, user_id, content)
           select $1, $2, n::text from generate_series(1, 10000) as n""",
        chat.channel,
        chat.ada,
    )
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.sql.execute("update chatgenius.messages set content = content || '!'")
        frame = await client.next()
        while frame["changes"][0]["kind"] == "insert":  # earlier changes may still arrive
            frame = await client.next()
    assert 10_000 == len({change["key"]["id"] for change in frame["changes"]})
    assert {"update"} == {change["kind"] for change in frame["changes"]}
    assert 1 == len({change["tx"] for change in frame["changes"]})


async def test_all_changes_of_a_transaction_in_a_topic_are_one_frame_that_names_it(
    daemon: Daemon, chat: Chat
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await client.subscribe(f"channel:{chat.other}")
        async with chat.sql.transaction():
            tx = await chat.sql.fetchval("select pg_current_xact_id()::text")
            for content in "abc":
                await chat.say(content)
                await chat.say(content, chat.other)
        one, two = await client.next(), await client.next()
    assert [["a", "b", "c"]] * 2 == [[c["record"]["content"] for c in frame["changes"]] for frame in (one, two)]
    assert {tx} == {change["tx"] for frame in (one, two) for change in frame["changes"]}


async def test_a_write_right_after_subscribing_arrives(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        for attempt in range(20):
            await client.subscribe(chat.topic)
            await chat.say(str(attempt))
            [change] = await client.changes()
            assert str(attempt) == change["record"]["content"]
            await client.say(op="unsubscribe", topic=chat.topic)
            assert "unsubscribed" == (await client.next())["op"]


async def test_writes_while_a_client_is_offline_are_replayed_once_before_it_is_live(
    daemon: Daemon, chat: Chat
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.say("before")
        since = (await client.until("changes"))[-1]["pos"]
        for content in ("one", "two", "three"):
            await chat.say(content)
        await client.changes(3)  # the daemon has read them: from here on only a replay can deliver them
    async with daemon.client(chat.ada, since=since) as client:
        assert since == (await client.subscribe(chat.topic))["pos"]
        frames = await client.until("resumed")
        await chat.say("after")
        [live] = await client.changes()
    replayed = [change for frame in frames[:-1] for change in frame["changes"]]
    assert ["one", "two", "three"] == [change["record"]["content"] for change in replayed]
    assert (3, live["seq"] - 1) == (frames[-1]["replayed"], int(frames[-1]["pos"].rpartition(":")[2]))
    assert "after" == live["record"]["content"]
    assert sorted({change["seq"] for change in [*replayed, live]}) == [change["seq"] for change in [*replayed, live]]


async def test_a_replay_larger_than_the_clients_queue_arrives_whole(chat: Chat, database: str) -> None:
    async with daemon_process(database, environment={"ROWCAST_QUEUE_BYTES": "100000"}) as daemon:
        async with daemon.client(chat.ada) as client:
            start = client.welcome["pos"]
            for number in range(100):
                await chat.say(f"{number} " + "x" * 30_000)
            await chat.settled(daemon)
        async with daemon.client(chat.ada, since=start) as client:
            await client.subscribe(chat.topic)
            frames = await client.until("resumed")
    contents = [change["record"]["content"].split()[0] for frame in frames[:-1] for change in frame["changes"]]
    assert [*map(str, range(100))] == contents


async def test_resuming_from_the_position_of_any_live_frame_restores_all_topics(daemon: Daemon, chat: Chat) -> None:
    topics = [chat.topic, f"channel:{chat.other}"]
    async with daemon.client(chat.ada) as client:
        for topic in topics:
            await client.subscribe(topic)
        async with chat.sql.transaction():
            for content in ("a", "b"):
                await chat.say(content)
                await chat.say(content, chat.other)
        await chat.say("c")
        frames: list[Frame] = []
        while sum(len(frame["changes"]) for frame in frames) < 5:
            frames.append(await client.next())
    for place, frame in enumerate(frames):
        rest = [change["seq"] for later in frames[place + 1 :] for change in later["changes"]]
        assert rest == await _replayed(daemon, chat, topics, frame["pos"])


async def _replayed(daemon: Daemon, chat: Chat, topics: list[str], since: str) -> list[int]:
    """The numbers of the changes that a client receives when it resumes from this position."""
    received: list[int] = []
    async with daemon.client(chat.ada, since=since) as client:
        for topic in topics:
            await client.say(op="subscribe", topic=topic)
            for frame in await client.until("resumed"):
                received += [change["seq"] for change in frame.get("changes", ())]
    return sorted(received)


async def test_replay_and_live_stream_join_without_gap_or_repeat_during_writes(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        start = client.welcome["pos"]
    writing = asyncio.Event()

    async def write() -> None:
        for number in range(300):
            await chat.say(str(number))
            if number == 50:
                writing.set()

    writer = asyncio.create_task(write())
    await writing.wait()
    async with daemon.client(chat.ada, since=start) as client:
        await client.subscribe(chat.topic)
        received: list[str] = []
        while len(received) < 300:
            frame = await client.next()
            if frame["op"] == "changes":
                received += [change["record"]["content"] for change in frame["changes"]]
    await writer
    assert [str(number) for number in range(300)] == received


async def test_two_clients_with_different_rights_receive_different_changes(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as ada, daemon.client(chat.bob) as bob:
        assert "subscribed" == (await ada.subscribe(chat.topic))["op"]
        assert "no_such_topic" == (await bob.subscribe(chat.topic, id=1))["code"]
        assert "subscribed" == (await bob.subscribe("users"))["op"]
        await chat.say("for members only")
        await chat.sql.execute("update chatgenius.users set full_name = 'Bob' where id = $1", chat.bob)
        assert [("messages", "insert")] == kinds(await ada.changes())
        assert [("users", "update")] == kinds(await bob.changes())


async def test_a_forbidden_topic_and_one_that_does_not_exist_get_the_same_answer(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.bob) as bob:
        answers = [
            await bob.subscribe(topic, id=1)
            for topic in (
                chat.topic,
                "channel:01ARZ3NDEKTSV4RRFFQ69G5FAV",
                f"user:{chat.ada}",
                "no:such:thing",
                "rowcast",
            )
        ]
    assert 1 == len({json.dumps(answer) for answer in answers})
    assert "no_such_topic" == answers[0]["code"]


async def test_truncating_a_table_resets_its_topics(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        start = client.welcome["pos"]
        await chat.sql.execute("truncate chatgenius.messages cascade")
        reset = await client.next()
        assert ("reset", "truncate", chat.topic) == (reset["op"], reset["reason"], reset["topic"])
    async with daemon.client(chat.ada, since=start) as client:
        await client.subscribe(chat.topic)
        assert "truncate" == (await client.next())["reason"]


async def test_a_position_of_another_epoch_or_beyond_the_head_is_reset(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        epoch, _, seq = client.welcome["pos"].rpartition(":")
    for since, reason in ((f"elsewhere:{seq}", "epoch"), (f"{epoch}:{int(seq) + 1000}", "epoch")):
        async with daemon.client(chat.ada, since=since) as client:
            await client.subscribe(chat.topic)
            assert reason == (await client.next())["reason"]
            await chat.say("live")
            assert "live" == (await client.changes())[0]["record"]["content"]


def said(frames: list[Frame]) -> list[tuple[str, object]]:
    """What frames say, whichever changes each of them holds."""
    found: list[tuple[str, object]] = []
    for frame in frames:
        if frame["op"] == "changes":
            found += [("change", change) for change in frame["changes"]]
        else:
            found.append((frame["op"], (frame["reason"], frame["pos"])))
    return found


async def test_an_invalid_change_becomes_a_dead_letter_and_a_reset_of_its_topic_live_and_in_a_replay(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    # The table's own check would refuse such a row.
    await chat.sql.execute("alter table chatgenius.files drop constraint if exists files_size_not_negative")
    async with daemon.client(chat.ada) as client:
        subscribed = await client.subscribe(chat.topic)
        async with chat.sql.transaction():
            message = await chat.say("before")
            await chat.sql.execute(
                """insert into chatgenius.files (message_id, name, type, size, url)
                   values ($1, 'n', 't', -1, 'secret-url')""",
                message,
            )
            await chat.say("after")
        frames = [await client.next() for _ in range(3)]
        assert ["before", "after"] == [frames[place]["changes"][0]["record"]["content"] for place in (0, 2)]
        assert {"op": "reset", "topic": chat.topic, "reason": "invalid", "pos": frames[2]["prev"]} == frames[1]
        await chat.say("the dead letter is stored before anything later is read")
        later = [await client.next()]
    async with daemon.client(chat.ada, since=subscribed["pos"]) as client:  # from the cache
        await client.subscribe(chat.topic)
        assert said(frames + later) == said((await client.until("resumed"))[:-1])
    async with daemon_process(database) as another, another.client(chat.ada, since=subscribed["pos"]) as client:
        await client.subscribe(chat.topic)  # from the log
        assert said(frames + later) == said((await client.until("resumed"))[:-1])
    dead_letter = await chat.sql.fetchrow(
        "select pack, table_name, reason, record->>'size' as size from rowcast.dead_letters"
    )
    assert ("chatgenius", "files", "record: greater_than_equal size", "-1") == tuple(dead_letter or ())
    [logged] = [line for line in daemon.events() if line["event"] == "change_invalid"]
    assert ("files", "error") == (logged["data"]["table"], logged["level"])
    assert "secret-url" not in daemon.log.read_text()


async def test_a_client_chooses_strings_for_numbers_that_no_double_holds_live_and_in_a_replay(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    size = 2**53 + 1
    async with (
        daemon.client(chat.ada) as plain,
        daemon.client(chat.ada, numbers="string") as exact,
        daemon.client(chat.ada, numbers="json") as explicit,
    ):
        assert [None, "string", "json"] == [client.welcome.get("numbers") for client in (plain, exact, explicit)]
        since = exact.welcome["pos"]
        for client in (plain, exact, explicit):
            await client.subscribe(chat.topic)
        async with chat.sql.transaction():
            await chat.sql.execute(
                "update chatgenius.messages set metadata = $2 where id = $1",
                await chat.say("a large file"),
                f'{{"size": {size}}}',
            )
            await chat.sql.execute(
                "insert into chatgenius.files (message_id, name, type, size, url)"
                " select max(id), 'n', 't', $1, 'u' from chatgenius.messages",
                size,
            )
        received = [(await client.changes(3))[1:] for client in (plain, exact, explicit)]
    sizes = [(update["record"]["metadata"], insert["record"]["size"]) for update, insert in received]
    # Inside JSON, numbers are as the application wrote them.
    assert [({"size": size}, size), ({"size": size}, str(size)), ({"size": size}, size)] == sizes
    async with daemon_process(database) as another:
        for source in (daemon, another):  # from the cache, and from the log
            async with source.client(chat.ada, since=since, numbers="string") as client:
                await client.subscribe(chat.topic)
                assert received[1] == (await client.changes(3))[1:]


@pytest.mark.parametrize(
    "metadata",
    ['{"a":' * 2000 + "1" + "}" * 2000, f'{{"digits": {"9" * 5000}}}'],
    ids=["2,000 levels", "5,000 digits"],
)
async def test_metadata_that_few_parsers_take_reaches_clients_as_postgres_wrote_it(
    daemon: Daemon, chat: Chat, metadata: str
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        message = await chat.say("odd")
        await client.changes()
        await chat.sql.execute("update chatgenius.messages set metadata = $2 where id = $1", message, metadata)
        stored = await chat.sql.fetchval("select metadata::text from chatgenius.messages where id = $1", message)
        while (frame := str(await client.connection.recv())).startswith('{"op":"head"'):
            pass
        assert f'"metadata":{stored},' in frame


async def test_times_that_are_infinite_before_christ_or_past_the_year_9999_reach_clients(
    daemon: Daemon, chat: Chat
) -> None:
    times = ["infinity", "-infinity", "0044-03-15T12:00:00+00:00 BC", "12026-01-10T12:00:00+00:00"]
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        message = await chat.say("odd")
        await client.changes()
        for time in times:
            await chat.sql.execute(
                "update chatgenius.messages set created_at = $2::text::timestamptz where id = $1", message, time
            )
        assert times == [change["record"]["created_at"] for change in await client.changes(len(times))]
