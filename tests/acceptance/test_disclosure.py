"""A secret as its owner sees it: a daemon serves the pack, a job calls its functions, a client follows."""

from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial

import pytest

from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from tests.support.daemon import Daemon, Frame, command, daemon_process
from tests.support.postgres import Server

ANN = "01JH000000VSER00000000ANNA"
BEN = "01JH000000VSER000000000BEN"
RECIPIENTS = ("first@example.com", "second@example.com")
ROW = """
    insert into disclosure.secrets (user_id, title, ciphertext, iv, auth_tag, key_id, last_check_in)
    values ($1, 'Will', 'hidden words', 'twelve bytes', 'sixteen bytes it', 'main', now() - interval '31 days')
    returning id
"""


class Job:
    """What a cron job does; it calls nothing but the functions of the pack."""

    def __init__(self, sql: Connection, secret: int) -> None:
        self.sql, self.secret = sql, secret

    async def claim(self) -> datetime:
        """Claim the secret that is due; the time of the claim."""
        [row] = await self.sql.fetch("select * from disclosure.claim_due(retry_after => '0')")
        assert self.secret == row["secret_id"]
        claimed_at: datetime = row["claimed_at"]
        return claimed_at

    async def fail(self) -> str:
        """Make one attempt that fails; the secret's status after it."""
        status: str = await self.sql.fetchval(
            "select disclosure.record_failure($1, $2)", self.secret, await self.claim()
        )
        return status

    async def disclose(self) -> None:
        """Make an attempt that succeeds."""
        stamp = await self.claim()
        for row in await self.sql.fetch("select disclosure.recipients_due($1, $2) as email", self.secret, stamp):
            attempt = await self.sql.fetchval(
                "select disclosure.begin_attempt($1, $2, $3)", self.secret, stamp, row["email"]
            )
            assert await self.sql.fetchval("select disclosure.record_sent($1)", attempt)
        assert await self.sql.fetchval("select disclosure.record_success($1, $2)", self.secret, stamp)


@pytest.fixture
async def disclosures(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database that holds this pack and no other."""
    template = await postgres.template(
        "disclosure", partial(migrate.apply, packs=("disclosure",), report=lambda _: None)
    )
    async with postgres.database(template) as dsn:
        yield dsn


@pytest.fixture
async def job(disclosures: str) -> AsyncIterator[Job]:
    """Ann's secret is due; Ben has none."""
    sql = await connect(disclosures, application_name="test")
    async with sql.transaction():
        await sql.execute("insert into disclosure.users (id, name) values ($1, 'Ann'), ($2, 'Ben')", ANN, BEN)
        secret = await sql.fetchval(ROW, ANN)
        for email in RECIPIENTS:
            await sql.execute("insert into disclosure.recipients (secret_id, email) values ($1, $2)", secret, email)
    yield Job(sql, secret)
    await sql.close()


@pytest.fixture
async def daemon(disclosures: str, job: Job) -> AsyncIterator[Daemon]:
    async with daemon_process(disclosures, "--pack", "disclosure") as process:
        yield process


def state(change: Frame) -> tuple[str, int, bool]:
    """The state of a secret: status, failed attempts, whether a job is processing it."""
    assert "secrets" == change["table"]
    record = change["record"]
    return record["status"], record["retry_count"], record["processing_started_at"] is not None


async def test_the_owner_sees_a_disclosure_step_by_step_and_in_order(daemon: Daemon, job: Job) -> None:
    async with daemon.client(ANN) as client:
        assert "subscribed" == (await client.subscribe(f"secret:{job.secret}"))["op"]
        await job.fail()
        await job.disclose()
        changes = await client.changes(8)
    assert [("active", 0, True), ("active", 1, False), ("active", 1, True)] == [
        state(change) for change in changes[:3]
    ]
    assert [("disclosure_log", status) for _ in RECIPIENTS for status in ("pending", "sent")] == [
        (change["table"], change["record"]["status"]) for change in changes[3:7]
    ]
    assert ("triggered", 1, False) == state(changes[7])
    assert [change["seq"] for change in changes] == sorted(change["seq"] for change in changes)
    everything = str(changes)
    assert not any(word in everything for word in ("example.com", "Will", "hidden", b"hidden".hex(), "main"))


async def test_the_owner_sees_a_secret_fail_permanently_after_six_attempts(daemon: Daemon, job: Job) -> None:
    async with daemon.client(ANN) as client:
        await client.subscribe(f"owner:{ANN}")
        assert ["active"] * 5 + ["failed"] == [await job.fail() for _ in range(6)]
        changes = await client.changes(12)
    expected = [step for n in range(6) for step in (("active", n, True), ("active", n + 1, False))]
    assert [*expected[:-1], ("failed", 6, False)] == [state(change) for change in changes]


async def test_an_owner_who_was_offline_misses_no_step(daemon: Daemon, job: Job) -> None:
    topic = f"secret:{job.secret}"
    async with daemon.client(ANN) as client:
        await client.subscribe(topic)
        await job.fail()
        frames: list[Frame] = []
        while 2 > sum(len(frame["changes"]) for frame in frames):
            frames.append(await client.next())
    assert [("active", 0, True), ("active", 1, False)] == [state(c) for frame in frames for c in frame["changes"]]
    await job.disclose()
    async with daemon.client(ANN, since=frames[-1]["pos"]) as client:
        await client.subscribe(topic)
        changes: list[Frame] = []
        while 6 > len(changes):  # "resumed" comes at the head of that moment: the rest may follow live
            frame = await client.next()
            changes += frame["changes"] if "changes" == frame["op"] else []
    assert ["secrets", *["disclosure_log"] * 4, "secrets"] == [change["table"] for change in changes]
    assert [("active", 1, True), ("triggered", 1, False)] == [state(changes[0]), state(changes[-1])]


async def test_a_check_in_stops_a_disclosure_that_has_begun(daemon: Daemon, job: Job) -> None:
    async with daemon.client(ANN) as client:
        await client.subscribe(f"secret:{job.secret}")
        stamp = await job.claim()
        assert [("active", 0, True)] == [state(change) for change in await client.changes()]
        await job.sql.execute("update disclosure.secrets set last_check_in = now() where id = $1", job.secret)
        assert [("active", 0, False)] == [state(change) for change in await client.changes()]
        begin = "select disclosure.begin_attempt($1, $2, $3)"
        assert await job.sql.fetchval(begin, job.secret, stamp, RECIPIENTS[0]) is None


async def test_only_the_current_owner_can_follow_a_secret(daemon: Daemon, job: Job) -> None:
    topic = f"secret:{job.secret}"
    async with daemon.client(ANN) as ann, daemon.client(BEN) as ben:
        for forbidden in (topic, f"owner:{ANN}", "secret:999", "secret:0"):
            assert "no_such_topic" == (await ben.subscribe(forbidden))["code"]
        await ann.subscribe(topic)
        await ben.subscribe(f"owner:{BEN}")
        await job.sql.execute("update disclosure.secrets set user_id = $1 where id = $2", BEN, job.secret)
        revoked = await ann.next()
        assert ("revoked", topic) == (revoked["op"], revoked["topic"])
        assert [("insert", job.secret)] == [(c["kind"], c["record"]["id"]) for c in await ben.changes()]
        assert "subscribed" == (await ben.subscribe(topic))["op"]
        await job.sql.execute("update disclosure.secrets set status = 'paused'")
        assert "paused" == (await ben.changes())[0]["record"]["status"]
        assert "no_such_topic" == (await ann.subscribe(topic))["code"]


async def test_a_critical_issue_is_answered_by_a_rollback_from_the_command_line(disclosures: str, job: Job) -> None:
    assert "active" == await job.fail()
    back = ("rollback", "disclosure", "--to", "disclosure_0001")
    code, output, errors = await command(*back, DATABASE_URL=disclosures)
    assert 0 == code, errors
    newest = migrate.heads(["disclosure"])["disclosure"]
    assert f"disclosure: {newest} -> disclosure_0001" in output
    code, _, errors = await command("--apply-ddl", "--pack", "disclosure", DATABASE_URL=disclosures)
    assert 0 == code, errors
    assert "active" == await job.fail()
