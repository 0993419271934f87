"""From the unsubscriber's data layer, with its own credentials, to the frames that a client receives."""

import json
from base64 import urlsafe_b64encode
from datetime import UTC, datetime

import asyncpg
from pydantic import SecretStr

from daemon.extensions.email_unsubscribe.models import Email, Tokens
from daemon.extensions.email_unsubscribe.store import Store
from daemon.schema import migrate
from tests.packs.databases import session
from tests.packs.unsubscriber import PASSWORD, as_app, unsubscriber
from tests.support.daemon import Client, Frame, command, daemon_process
from tests.support.postgres import Server, ignore

SHOP = "news@shop.example"
URL = "https://shop.example/unsubscribe?token=s3cr3t"
KEY = urlsafe_b64encode(b"a key that is only for the tests").decode()
TOPICS = ("senders", "history", "allow_list", "audit")


def kinds(changes: list[Frame]) -> list[tuple[str, str]]:
    return sorted((change["table"], change["kind"]) for change in changes)


async def settle(store: Store, client: Client) -> None:
    """Let the client read everything written so far."""
    await store.allow("domain", "marker.example")
    waiting = {"allow_list", "audit_log"}
    while waiting:
        for change in (await client.next())["changes"]:
            record = change["record"]
            if "marker.example" == record.get("domain") or "allow_list_add" == record.get("action"):
                waiting.discard(change["table"])


async def test_a_client_sees_an_attempt_that_the_application_records(postgres: Server) -> None:
    async with (
        unsubscriber(postgres) as dsn,
        daemon_process(dsn, "--pack", "email_unsubscribe") as daemon,
        Store.open(as_app(dsn), owner_dsn=None, keys=[KEY]) as store,
    ):
        tokens = Tokens(access_token=SecretStr("ya29.canary"), expiry=datetime(2026, 1, 10, tzinfo=UTC))
        session = await store.log_in("provider|1", tokens)
        async with daemon.client(session.user_id) as client:
            for topic in TOPICS:
                assert "subscribed" == (await client.subscribe(topic))["op"]
            await settle(store, client)

            attempt = await store.begin_attempt(SHOP, URL, "one_click")
            begun = await client.changes(3)
            await store.settle_attempt(attempt.id)
            settled = await client.changes(3)
            await store.record_emails([Email(message_id="1", sender=SHOP, received_at=datetime.now(UTC))])
            [counted] = await client.changes(1)
            await store.allow("email", "friend@family.example")
            allowed = await client.changes(2)

            await store.log_out(session.id)
            [logged_out] = await client.changes(1)
    assert [("audit_log", "insert"), ("senders", "insert"), ("unsubscribe_history", "insert")] == kinds(begun)
    assert [("audit_log", "insert"), ("senders", "update"), ("unsubscribe_history", "update")] == kinds(settled)
    statuses = [c["record"]["status"] for c in [*begun, *settled] if c["table"] == "unsubscribe_history"]
    assert ["pending", "succeeded"] == statuses
    assert ("shop.example", 1) == (counted["record"]["domain"], counted["record"]["emails_after_unsubscribe"])
    assert [("allow_list", "insert"), ("audit_log", "insert")] == kinds(allowed)
    assert ("audit_log", "logout", session.user_id) == (
        logged_out["table"],
        logged_out["record"]["action"],
        logged_out["record"]["user_id"],
    )
    received = json.dumps([begun, settled, counted, allowed, logged_out])
    for secret in ("@", "https:", "s3cr3t", "canary", "provider|"):
        assert secret not in received


async def test_a_user_can_follow_only_their_own_sessions_and_a_stranger_nothing(postgres: Server) -> None:
    async with (
        unsubscriber(postgres) as dsn,
        daemon_process(dsn, "--pack", "email_unsubscribe") as daemon,
        Store.open(as_app(dsn), owner_dsn=None, keys=[KEY]) as store,
    ):
        one, two = await store.log_in("provider|1"), await store.log_in("provider|2")
        async with daemon.client(one.user_id) as client, daemon.client("01JH000000N0B0DY0000000000") as stranger:
            assert "subscribed" == (await client.subscribe(f"account:{one.user_id}"))["op"]
            assert "no_such_topic" == (await client.subscribe(f"account:{two.user_id}"))["code"]
            for topic in (*TOPICS, f"account:{one.user_id}"):
                assert "no_such_topic" == (await stranger.subscribe(topic))["code"]
            await store.log_out(two.id)
            await store.log_out(one.id, "revoked")
            change = (await client.next())["changes"][-1]
            while "update" != change["kind"]:  # earlier changes may still arrive
                change = (await client.next())["changes"][-1]
            assert (one.id, "revoked") == (change["record"]["id"], change["record"]["end_reason"])
            await store.run(
                lambda connection: connection.execute(
                    "delete from email_unsubscribe.users where subject = 'provider|1'"
                )
            )
            frames = await client.until("revoked")
    assert f"account:{one.user_id}" == frames[-1]["topic"]


async def test_a_daemon_applies_pending_revisions_when_it_starts(empty_database: str) -> None:
    async with daemon_process(empty_database, "--pack", "email_unsubscribe", "--workers", "2") as daemon:
        done = [line["data"]["done"] for line in daemon.events() if line["event"] == "schema_migration"]
    async with daemon_process(empty_database, "--pack", "email_unsubscribe") as daemon:
        assert [] == [line for line in daemon.events() if line["event"] == "schema_migration"]
    moves = [line.partition(" -> ") for line in done]
    assert ["rowcast: nothing", "email_unsubscribe: nothing"] == [before for before, arrow, _ in moves if arrow]


async def test_a_daemon_whose_role_may_not_migrate_says_that_the_schema_is_not_current(postgres: Server) -> None:
    async with unsubscriber(postgres) as dsn:
        await migrate.rollback(dsn, "email_unsubscribe", to="email_unsubscribe_0004", report=ignore)
        async with session(dsn) as owner:
            await owner.execute(
                f"create role only_reads login password '{PASSWORD}';"
                "grant usage on schema rowcast, email_unsubscribe to only_reads;"
                "grant select on all tables in schema rowcast, email_unsubscribe to only_reads"
            )
            code, _, errors = await command("--pack", "email_unsubscribe", DATABASE_URL=as_app(dsn, "only_reads"))
            await owner.execute("drop owned by only_reads; drop role only_reads")
        assert 32 == code, errors
        *_, line = errors.splitlines()
        assert line.startswith(
            "daemon: The schema is not current (schema email_unsubscribe is at email_unsubscribe_0004"
        )
        assert line.endswith("run `daemon --apply-ddl` first.")


async def test_a_daemon_of_other_packs_applies_nothing_when_it_starts(empty_database: str) -> None:
    code, _, errors = await command(DATABASE_URL=empty_database)
    assert (32, True) == (code, "run `daemon --apply-ddl` first" in errors)
    sql = await asyncpg.connect(empty_database)
    assert await sql.fetchval("select to_regnamespace('rowcast') is null") is True
    await sql.close()
