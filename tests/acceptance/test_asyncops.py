"""The pack asyncops served by a real daemon, to clients whose user ids are numbers."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import pytest

from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from tests.support.daemon import Client, Daemon, Frame, daemon_process
from tests.support.postgres import Server

HASH = "$2b$12$" + "a" * 53
FEEDS = ["members", "status_updates", "incidents", "blockers", "decisions", "summaries"]


@dataclass
class Team:
    """Ann, an admin, and Ben, a member; both are active."""

    sql: Connection
    ann: int
    ben: int

    async def post(self, title: str) -> int:
        """Ann writes a status update; its id."""
        found: int = await self.sql.fetchval(
            "insert into asyncops.status_updates (user_id, title, content, tags)"
            " values ($1, $2, '**done**', '{release}') returning id",
            self.ann,
            title,
        )
        return found

    async def report(self, title: str, assigned_to: int | None) -> int:
        """Ann reports an incident; its id."""
        found: int = await self.sql.fetchval(
            "insert into asyncops.incidents (reported_by_id, assigned_to_id, title, description, severity)"
            " values ($1, $2, $3, 'It is slow.', 'critical') returning id",
            self.ann,
            assigned_to,
            title,
        )
        return found

    async def activate(self, user: int, *, active: bool = True) -> None:
        await self.sql.execute("update asyncops.users set is_active = $1 where id = $2", active, user)

    async def settled(self, daemon: Daemon) -> None:
        """Wait until the daemon has delivered everything written so far."""
        async with daemon.client(str(self.ann)) as client:
            await client.subscribe("team:blockers")
            marker = await self.sql.fetchval(
                "insert into asyncops.blockers (reported_by_id, description, impact)"
                " values ($1, 'marker', 'none') returning id",
                self.ann,
            )
            keys: list[int] = []
            while marker not in keys:
                keys += [change["key"]["id"] for change in (await client.next())["changes"]]


@pytest.fixture
async def dsn(postgres: Server) -> AsyncIterator[str]:
    template = await postgres.template("asyncops", partial(migrate.apply, packs=("asyncops",), report=lambda _: None))
    async with postgres.database(template) as dsn:
        yield dsn


@pytest.fixture
async def team(dsn: str) -> AsyncIterator[Team]:
    sql = await connect(dsn, application_name="test")
    ann, ben = [
        await sql.fetchval(
            "insert into asyncops.users (email, password_hash, full_name, role) values ($1, $2, $3, $4) returning id",
            f"{name.lower()}@example.com",
            HASH,
            name,
            role,
        )
        for name, role in [("Ann", "admin"), ("Ben", "member")]
    ]
    yield Team(sql, ann, ben)
    await sql.close()


@pytest.fixture
async def daemon(dsn: str, team: Team) -> AsyncIterator[Daemon]:
    async with daemon_process(dsn, "--pack", "asyncops") as daemon:
        await team.settled(daemon)
        yield daemon


def facts(changes: list[Frame]) -> list[tuple[str, str, dict[str, int]]]:
    return [(change["table"], change["kind"], change["key"]) for change in changes]


async def test_a_member_sees_status_updates_and_assigned_incidents_until_deactivated(
    daemon: Daemon, team: Team
) -> None:
    topics = {"team:status_updates", f"user:{team.ben}"}
    async with daemon.client(str(team.ben)) as ben, daemon.client(str(team.ann)) as ann:
        for topic in topics:
            assert "subscribed" == (await ben.subscribe(topic))["op"]
        assert "subscribed" == (await ann.subscribe("team:status_updates"))["op"]

        update = await team.post("Release 2.4 is out")
        [change] = await ben.changes()
        assert ("status_updates", "insert", {"id": update}) == facts([change])[0]
        assert ("Release 2.4 is out", "**done**", ["release"], team.ann) == tuple(
            change["record"][name] for name in ("title", "content", "tags", "user_id")
        )

        incident = await team.report("API outage", team.ben)
        [assigned] = await ben.changes()
        assert ("incidents", "insert", {"id": incident}) == facts([assigned])[0]
        assert ("critical", "open", team.ben) == tuple(
            assigned["record"][name] for name in ("severity", "status", "assigned_to_id")
        )

        await team.activate(team.ben, active=False)
        revoked = [await ben.next() for _ in topics]
        assert {("revoked", topic) for topic in topics} == {(frame["op"], frame["topic"]) for frame in revoked}
        await team.post("not to Ben")
        await team.sql.execute("update asyncops.incidents set status = 'in_progress' where id = $1", incident)
        assert ["Release 2.4 is out", "not to Ben"] == [c["record"]["title"] for c in await ann.changes(2)]
        for topic in topics:
            assert "no_such_topic" == (await ben.subscribe(topic))["code"]

        await team.activate(team.ben)
        await team.settled(daemon)
        assert "subscribed" == (await ben.subscribe("team:status_updates"))["op"]
        await team.post("welcome back")
        assert ["welcome back"] == [change["record"]["title"] for change in await ben.changes()]


async def test_members_can_follow_every_feed_but_no_other_users_topic(daemon: Daemon, team: Team) -> None:
    async with daemon.client(str(team.ben)) as ben:
        for feed in FEEDS:
            assert "subscribed" == (await ben.subscribe(f"team:{feed}"))["op"]
        for topic in (f"user:{team.ann}", "users", "team:secrets", f"user:0{team.ben}"):
            assert "no_such_topic" == (await ben.subscribe(topic))["code"]
    async with daemon.client("somebody") as stranger:
        for topic in ("team:members", "user:somebody", f"user:{team.ben}"):
            assert "no_such_topic" == (await stranger.subscribe(topic))["code"]


async def test_a_reassigned_incident_leaves_one_users_topic_and_enters_the_other(daemon: Daemon, team: Team) -> None:
    incident = await team.report("API outage", team.ben)
    await team.settled(daemon)
    async with daemon.client(str(team.ben)) as ben, daemon.client(str(team.ann)) as ann:
        await ben.subscribe(f"user:{team.ben}")
        await ann.subscribe(f"user:{team.ann}")
        await team.sql.execute("update asyncops.incidents set assigned_to_id = $1", team.ann)
        [left], [entered] = await ben.changes(), await ann.changes()
    assert ("delete", True, {"id": incident}) == (left["kind"], left["left"], left["key"])
    assert ("insert", "API outage") == (entered["kind"], entered["record"]["title"])


async def decide(team: Team, client: Client) -> tuple[int, list[Frame]]:
    """Ann creates a decision, Ben changes it, Ann deletes it. Returns its id and all changes that arrived."""
    decision = await team.sql.fetchval(
        "insert into asyncops.decisions (created_by_id, title, description, context, outcome, decision_date)"
        " values ($1, 'Thursdays', 'd', 'c', 'o', '2026-01-14') returning id",
        team.ann,
    )
    changes = await client.changes(2)
    for actor, statement in [
        (team.ben, "update asyncops.decisions set title = 'Wednesdays', decision_date = '2026-01-15'"),
        (team.ann, "delete from asyncops.decisions"),
    ]:
        async with team.sql.transaction():
            await team.sql.execute("select set_config('rowcast.actor', $1, true)", str(actor))
            await team.sql.execute(statement)
        changes += await client.changes(3 if actor == team.ben else 2)
    return decision, changes


async def test_a_decision_is_published_with_its_audit_log_and_its_actor(daemon: Daemon, team: Team) -> None:
    async with daemon.client(str(team.ben)) as ben:
        await ben.subscribe("team:decisions")
        decision, changes = await decide(team, ben)
    entries = [change["record"] for change in changes if change["table"] == "decision_audit_log"]
    assert {decision} == {entry["decision_id"] for entry in entries}
    assert [
        (team.ann, "created", None, None, None),
        (team.ben, "updated", "title", "Thursdays", "Wednesdays"),
        (team.ben, "updated", "decision_date", "2026-01-14", "2026-01-15"),
        (team.ann, "deleted", None, None, None),
    ] == [
        tuple(entry[name] for name in ("changed_by_id", "change_type", "field_name", "old_value", "new_value"))
        for entry in entries
    ]
    kinds = [(change["kind"], change.get("meta")) for change in changes if change["table"] == "decisions"]
    assert [
        ("insert", None),
        ("update", {"actor": str(team.ben)}),
        ("delete", {"actor": str(team.ann)}),
    ] == kinds


async def test_a_summary_arrives_when_it_is_generated_and_again_when_it_is_refreshed(
    daemon: Daemon, team: Team
) -> None:
    async with daemon.client(str(team.ben)) as ben:
        await ben.subscribe("team:summaries")
        for number, kind in enumerate(["insert", "update"], 1):
            update = await team.post(f"number {number}")
            await team.sql.execute("select asyncops.generate_daily_summary()")
            [change] = await ben.changes()
            assert kind == change["kind"]
            assert number == change["record"]["status_updates_count"]
            newest = change["record"]["content"]["status_updates"][-1]
            assert (update, f"number {number}", "Ann") == (newest["id"], newest["title"], newest["author"])


async def test_an_archived_row_disappears_for_clients_until_it_is_restored(daemon: Daemon, team: Team) -> None:
    update = await team.post("old")
    await team.settled(daemon)
    async with daemon.client(str(team.ben)) as ben:
        await ben.subscribe("team:status_updates")
        await team.sql.execute("update asyncops.status_updates set created_at = now() - interval '2 years'")
        assert [("status_updates", "update", {"id": update})] == facts(await ben.changes())
        await team.sql.execute("select asyncops.archive()")
        assert [("status_updates", "delete", {"id": update})] == facts(await ben.changes())
        await team.sql.execute("update asyncops.status_updates set archived_at = null")
        [restored] = await ben.changes()
    assert ("restore", "old") == (restored["kind"], restored["record"]["title"])


async def test_a_member_who_was_offline_resumes_from_one_position_and_misses_nothing(
    daemon: Daemon, team: Team
) -> None:
    async with daemon.client(str(team.ben)) as ben:
        since = ben.welcome["pos"]
    for number in range(3):
        await team.post(str(number))
    async with daemon.client(str(team.ben), since=since) as ben:
        await ben.subscribe("team:status_updates")
        frames = await ben.until("changes")
        while sum(len(frame.get("changes", ())) for frame in frames) < 3:
            frames += await ben.until("changes")
    titles = [change["record"]["title"] for frame in frames for change in frame.get("changes", ())]
    assert ["0", "1", "2"] == titles
    assert "reset" not in {frame["op"] for frame in frames}
