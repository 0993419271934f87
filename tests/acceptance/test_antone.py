"""Antone live: an operator sees a post, the decision on it, the reply, and its approval as they happen."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http.client import HTTPConnection

import asyncpg
import pytest

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.support.daemon import Daemon, Frame, command, daemon_process
from tests.support.postgres import Server

CONTENT = "Go to bed at the same hour every day. —Antone (Vita)"
COACH = "a0000000-0000-4000-8000-000000000003"
MEDICAL_CLAIM = "e0000000-0000-4000-8000-000000000001"
STRANGER = "00000000-0000-4000-8000-999999999999"


@dataclass
class App:
    """A connection with the application's role, and one operator."""

    dsn: str
    sql: Connection
    operator: str

    async def post(self, platform: str = "REDDIT") -> str:
        author = await self._one(
            "insert into antone.authors (platform, platform_id, handle) values ($1, gen_random_uuid()::text, 'anna')",
            platform,
        )
        return await self._one(
            "insert into antone.posts (platform, platform_post_id, author_id, content, keyword_matches)"
            " values ($1, gen_random_uuid()::text, $2, 'I cannot sleep.', '{sleep}')",
            platform,
            author,
        )

    async def decide(self, post: str) -> str:
        return await self._one(
            "insert into antone.decisions (post_id, sss_score, ars_score, evs_score, trs_score, composite_score,"
            " mode) values ($1, 0.1, 0.2, 0.3, 1, 0, 'HELPFUL')",
            post,
        )

    async def reply(self, decision: str) -> str:
        return await self._one(
            "insert into antone.replies (decision_id, content, archetype_id, platform, utm_code)"
            " values ($1, $2, $3, 'REDDIT', 'sleep')",
            decision,
            CONTENT,
            COACH,
        )

    async def _one(self, statement: str, *values: object) -> str:
        return str(await self.sql.fetchval(f"{statement} returning id", *values))


@pytest.fixture
async def app(postgres: Server) -> AsyncIterator[App]:
    async def build(dsn: str) -> None:
        await migrate.apply(dsn, ["antone"], report=lambda _: None)

    async with postgres.database(await postgres.template("antone", build)) as dsn:
        owner = await asyncpg.connect(dsn)
        operator = await owner.fetchval("insert into antone.operators (name) values ('Olga') returning id::text")
        await owner.execute("set role antone_app")  # the application writes as the restricted role
        yield App(dsn, owner, operator)
        await owner.close()


@pytest.fixture
async def daemon(app: App) -> AsyncIterator[Daemon]:
    async with daemon_process(app.dsn, "--pack", "antone") as process:
        yield process


async def test_an_operator_sees_a_post_its_decision_the_reply_and_the_approval_live(daemon: Daemon, app: App) -> None:
    async with daemon.client(app.operator) as client:
        assert "subscribed" == (await client.subscribe("platform:REDDIT"))["op"]
        post = await app.post()
        [change] = await client.changes()
        assert ("posts", "insert", {"id": post}) == (change["table"], change["kind"], change["key"])
        assert ("I cannot sleep.", ["sleep"]) == (change["record"]["content"], change["record"]["keyword_matches"])

        decision = await app.decide(post)
        [change] = await client.changes()
        assert ("decisions", post, "HELPFUL") == (
            change["table"],
            change["record"]["post_id"],
            change["record"]["mode"],
        )
        scores = [change["record"][f"{score}_score"] for score in ("sss", "ars", "evs", "trs", "composite")]
        assert [0.1, 0.2, 0.3, 1, 0] == scores

        reply = await app.reply(decision)
        [change] = await client.changes()
        assert ("replies", CONTENT, "PENDING") == (
            change["table"],
            change["record"]["content"],
            change["record"]["approval_status"],
        )

        await app.sql.execute(
            "update antone.replies set approval_status = 'APPROVED', approved_by = 'Olga', approved_at = now()"
            " where id = $1",
            reply,
        )
        [change] = await client.changes()
        assert ("replies", "update", {"id": reply}) == (change["table"], change["kind"], change["key"])
        assert {"approval_status", "approved_by", "approved_at", "updated_at"} == set(change["changed"])
        assert ("APPROVED", "Olga") == (change["record"]["approval_status"], change["record"]["approved_by"])


async def test_a_client_that_follows_one_post_receives_only_the_changes_of_that_post(
    daemon: Daemon, app: App
) -> None:
    post, other = await app.post(), await app.post("THREADS")
    async with daemon.client(app.operator) as client:
        await client.subscribe(f"post:{post}")
        await app.decide(other)
        reply = await app.reply(await app.decide(post))
        changes: list[Frame] = []
        while {"id": reply} not in [change["key"] for change in changes]:
            changes += (await client.next())["changes"]
    if changes[0]["key"] == {"id": post}:  # it was not numbered yet at the subscribe
        del changes[0]
    assert ["decisions", "replies"] == [change["table"] for change in changes]


async def test_an_escalation_is_published_from_opening_to_resolution_without_its_notes(
    daemon: Daemon, app: App
) -> None:
    post = await app.post()
    async with daemon.client(app.operator) as client:
        await client.subscribe("escalations")
        await app.sql.execute(
            "insert into antone.escalations (post_id, reason_id, priority) values ($1, $2, 'HIGH')",
            post,
            MEDICAL_CLAIM,
        )
        await app.sql.execute(
            "update antone.escalations set status = 'RESOLVED', resolved_by = 'Olga', resolved_at = now(),"
            " resolution_notes = 'a secret note'"
        )
        opened, resolved = await client.changes(2)
    assert ("OPEN", "HIGH", post) == tuple(opened["record"][name] for name in ("status", "priority", "post_id"))
    assert "RESOLVED" == resolved["record"]["status"]
    assert "secret" not in str(resolved)


async def test_only_operators_can_subscribe_to_anything(daemon: Daemon, app: App) -> None:
    post = await app.post()
    async with daemon.client(STRANGER) as client:
        for topic in ("platform:REDDIT", f"post:{post}", "escalations", f"operator:{app.operator}"):
            assert "no_such_topic" == (await client.subscribe(topic))["code"]


async def test_an_operator_who_leaves_is_revoked_immediately(daemon: Daemon, app: App) -> None:
    async with daemon.client(app.operator) as client:
        await client.subscribe("platform:REDDIT")
        await app.post()
        await client.changes()
        await app.sql.execute("reset role")
        await app.sql.execute("update antone.operators set deleted_at = now()")
        revoked = await client.next()
        assert ("revoked", "platform:REDDIT") == (revoked["op"], revoked["topic"])
        assert "no_such_topic" == (await client.subscribe("platform:REDDIT"))["code"]


async def test_a_client_that_was_offline_during_archiving_receives_the_deletes(daemon: Daemon, app: App) -> None:
    post = await app.post()
    async with daemon.client(app.operator) as client:
        await client.subscribe(f"post:{post}")
        await app.decide(post)
        since = (await client.next())["pos"]
    await app.sql.execute("reset role")
    await app.sql.execute("delete from antone.posts where id = $1", post)
    async with daemon.client(app.operator, since=since) as client:
        await client.subscribe(f"post:{post}")
        changes = [change for frame in await client.until("resumed") for change in frame.get("changes", [])]
        if len(changes) < 2:  # the daemon may have answered before it read the rest
            changes += await client.changes(2 - len(changes))
    assert [("decisions", "delete"), ("posts", "delete")] == [(one["table"], one["kind"]) for one in changes]


def ready(daemon: Daemon) -> tuple[int, bytes]:
    connection = HTTPConnection(*daemon.address)
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


async def test_readyz_answers_200_while_the_database_answers(daemon: Daemon, app: App) -> None:
    assert (200, b'{"ready":true,"reasons":[]}') == await asyncio.to_thread(ready, daemon)


async def test_sample_data_is_refused_in_production_and_the_database_stays_empty(app: App) -> None:
    code, _, errors = await command(
        "--pack", "antone", "seed", DATABASE_URL=app.dsn, ROWCAST_ENVIRONMENT="production"
    )
    assert 35 == code
    assert "Sample data is not allowed in production" in errors
    assert 0 == await app.sql.fetchval("select count(*) from antone.posts")


async def test_production_refuses_an_insecure_database_url_in_one_line_without_its_password() -> None:
    for url in ("postgresql://u:hunter2@localhost/d", "postgresql://u:hunter2@db.example/d"):
        code, output, errors = await command("--pack", "antone", DATABASE_URL=url, ROWCAST_ENVIRONMENT="production")
        assert (78, "", 1) == (code, output, len(errors.splitlines()))
        assert re.match(
            r"daemon: ROWCAST_ENVIRONMENT is production, which does not allow a database (on|without) ", errors
        )
        assert "hunter2" not in errors
        assert url not in errors
