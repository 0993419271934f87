"""The data layer of email_unsubscribe, with the application's credentials."""

import asyncio
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr, ValidationError
from stamina.instrumentation import RetryDetails, set_on_retry_hooks
from structlog.testing import capture_logs

from daemon.extensions.email_unsubscribe import store as store_module
from daemon.extensions.email_unsubscribe.cipher import (
    Cipher,
    EncryptionUnavailable,
    RotationIncomplete,
    TokenUndecryptable,
)
from daemon.extensions.email_unsubscribe.models import Email, Tokens
from daemon.extensions.email_unsubscribe.store import ExcessivePrivileges, Store
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault, LockContention, TemporarilyUnavailable
from daemon.schema import migrate
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import BadSettings
from tests.packs.databases import session
from tests.packs.unsubscriber import APP, as_app, give_password, unsubscriber, until_gone, until_waiting
from tests.support.daemon import command
from tests.support.postgres import Server, chosen_binaries

ROOT = Path(__file__).parents[2]
OLD, NEW, OTHER = (urlsafe_b64encode(name.ljust(32, b".")).decode() for name in (b"old", b"new", b"other"))
START = datetime(2026, 1, 10, 12, tzinfo=UTC)
SHOP = "news@shop.example"
URL = "https://shop.example/unsubscribe?token=s3cr3t"
TOKENS = Tokens(
    access_token=SecretStr("ya29.access-planted"),
    refresh_token=SecretStr("1//refresh-planted"),
    expiry=START + timedelta(hours=1),
)


@pytest.fixture
async def dsn(postgres: Server) -> AsyncIterator[str]:
    """A database of its own, as its owner."""
    async with unsubscriber(postgres) as found:
        yield found


@pytest.fixture
async def owner(dsn: str) -> AsyncIterator[Connection]:
    async with session(dsn) as connection:
        yield connection


def opened(dsn: str, *keys: str, **options: Any) -> AbstractAsyncContextManager[Store]:
    """A store with the application's credentials, which applies no migrations unless there is an `owner_dsn`."""
    return Store.open(as_app(dsn), keys=keys or [OLD], **{"owner_dsn": None, **options})


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    async with opened(dsn) as found:
        yield found


def email(number: int, *, sender: str = SHOP, hours: int = 0) -> Email:
    return Email(message_id=f"m-{number}", sender=sender, received_at=START + timedelta(hours=hours))


async def pid_of(connection: Connection) -> int:
    return int(await connection.fetchval("select pg_backend_pid()"))


# --- Start: schema, migrations, credentials --------------------------------------------------------------------


async def test_starting_the_application_creates_the_schema(empty_database: str) -> None:
    async with session(empty_database) as owner:
        assert await owner.fetchval("select to_regnamespace('email_unsubscribe') is null") is True
        await migrate.apply(empty_database, [], report=lambda _: None)
        await owner.execute(f"do $$ begin create role {APP} login; exception when duplicate_object then null; end $$")
        await give_password(owner)
        async with opened(empty_database, owner_dsn=empty_database) as store:
            assert [] == await store.history()
        assert await owner.fetchval("select to_regnamespace('email_unsubscribe') is null") is False


async def test_pending_migrations_are_applied_when_the_application_starts(dsn: str, owner: Connection) -> None:
    await migrate.rollback(dsn, "email_unsubscribe", to="email_unsubscribe_0002", report=lambda _: None)
    assert await owner.fetchval("select to_regprocedure('email_unsubscribe.may_read(text,text)')") is None
    async with opened(dsn, owner_dsn=dsn):
        assert "email_unsubscribe_0005" == await owner.fetchval("select * from email_unsubscribe.alembic_version")
        assert await owner.fetchval("select to_regprocedure('email_unsubscribe.may_read(text,text)')") is not None


async def test_without_the_owner_a_schema_with_pending_migrations_is_refused(dsn: str) -> None:
    await migrate.rollback(dsn, "email_unsubscribe", to="email_unsubscribe_0002", report=lambda _: None)
    with pytest.raises(SchemaNotCurrent, match="at email_unsubscribe_0002, not at email_unsubscribe_0005"):
        async with opened(dsn):
            pass


async def test_applied_migrations_are_tracked_and_not_applied_again(dsn: str, owner: Connection) -> None:
    made = "select array_agg(oid order by oid) from pg_class where relnamespace = 'email_unsubscribe'::regnamespace"
    before = await owner.fetchval(made)
    async with opened(dsn, owner_dsn=dsn), opened(dsn, owner_dsn=dsn):
        assert before == await owner.fetchval(made)
    assert 1 == await owner.fetchval("select count(*) from email_unsubscribe.alembic_version")


async def test_the_units_start_command_applies_pending_migrations_once(
    empty_database: str,
) -> None:
    unit = (ROOT / "systemd/rowcast.service").read_text()
    assert "/opt/rowcast/bin/daemon --apply-ddl && exec /opt/rowcast/bin/daemon" in unit
    arguments = ("--apply-ddl", "--pack", "email_unsubscribe")
    code, output, _ = await command(*arguments, DATABASE_URL=empty_database)
    assert (0, True) == (code, "email_unsubscribe: nothing -> email_unsubscribe_0005" in output)
    code, output, _ = await command(*arguments, DATABASE_URL=empty_database)
    assert (0, True) == (code, "email_unsubscribe: already at email_unsubscribe_0005" in output)


async def test_credentials_of_a_superuser_are_refused(dsn: str) -> None:
    with pytest.raises(ExcessivePrivileges, match=r"it is a superuser.*Use email_unsubscribe_app"):
        async with Store.open(dsn, owner_dsn=None, keys=[OLD]):
            pass


@pytest.mark.parametrize(
    ("gives", "takes", "what"),
    [
        ("alter role {} createrole", "alter role {} nocreaterole", "it may create roles"),
        ("alter role {} createdb", "alter role {} nocreatedb", "it may create databases"),
        ("alter role {} bypassrls", "alter role {} nobypassrls", "it bypasses row security"),
        ("grant pg_read_all_data to {}", "revoke pg_read_all_data from {}", "it is a member of pg_read_all_data"),
        ("grant select on chatgenius.users to {}", "", "it has rights on table chatgenius.users"),
        ("grant select (id) on rowcast.events to {}", "", "it has rights on column id of table rowcast.events"),
        ("grant execute on function rowcast.ring() to {}", "", "it has rights on function rowcast.ring"),
        ("grant usage on schema public to {}", "", "it has rights on schema public"),
        ("grant create on schema email_unsubscribe to {}", "", "it may create objects in the schema"),
        ("alter table email_unsubscribe.users owner to {}", "", "it owns table email_unsubscribe.users"),
        ("grant create on schema public to public", "", "it may create objects in schema public"),
        ("grant select on rowcast.events to public", "", "PUBLIC has rights on rowcast.events"),
        ("grant update (id) on rowcast.watched to public", "", "PUBLIC has rights on rowcast.watched"),
        ("grant usage on sequence rowcast.event_ids to public", "", "PUBLIC has rights on rowcast.event_ids"),
        (
            "create function public.door() returns int security definer language sql return 1",
            "",
            "PUBLIC may execute public.door() with the rights of rowcast",
        ),
        (
            "select lo_create(4712); grant select on large object 4712 to public",
            "",
            "PUBLIC has rights on large objects",
        ),
    ],
)
async def test_credentials_with_privileges_outside_the_schema_are_refused(
    dsn: str, owner: Connection, gives: str, takes: str, what: str
) -> None:
    await owner.execute(gives.format(APP))
    try:
        with pytest.raises(ExcessivePrivileges) as caught:
            async with opened(dsn):
                pass
    finally:
        if takes:
            await owner.execute(takes.format(APP))
    assert what in str(caught.value)


async def test_a_store_works_in_another_schema(empty_database: str) -> None:
    async with session(empty_database) as owner:
        await migrate.apply(
            empty_database, ["email_unsubscribe"], schemas={"email_unsubscribe": "other"}, report=print
        )
        await give_password(owner, "other_app")
        dsn = as_app(empty_database, "other_app")
        async with Store.open(dsn, owner_dsn=empty_database, keys=[OLD], schema="other") as store:
            await store.record_emails([email(1)])
            assert [SHOP] == [sender.sender for sender in await store.senders()]
        assert 1 == await owner.fetchval("select count(*) from other.sender_emails")


# --- OAuth tokens ----------------------------------------------------------------------------------------------


async def test_tokens_are_returned_as_they_were_stored(store: Store, owner: Connection) -> None:
    before = await owner.fetchval("select clock_timestamp()")
    await store.save_tokens("gmail", TOKENS)
    found = await store.tokens("gmail")
    assert found is not None
    assert TOKENS == Tokens(**found.model_dump(exclude={"encrypted_at"}))
    assert before < found.encrypted_at < await owner.fetchval("select clock_timestamp()")
    await store.forget_tokens("gmail")
    assert None is await store.tokens("gmail")


async def test_a_new_access_token_leaves_the_refresh_token(store: Store) -> None:
    await store.save_tokens("gmail", TOKENS)
    await store.save_tokens("gmail", Tokens(access_token=SecretStr("newer"), expiry=START))
    found = await store.tokens("gmail")
    assert found is not None
    assert TOKENS.refresh_token == found.refresh_token
    assert ("newer", START) == (found.access_token.get_secret_value(), found.expiry)


async def dumped(owner: Connection, dsn: str) -> str:
    """The whole database, as in a stolen backup: by pg_dump if it is installed, and by COPY."""
    text = ""
    program = chosen_binaries().bindir / "pg_dump"
    if program.exists():
        environment = chosen_binaries().environment()
        done = await asyncio.to_thread(
            subprocess.run, [str(program), dsn], env=environment, capture_output=True, text=True, check=True
        )
        text += done.stdout
    for (table,) in await owner.fetch("select oid::regclass::text from pg_class where relkind = 'r'"):
        if table != "pg_authid":
            chunks: list[bytes] = []

            async def keep(chunk: bytes, chunks: list[bytes] = chunks) -> None:
                chunks.append(chunk)

            await owner.copy_from_query(f"select * from {table}", output=keep)
            text += b"".join(chunks).decode()
    return text


async def test_a_dump_of_the_database_shows_no_token(store: Store, owner: Connection, dsn: str) -> None:
    await store.log_in("provider|1", TOKENS)
    await store.save_tokens("gmail", TOKENS)
    text = await dumped(owner, dsn)
    assert "planted" not in text
    assert OLD not in text
    rows = await owner.fetch("select access_token, refresh_token from email_unsubscribe.oauth_tokens")
    assert 2 == len(rows)
    stored = {text for row in rows for text in row}
    assert 4 == len(stored)  # encrypting the same token twice gives different texts
    assert all(one.startswith("gAAAAA") and one in text for one in stored)


async def test_the_table_refuses_unencrypted_tokens(store: Store) -> None:
    with capture_logs() as logged, pytest.raises(DatabaseFault, match="oauth_tokens_access_token_is_encrypted"):
        await store.run(
            lambda connection: connection.execute(
                "insert into email_unsubscribe.oauth_tokens values ('gmail', 'ya29.planted', null, now(), now())"
            )
        )
    assert [("constraint_violation", "oauth_tokens_access_token_is_encrypted", "email_unsubscribe.oauth_tokens")] == [
        (line["event"], line["constraint"], line["table"]) for line in logged
    ]
    assert "planted" not in str(logged)


async def test_no_model_and_no_error_shows_a_token(store: Store, dsn: str) -> None:
    await store.save_tokens("gmail", TOKENS)
    assert "planted" not in repr(TOKENS) + str(TOKENS) + repr(await store.tokens("gmail")) + TOKENS.model_dump_json()
    with pytest.raises(ValidationError) as caught:
        Tokens.model_validate({"access_token": "planted", "expiry": "planted"})
    assert "planted" not in str(caught.value)
    async with opened(dsn, OTHER) as stranger:
        with pytest.raises(TokenUndecryptable, match="No key decrypts the access_token"):
            await stranger.tokens("gmail")


@pytest.mark.parametrize(
    "tampering",
    [
        "update email_unsubscribe.oauth_tokens set access_token = refresh_token where account = 'gmail'",
        "update email_unsubscribe.oauth_tokens t set access_token = o.access_token"
        " from email_unsubscribe.oauth_tokens o where t.account = 'gmail' and o.account = 'other'",
        "update email_unsubscribe.oauth_tokens set access_token = overlay(access_token placing 'AAAA' from 60)",
    ],
)
async def test_a_token_that_was_moved_or_altered_in_the_table_is_not_read(
    store: Store, owner: Connection, tampering: str
) -> None:
    for account in ("gmail", "other"):
        await store.save_tokens(account, TOKENS)
    await owner.execute(tampering)
    with pytest.raises(TokenUndecryptable):
        await store.tokens("gmail")


async def stored_tokens(owner: Connection) -> dict[str, tuple[str, str | None, datetime]]:
    rows = await owner.fetch(
        "select account, access_token, refresh_token, encrypted_at from email_unsubscribe.oauth_tokens"
    )
    return {row["account"]: (row["access_token"], row["refresh_token"], row["encrypted_at"]) for row in rows}


async def test_the_first_key_encrypts_and_all_of_them_decrypt(dsn: str, store: Store) -> None:
    await store.save_tokens("before", TOKENS)
    async with opened(dsn, NEW, OLD) as both:
        assert await both.tokens("before") is not None
        await both.save_tokens("after", TOKENS)
    async with opened(dsn, NEW) as newest:
        assert await newest.tokens("after") is not None
        with pytest.raises(TokenUndecryptable):
            await newest.tokens("before")


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
async def test_rotation_re_encrypts_every_token_in_batches(
    dsn: str, store: Store, owner: Connection, batch: int
) -> None:
    for number in range(7):
        tokens = TOKENS if number % 2 else TOKENS.model_copy(update={"refresh_token": None})
        await store.save_tokens(f"account {number}", tokens)
    before = await stored_tokens(owner)
    async with opened(dsn, NEW, OLD) as both:
        assert 7 == await both.rotate_token_keys(batch)
        after = await stored_tokens(owner)
        assert 0 == await both.rotate_token_keys(batch)
    assert after == await stored_tokens(owner)
    assert before.keys() == after.keys()
    for account, (access, refresh, at) in after.items():
        assert access != before[account][0]
        assert at > before[account][2]
        assert (refresh is None) == (before[account][1] is None)
    async with opened(dsn, NEW) as newest:
        for number in range(7):
            found = await newest.tokens(f"account {number}")
            assert found is not None
            assert TOKENS.access_token == found.access_token
    with pytest.raises(TokenUndecryptable):
        await store.tokens("account 0")


@pytest.mark.parametrize("batch", [1, 2, 100])
async def test_rotation_passes_an_unreadable_token_and_names_its_account(
    dsn: str, store: Store, owner: Connection, batch: int
) -> None:
    for number in range(4):
        await store.save_tokens(f"account {number}", TOKENS)
    await owner.execute(
        "update email_unsubscribe.oauth_tokens set access_token = overlay(access_token placing 'AAAA' from 60)"
        " where account in ('account 0', 'account 2')"
    )
    before = await stored_tokens(owner)
    async with opened(dsn, NEW, OLD) as both:
        with pytest.raises(
            RotationIncomplete, match=r"tokens of account 0, account 2: .* of 2 accounts were"
        ) as caught:
            await both.rotate_token_keys(batch)
        assert before["account 2"] == (await stored_tokens(owner))["account 2"]
        assert before["account 2"][0] not in str(caught.value)
        for account in ("account 0", "account 2"):
            await both.save_tokens(account, TOKENS)
        assert 0 == await both.rotate_token_keys(batch)
    async with opened(dsn, NEW) as newest:
        assert await newest.tokens("account 3") is not None


def test_many_accounts_with_unreadable_tokens_are_named_in_one_line() -> None:
    text = str(RotationIncomplete(["a\nb", *(f"account {number}" for number in range(30))], 5))
    assert "\n" not in text
    assert "'a\\nb', account 0, " in text
    assert "account 18, 11 more accounts: " in text


async def test_a_token_saved_during_a_rotation_is_not_overwritten(dsn: str, store: Store, owner: Connection) -> None:
    await store.save_tokens("gmail", TOKENS)
    newer = Cipher([OLD]).encrypt(SecretStr("renewed"), "gmail", "access_token")
    renewal = owner.transaction()
    await renewal.start()
    await owner.execute("update email_unsubscribe.oauth_tokens set access_token = $1", newer)
    async with opened(dsn, NEW, OLD) as both, session(dsn) as watcher:
        rotating = asyncio.create_task(both.rotate_token_keys())
        while not await watcher.fetchval(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and usename = $1", APP
        ):
            pass
        await renewal.commit()
        assert 1 == await rotating
    async with opened(dsn, NEW) as newest:
        found = await newest.tokens("gmail")
    assert found is not None
    assert "renewed" == found.access_token.get_secret_value()


async def test_the_operator_rotates_keys_by_a_command(dsn: str, store: Store, tmp_path: Path) -> None:
    await store.save_tokens("gmail", TOKENS)
    keys = tmp_path / "keys"
    keys.write_text(f"{NEW}\n{OLD}\n")
    given = {"DATABASE_URL": dsn, "ROWCAST_TOKEN_KEYS_FILE": str(keys), "ROWCAST_PACKS": "email_unsubscribe"}
    assert (0, "re-encrypted the tokens of 1 account\n", "") == await command("rotate-token-keys", **given)
    assert (0, "re-encrypted the tokens of 0 accounts\n", "") == await command("rotate-token-keys", **given)
    keys.write_text(OTHER)
    code, output, errors = await command("rotate-token-keys", **given)
    assert (42, "") == (code, output)
    assert (
        "daemon: No key decrypts tokens of gmail: add the keys they were encrypted with after the others. "
        "The tokens of 0 accounts were re-encrypted.\n"
    ) == errors
    assert OTHER not in errors
    code, _, errors = await command("rotate-token-keys", DATABASE_URL=dsn)
    assert (78, True) == (code, "set ROWCAST_TOKEN_KEYS_FILE" in errors)


async def test_the_keys_of_a_mailbox_in_another_schema_are_rotated_there(empty_database: str) -> None:
    for schema in ("email_unsubscribe", "mailbox2"):
        await migrate.apply(
            empty_database, ["email_unsubscribe"], schemas={"email_unsubscribe": schema}, report=lambda _: None
        )
    async with session(empty_database) as owner:
        for schema in ("email_unsubscribe", "mailbox2"):
            token = Cipher([OLD]).encrypt(SecretStr("kept"), "gmail", "access_token")
            await owner.execute(f"insert into {schema}.oauth_tokens values ('gmail', $1, null, now(), now())", token)
        given = {"DATABASE_URL": empty_database, "ROWCAST_TOKEN_KEYS": f"{NEW} {OLD}"}
        done = await command("--schema", "mailbox2", "rotate-token-keys", **given)
        assert (0, "re-encrypted the tokens of 1 account\n", "") == done
        for schema, key in (("mailbox2", NEW), ("email_unsubscribe", OLD)):
            stored = await owner.fetchval(f"select access_token from {schema}.oauth_tokens")
            assert "kept" == Cipher([key]).decrypt(stored, "gmail", "access_token").get_secret_value()
    code, output, errors = await command("--schema", "mailbox3", "rotate-token-keys", **given)
    assert (32, "") == (code, output)
    assert "schema mailbox3 is at nothing" in errors


@pytest.mark.parametrize("keys", [[], ["short"], [OLD, "planted"]])
def test_malformed_keys_are_refused_without_showing_them(keys: list[str]) -> None:
    with pytest.raises(BadSettings) as caught:
        Cipher(keys)
    assert "planted" not in str(caught.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(EncryptionUnavailable, match="install Rowcast with the extra email_unsubscribe"):
        Cipher([OLD])


# --- What is stored --------------------------------------------------------------------------------------------


async def test_the_allow_list_holds_addresses_and_domains_once_each(store: Store) -> None:
    friend = await store.allow("email", " Friend@Family.example")
    bank = await store.allow("domain", "@Bank.example.")
    assert friend == await store.allow("email", "friend@family.example")
    assert [bank, friend] == await store.allow_list()
    assert ("email", "friend@family.example") == (friend.entry_type, friend.value)
    assert await store.disallow("domain", "BANK.example") is True
    assert await store.disallow("domain", "bank.example") is False
    assert [friend] == await store.allow_list()
    assert ["allow_list_remove", "allow_list_add", "allow_list_add"] == [e.action for e in await store.audit()]


async def test_an_attempt_is_recorded_before_and_after_it_is_made(store: Store) -> None:
    begun = await store.begin_attempt(" News@Shop.example", URL, "one_click")
    assert (SHOP, URL, "pending", None) == (
        begun.sender,
        begun.unsubscribe_url.get_secret_value(),
        begun.status,
        begun.failure_reason,
    )
    failed = await store.settle_attempt(begun.id, "HTTP 404")
    assert ("failed", "HTTP 404", begun.attempted_at) == (failed.status, failed.failure_reason, failed.attempted_at)
    assert failed == await store.settle_attempt(begun.id, "HTTP 404")
    with pytest.raises(DatabaseFault, match="can be settled once"):
        await store.settle_attempt(begun.id)
    done = await store.settle_attempt((await store.begin_attempt(SHOP, URL, "link")).id)
    assert [done, failed] == await store.history()
    assert [done] == await store.history(limit=1)
    assert "s3cr3t" not in repr(done)
    with pytest.raises(LookupError):
        await store.settle_attempt("01JH000000N0B0DY0000000000")


async def test_the_audit_log_has_all_required_details_of_an_attempt(store: Store) -> None:
    begun = await store.begin_attempt(SHOP, URL, "one_click")
    await store.settle_attempt(begun.id)
    newest, first = await store.audit()
    assert ("pending", "succeeded") == (first.outcome, newest.outcome)
    for entry in (first, newest):
        assert ("unsubscribe", SHOP, "one_click", APP) == (entry.action, entry.sender, entry.method, entry.db_role)
        assert entry.unsubscribe_url is not None
        assert URL == entry.unsubscribe_url.get_secret_value()
    assert begun.attempted_at < first.occurred_at < newest.occurred_at


async def test_login_and_logout_are_logged_with_their_times(store: Store, owner: Connection) -> None:
    before = await owner.fetchval("select clock_timestamp()")
    begun = await store.log_in("provider|1")
    ended = await store.log_out(begun.id)
    assert (begun.user_id, "logout") == (ended.user_id, ended.end_reason)
    assert ended == await store.log_out(begun.id, "expired")  # no change: it has ended
    again = await store.log_in("provider|1", TOKENS)
    assert begun.user_id == again.user_id
    assert (await store.log_out(again.id, "expired")).end_reason == "expired"
    log = (await store.audit())[::-1]
    assert ["login", "logout", "login", "session_expired"] == [entry.action for entry in log]
    assert {begun.user_id} == {entry.user_id for entry in log}
    times = [before, *(entry.occurred_at for entry in log)]
    assert times == sorted(set(times))
    with pytest.raises(LookupError):
        await store.log_out("01JH000000N0B0DY0000000000")


async def test_senders_are_tracked_for_compliance(store: Store, owner: Connection) -> None:
    assert 2 == await store.record_emails([email(1), email(2, hours=2)])
    assert 1 == await store.record_emails([email(2, hours=2), email(3, sender=" Other@Else.example", hours=-5)])
    done = await store.settle_attempt((await store.begin_attempt(SHOP, URL, "link")).id)
    after = done.attempted_at + timedelta(days=1)
    assert 1 == await store.record_emails([Email(message_id="late", sender=SHOP, received_at=after)])
    found = await store.sender("NEWS@shop.example")
    assert found is not None
    assert (SHOP, START, after, done.attempted_at, 1) == (
        found.sender,
        found.first_seen,
        found.last_seen,
        found.unsubscribed_at,
        found.emails_after_unsubscribe,
    )
    assert [SHOP, "other@else.example"] == [sender.sender for sender in await store.senders()]
    assert None is await store.sender("nobody@else.example")


@pytest.mark.parametrize("sender", ["", "shop.example", "a b@shop.example", "x" * 320 + "@a"])
def test_a_malformed_address_is_refused_before_it_is_sent(sender: str) -> None:
    with pytest.raises(ValidationError):
        Email(message_id="1", sender=sender, received_at=START)


# --- Reliability -----------------------------------------------------------------------------------------------


async def test_many_operations_share_a_few_connections(dsn: str, owner: Connection) -> None:
    async with opened(dsn, max_size=2) as store:
        meeting = asyncio.Barrier(2)

        async def work(connection: Connection) -> int:
            await meeting.wait()  # passes only when two are at work at once
            return await pid_of(connection)

        pids = await asyncio.gather(*(store.run(work) for _ in range(20)))
        assert 2 == len(set(pids))
        connections = "select count(*) from pg_stat_activity where usename = $1 and datname = current_database()"
        assert 2 == await owner.fetchval(connections, APP)


async def test_an_operation_of_several_steps_is_atomic(store: Store, owner: Connection) -> None:
    async def work(connection: Connection) -> None:
        await connection.execute("insert into email_unsubscribe.users (subject) values ('provider|1')")
        await connection.execute("insert into email_unsubscribe.sender_emails values ('m', 'a@b.example', now())")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.run(work)
    for table in ("users", "sender_emails", "senders"):
        assert 0 == await owner.fetchval(f"select count(*) from email_unsubscribe.{table}")


async def test_a_login_whose_session_cannot_begin_leaves_neither_user_nor_tokens(
    store: Store, owner: Connection
) -> None:
    await owner.execute("alter table email_unsubscribe.sessions add check (started_at < '2000-01-01')")
    with pytest.raises(DatabaseFault, match="violates check constraint"):
        await store.log_in("provider|1", TOKENS)
    for table in ("users", "oauth_tokens", "sessions", "audit_log"):
        assert 0 == await owner.fetchval(f"select count(*) from email_unsubscribe.{table}")


ONE, TWO = "one@a.example", "two@b.example"


async def test_a_deadlock_is_resolved_and_the_loser_retries(store: Store, owner: Connection, dsn: str) -> None:
    await store.record_emails([email(1, sender=ONE), email(2, sender=TWO)])
    # This session never checks for deadlocks, so Postgres aborts the store's transaction.
    await owner.execute("set deadlock_timeout = '10min'")
    other = owner.transaction()
    await other.start()
    lock = "select from email_unsubscribe.senders where sender = $1 for update"
    await owner.execute(lock, TWO)
    attempts = 0
    crossing: list[asyncio.Task[Any]] = []

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        insert = "insert into email_unsubscribe.sender_emails values ($1, $2, $3)"
        await connection.execute(insert, "m-3", ONE, START)
        if attempts == 1:
            crossing.append(asyncio.create_task(owner.execute(lock, ONE)))
            await until_waiting(watcher, owner.get_server_pid())
        await connection.execute(insert, "m-4", TWO, START)

    async with session(dsn) as watcher:
        running = asyncio.create_task(store.run(work))
        while not crossing:
            await asyncio.sleep(0)
        await crossing[0]  # the store's transaction was rolled back
        await other.commit()
        await running
    assert 2 == attempts
    assert 4 == await owner.fetchval("select count(*) from email_unsubscribe.sender_emails")
    assert "0" != await owner.fetchval(
        "select deadlocks::text from pg_stat_database where datname = current_database()"
    )


async def test_a_connection_lost_during_work_is_replaced_and_the_work_done_once(
    store: Store, owner: Connection
) -> None:
    pids: list[int] = []

    async def work(connection: Connection) -> None:
        pids.append(await pid_of(connection))
        await connection.execute("insert into email_unsubscribe.sender_emails values ('m', $1, $2)", SHOP, START)
        if len(pids) == 1:
            assert await owner.fetchval("select pg_terminate_backend($1)", pids[0])
            await until_gone(owner, pids[0])
        await connection.execute("select 1")

    await store.run(work)
    assert 2 == len(set(pids))
    assert 1 == await owner.fetchval("select count(*) from email_unsubscribe.sender_emails")


async def test_connections_lost_while_idle_are_replaced_silently(store: Store, owner: Connection) -> None:
    pid = await store.run(pid_of)
    assert await owner.fetchval("select pg_terminate_backend($1)", pid)
    await until_gone(owner, pid)
    assert pid != await store.run(pid_of)
    assert 1 == await store.record_emails([email(1)])


async def test_a_connection_with_an_internal_driver_error_is_replaced(store: Store) -> None:
    """asyncpg raises it for a connection that the server has closed, before it reads the end of the stream."""
    pids: list[int] = []

    async def work(connection: Connection) -> None:
        pids.append(await pid_of(connection))
        if len(pids) == 1:
            raise asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress")

    await store.run(work)
    assert 2 == len(set(pids))


async def test_retries_wait_for_delays_that_double(dsn: str) -> None:
    delays: list[float] = []

    def record(details: RetryDetails) -> None:
        delays.append(details.wait_for)

    async def deadlock(connection: Connection) -> None:
        await connection.execute("do $$ begin raise exception using errcode = 'deadlock_detected'; end $$")

    async with opened(dsn, attempts=4) as store:
        set_on_retry_hooks([record])
        try:
            with pytest.raises(LockContention):
                await store.run(deadlock)
        finally:
            set_on_retry_hooks(())
    assert 3 == len(delays)
    for number, delay in enumerate(delays):  # plus up to half a second of jitter
        assert 0.1 * 2**number <= delay <= 0.1 * 2**number + 0.5


@pytest.mark.parametrize(
    "sqlstate", ["deadlock_detected", "serialization_failure", "connection_failure", "admin_shutdown"]
)
async def test_transient_errors_are_retried_until_success(store: Store, sqlstate: str) -> None:
    attempts = 0

    async def work(connection: Connection) -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 2:
            await connection.execute(f"do $$ begin raise exception using errcode = '{sqlstate}'; end $$")
        return "done"

    assert "done" == await store.run(work)
    assert 2 == attempts


async def test_permanent_errors_are_not_retried(store: Store) -> None:
    attempts = 0

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("select 1/0")

    with pytest.raises(DatabaseFault) as caught:
        await store.run(work)
    assert not isinstance(caught.value, TemporarilyUnavailable)
    assert 1 == attempts


async def test_work_committed_without_a_confirmation_is_not_done_twice(
    store: Store, owner: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each method runs again after its own commit, as after a lost confirmation."""
    run = Store.run

    async def twice(self: Store, work: Any) -> Any:
        await run(self, work)
        return await run(self, work)

    monkeypatch.setattr(Store, "run", twice)
    begun = await store.begin_attempt(SHOP, URL, "link")
    await store.settle_attempt(begun.id)
    login = await store.log_in("provider|1", TOKENS)
    await store.log_out(login.id)
    await store.allow("email", "friend@family.example")
    await store.record_emails([email(1), email(2)])
    counts = {
        table: await owner.fetchval(f"select count(*) from email_unsubscribe.{table}")
        for table in ("unsubscribe_history", "sessions", "users", "oauth_tokens", "allow_list", "sender_emails")
    }
    assert {
        "unsubscribe_history": 1,
        "sessions": 1,
        "users": 1,
        "oauth_tokens": 1,
        "allow_list": 1,
        "sender_emails": 2,
    } == counts
    log = await owner.fetch("select action, outcome from email_unsubscribe.audit_log order by id")
    assert [
        ("unsubscribe", "pending"),
        ("unsubscribe", "succeeded"),
        ("login", None),
        ("logout", None),
        ("allow_list_add", None),
    ] == [tuple(entry) for entry in log]


async def test_a_retry_is_logged_with_its_reason(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    retries: list[tuple[str, int]] = []
    monkeypatch.setattr(store_module, "_log_retry", lambda fault, attempt: retries.append((str(fault), attempt)))

    async def work(connection: Connection) -> None:
        if not retries:
            await connection.execute("do $$ begin raise 'the other one came first' using errcode = '40P01'; end $$")

    await store.run(work)
    assert [("Other transactions were in the way (the other one came first): try again later.", 1)] == retries
