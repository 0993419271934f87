"""Antone live: an operator sees a post come in, the decision on it, the reply, and its approval."""

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
class Desk:
    """The database as the application sees it, and one operator."""

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
async def desk(postgres: Server) -> AsyncIterator[Desk]:
    async def build(dsn: str) -> None:
        await migrate.apply(dsn, ["antone"], report=lambda _: None)

    async with postgres.database(await postgres.template("antone", build)) as dsn:
        owner = await asyncpg.connect(dsn)
        operator = await owner.fetchval("insert into antone.operators (name) values ('Olga') returning id::text")
        await owner.execute("set role antone_app")  # the application writes as the restricted role
        yield Desk(dsn, owner, operator)
        await owner.close()


@pytest.fixture
async def daemon(desk: Desk) -> AsyncIterator[Daemon]:
    async with daemon_process(desk.dsn, "--pack", "antone") as process:
        yield process


async def test_an_operator_sees_a_post_its_decision_the_reply_and_the_approval_live(
    daemon: Daemon, desk: Desk
) -> None:
    async with daemon.client(desk.operator) as client:
        assert "subscribed" == (await client.subscribe("platform:REDDIT"))["op"]
        post = await desk.post()
        [told] = await client.changes()
        assert ("posts", "insert", {"id": post}) == (told["table"], told["kind"], told["key"])
        assert ("I cannot sleep.", ["sleep"]) == (told["record"]["content"], told["record"]["keyword_matches"])

        decision = await desk.decide(post)
        [told] = await client.changes()
        assert ("decisions", post, "HELPFUL") == (told["table"], told["record"]["post_id"], told["record"]["mode"])
        scores = [told["record"][f"{score}_score"] for score in ("sss", "ars", "evs", "trs", "composite")]
        assert [0.1, 0.2, 0.3, 1, 0] == scores

        reply = await desk.reply(decision)
        [told] = await client.changes()
        assert ("replies", CONTENT, "PENDING") == (
            told["table"],
            told["record"]["content"],
            told["record"]["approval_status"],
        )

        await desk.sql.execute(
            "update antone.replies set approval_status = 'APPROVED', approved_by = 'Olga', approved_at = now()"
            " where id = $1",
            reply,
        )
        [told] = await client.changes()
        assert ("replies", "update", {"id": reply}) == (told["table"], told["kind"], told["key"])
        assert {"approval_status", "approved_by", "approved_at", "updated_at"} == set(told["changed"])
        assert ("APPROVED", "Olga") == (told["record"]["approval_status"], told["record"]["approved_by"])


async def test_who_follows_one_post_hears_of_it_alone_and_of_nothing_on_other_platforms(
    daemon: Daemon, desk: Desk
) -> None:
    post, other = await desk.post(), await desk.post("THREADS")
    async with daemon.client(desk.operator) as client:
        await client.subscribe(f"post:{post}")
        await desk.decide(other)
        reply = await desk.reply(await desk.decide(post))
        told: list[Frame] = []
        while {"id": reply} not in [change["key"] for change in told]:
            told += (await client.next())["changes"]
    if told[0]["key"] == {"id": post}:  # it had no number yet when it was subscribed to
        del told[0]
    assert ["decisions", "replies"] == [change["table"] for change in told]


async def test_an_escalation_is_told_from_its_opening_to_its_end_without_its_notes(
    daemon: Daemon, desk: Desk
) -> None:
    post = await desk.post()
    async with daemon.client(desk.operator) as client:
        await client.subscribe("escalations")
        await desk.sql.execute(
            "insert into antone.escalations (post_id, reason_id, priority) values ($1, $2, 'HIGH')",
            post,
            MEDICAL_CLAIM,
        )
        await desk.sql.execute(
            "update antone.escalations set status = 'RESOLVED', resolved_by = 'Olga', resolved_at = now(),"
            " resolution_notes = 'a secret note'"
        )
        opened, resolved = await client.changes(2)
    assert ("OPEN", "HIGH", post) == tuple(opened["record"][name] for name in ("status", "priority", "post_id"))
    assert "RESOLVED" == resolved["record"]["status"]
    assert "secret" not in str(resolved)


async def test_nobody_but_operators_follows_anything(daemon: Daemon, desk: Desk) -> None:
    post = await desk.post()
    async with daemon.client(STRANGER) as client:
        for topic in ("platform:REDDIT", f"post:{post}", "escalations", f"operator:{desk.operator}"):
            assert "no_such_topic" == (await client.subscribe(topic))["code"]


async def test_an_operator_who_leaves_hears_nothing_more_at_once(daemon: Daemon, desk: Desk) -> None:
    async with daemon.client(desk.operator) as client:
        await client.subscribe("platform:REDDIT")
        await desk.post()
        await client.changes()
        await desk.sql.execute("reset role")
        await desk.sql.execute("update antone.operators set deleted_at = now()")
        revoked = await client.next()
        assert ("revoked", "platform:REDDIT") == (revoked["op"], revoked["topic"])
        assert "no_such_topic" == (await client.subscribe("platform:REDDIT"))["code"]


async def test_who_was_away_while_posts_were_archived_is_told_that_they_are_gone(daemon: Daemon, desk: Desk) -> None:
    post = await desk.post()
    async with daemon.client(desk.operator) as client:
        await client.subscribe(f"post:{post}")
        await desk.decide(post)
        since = (await client.next())["pos"]
    await desk.sql.execute("reset role")
    await desk.sql.execute("delete from antone.posts where id = $1", post)
    async with daemon.client(desk.operator, since=since) as client:
        await client.subscribe(f"post:{post}")
        told = [change for frame in await client.until("resumed") for change in frame.get("changes", [])]
        if len(told) < 2:  # the daemon may not have read the rest before it answered
            told += await client.changes(2 - len(told))
    assert [("decisions", "delete"), ("posts", "delete")] == [(one["table"], one["kind"]) for one in told]


def ready(daemon: Daemon) -> tuple[int, bytes]:
    connection = HTTPConnection(*daemon.address)
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


async def test_the_health_page_answers_by_what_the_database_has_answered(daemon: Daemon, desk: Desk) -> None:
    assert (200, b'{"ready":true,"reasons":[]}') == await asyncio.to_thread(ready, daemon)


async def test_sample_data_are_refused_in_production_and_the_database_stays_empty(desk: Desk) -> None:
    code, _, errors = await command(
        "--pack", "antone", "seed", DATABASE_URL=desk.dsn, ROWCAST_ENVIRONMENT="production"
    )
    assert 35 == code
    assert "Sample data is not allowed in production" in errors
    assert 0 == await desk.sql.fetchval("select count(*) from antone.posts")


async def test_production_refuses_an_unguarded_database_in_one_line_without_its_password() -> None:
    for url in ("postgresql://u:hunter2@localhost/d", "postgresql://u:hunter2@db.example/d"):
        code, output, errors = await command("--pack", "antone", DATABASE_URL=url, ROWCAST_ENVIRONMENT="production")
        assert (78, "", 1) == (code, output, len(errors.splitlines()))
        assert re.match(
            r"daemon: ROWCAST_ENVIRONMENT is production, which does not allow a database (on|without) ", errors
        )
        assert "hunter2" not in errors
        assert url not in errors
