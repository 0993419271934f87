"""The unsubscriber's schema against its specification, in a real Postgres.

Tests with `db` or `mailbox` run in a transaction that is rolled back.
"""
# ruff: noqa: RUF001 - addresses in other alphabets

import asyncio
import json
import re
import unicodedata
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import pytest

from daemon.extensions.email_unsubscribe.models import Email
from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.packs.databases import session, undone
from tests.packs.unsubscriber import unsubscriber, until_waiting
from tests.support.cases import for_each
from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]

# Table, column, type, nullability and default. Columns that the specification names are marked *.
COLUMNS_AS_SPECIFIED = """
users                id                        character varying(26)     not null  rowcast.ulid()
users                subject                   character varying(255)    not null  -
users                created_at                timestamp with time zone  not null  CURRENT_TIMESTAMP
sessions             id                        character varying(26)     not null  rowcast.ulid()
sessions             user_id                   character varying(26)     not null  -
sessions             started_at                timestamp with time zone  not null  CURRENT_TIMESTAMP
sessions             ended_at                  timestamp with time zone  null      -
sessions             end_reason                character varying(50)     null      -
oauth_tokens         account                   character varying(255)    not null  -
oauth_tokens         access_token *            text                      not null  -
oauth_tokens         refresh_token *           text                      null      -
oauth_tokens         expiry *                  timestamp with time zone  not null  -
oauth_tokens         encrypted_at *            timestamp with time zone  not null  -
allow_list           id                        character varying(26)     not null  rowcast.ulid()
allow_list           entry_type *              character varying(50)     not null  -
allow_list           value *                   character varying(320)    not null  -
allow_list           created_at *              timestamp with time zone  not null  CURRENT_TIMESTAMP
allow_list           domain                    character varying(255)    not null  generated
senders              id                        character varying(26)     not null  rowcast.ulid()
senders              sender *                  character varying(320)    not null  -
senders              first_seen *              timestamp with time zone  not null  -
senders              last_seen *               timestamp with time zone  not null  -
senders              unsubscribed_at *         timestamp with time zone  null      -
senders              emails_after_unsubscribe *  integer                 not null  -
senders              domain                    character varying(255)    not null  generated
sender_emails        message_id                character varying(255)    not null  -
sender_emails        sender                    character varying(320)    not null  -
sender_emails        received_at               timestamp with time zone  not null  -
unsubscribe_history  id                        character varying(26)     not null  rowcast.ulid()
unsubscribe_history  sender *                  character varying(320)    not null  -
unsubscribe_history  unsubscribe_url *         text                      not null  -
unsubscribe_history  method                    character varying(50)     not null  -
unsubscribe_history  attempted_at *            timestamp with time zone  not null  CURRENT_TIMESTAMP
unsubscribe_history  status *                  character varying(50)     not null  'pending'::character varying
unsubscribe_history  failure_reason *          text                      null      -
unsubscribe_history  domain                    character varying(255)    not null  generated
audit_log            id                        character varying(26)     not null  rowcast.ulid()
audit_log            occurred_at *             timestamp with time zone  not null  clock_timestamp()
audit_log            action *                  character varying(50)     not null  -
audit_log            db_role                   text                      not null  SESSION_USER
audit_log            sender *                  character varying(320)    null      -
audit_log            unsubscribe_url *         text                      null      -
audit_log            method *                  character varying(50)     null      -
audit_log            outcome *                 character varying(50)     null      -
audit_log            entry_type *              character varying(50)     null      -
audit_log            entry_value *             character varying(320)    null      -
audit_log            user_id *                 character varying(26)     null      -
audit_log            session_id                character varying(26)     null      -
"""
COLUMNS = [tuple(re.split(r"\s{2,}", line.replace(" *", "  "))) for line in COLUMNS_AS_SPECIFIED.strip().splitlines()]
TABLES = list(dict.fromkeys(column[0] for column in COLUMNS))

OWNER = "01JH000000VSER00000000WNER"
SESSION = "01JH000000SESS00000000000A"
NOBODY = "01JH000000N0B0DY0000000000"
SHOP = "news@shop.example"
URL = "https://shop.example/unsubscribe/a1b2?token=s3cr3t"
START = datetime(2026, 1, 10, 12, tzinfo=UTC)
# A Fernet token: version, eight bytes of time, initialization vector, one block and signature.
ENCRYPTED = "gAAAAA" + "B" * 92 + "=="

# One row of each table, complete but for its defaults.
SAMPLES: Mapping[str, Mapping[str, object]] = {
    "users": {"subject": "provider|2"},
    "sessions": {"user_id": OWNER},
    "oauth_tokens": {"account": "gmail", "access_token": ENCRYPTED, "expiry": START, "encrypted_at": START},
    "allow_list": {"entry_type": "email", "value": "friend@family.example"},
    "senders": {
        "sender": "other@else.example",
        "first_seen": START,
        "last_seen": START,
        "emails_after_unsubscribe": 0,
    },
    "sender_emails": {"message_id": "m-9", "sender": SHOP, "received_at": START},
    "unsubscribe_history": {"sender": SHOP, "unsubscribe_url": URL, "method": "one_click"},
    "audit_log": {"action": "login", "user_id": OWNER, "session_id": SESSION},
}

MALFORMED_IDS = ["", "01JH", OWNER.lower(), "8" + OWNER[1:], OWNER[:-1] + "U"]
NO_ADDRESS = ["", "shop.example", "a b@shop.example", "news@", "@shop.example", "a@b@"]
NO_CIPHERTEXT = ["", "ya29.a0AfH6SMBx", "1//0gK-refresh", "gAAAAAshort", "x" + ENCRYPTED, ENCRYPTED + "\n"]
# Checks that cannot be violated, since a trigger normalises the value first.
NEVER_SEEN = {
    "allow_list_value_in_normal_form",
    "sender_emails_sender_in_normal_form",
    "unsubscribe_history_sender_in_normal_form",
}
# Invisible characters at the ends are removed; control characters inside stay, and are refused.
UNSEEN_INSIDE = ["a\x01b@shop.example", "ab@shop\x7f.example"]

# One sender each, as people and programs write the address.
SPELLINGS = {
    "σασ@shop.example": ["ΣΑΣ@shop.example", "σας@SHOP.example", "σασ@shop.example."],
    "ipek@shop.example": ["İpek@shop.example", "IPEK@shop.example", "i\u0307pek@shop.example", "ipek@shop.example.."],
    "news@shop.example": [
        "\u00a0news@shop.example",
        "news@shop.example\u2003\n",
        "ne\u200bws@sh\u00adop.example",
        "\ufeffNEWS@Shop.Example.",
        "ｎｅｗｓ＠ｓｈｏｐ．ｅｘａｍｐｌｅ",
        "news@shop。example",
    ],
    "josé@shop.example": ["JOSÉ@shop.example", "jose\u0301@shop.example", "JOSE\u0301@SHOP.EXAMPLE"],
    "straße@shop.example": ["STRAẞE@shop.example"],
    "д@пример.example": ["Д@ПРИМЕР.example"],
}

# For every check constraint, rows that violate it and no other.
VIOLATIONS: dict[str, tuple[str, Sequence[Mapping[str, object]]]] = {
    **{
        f"{table}_id_is_ulid": (table, [{"id": id_} for id_ in MALFORMED_IDS])
        for table in TABLES
        if table not in {"oauth_tokens", "sender_emails"}
    },
    "users_subject_not_empty": ("users", [{"subject": ""}]),
    "sessions_end_reason_known": ("sessions", [{"ended_at": START.replace(year=2100), "end_reason": "bored"}]),
    "sessions_end_is_whole": (
        "sessions",
        [{"ended_at": START.replace(year=2100)}, {"end_reason": "logout"}],
    ),
    "sessions_end_behind_start": ("sessions", [{"ended_at": START.replace(year=2000), "end_reason": "logout"}]),
    "oauth_tokens_account_not_empty": ("oauth_tokens", [{"account": ""}]),
    "oauth_tokens_access_token_is_encrypted": ("oauth_tokens", [{"access_token": text} for text in NO_CIPHERTEXT]),
    "oauth_tokens_refresh_token_is_encrypted": ("oauth_tokens", [{"refresh_token": text} for text in NO_CIPHERTEXT]),
    "allow_list_entry_type_known": ("allow_list", [{"entry_type": word} for word in ("", "Email", "everybody")]),
    "allow_list_value_fits_type": (
        "allow_list",
        [
            *[{"entry_type": "email", "value": value} for value in NO_ADDRESS],
            *[{"entry_type": "domain", "value": value} for value in ("", "@", "a@b", "shop example")],
        ],
    ),
    "senders_seen_in_order": ("senders", [{"last_seen": START - timedelta(seconds=1)}]),
    "senders_emails_after_unsubscribe_not_negative": (
        "senders",
        [{"emails_after_unsubscribe": -1, "unsubscribed_at": START}],
    ),
    "senders_emails_after_unsubscribe_need_one": ("senders", [{"emails_after_unsubscribe": 1}]),
    "sender_emails_message_id_not_empty": ("sender_emails", [{"message_id": ""}]),
    "sender_emails_sender_well_formed": ("sender_emails", [{"sender": value} for value in UNSEEN_INSIDE]),
    "unsubscribe_history_sender_well_formed": (
        "unsubscribe_history",
        [{"sender": value} for value in UNSEEN_INSIDE],
    ),
    "allow_list_value_well_formed": ("allow_list", [{"value": value} for value in UNSEEN_INSIDE]),
    "unsubscribe_history_url_well_formed": (
        "unsubscribe_history",
        [{"unsubscribe_url": f"https://shop.example/{blank}u"} for blank in " \n\u00a0\u200b"],
    ),
    "users_subject_visible": ("users", [{"subject": text} for text in (" ", "\u00a0", "\u200b")]),
    "oauth_tokens_account_visible": ("oauth_tokens", [{"account": text} for text in (" ", "\u00a0", "\u200b")]),
    "sender_emails_sender_is_address": ("sender_emails", [{"sender": value} for value in NO_ADDRESS]),
    "unsubscribe_history_sender_is_address": ("unsubscribe_history", [{"sender": value} for value in NO_ADDRESS]),
    "unsubscribe_history_method_known": (
        "unsubscribe_history",
        [{"method": "telepathy", "unsubscribe_url": "mailto:a"}],
    ),
    "unsubscribe_history_url_fits_method": (
        "unsubscribe_history",
        [
            {"unsubscribe_url": "http://shop.example/u"},
            {"unsubscribe_url": "https://"},
            {"unsubscribe_url": "javascript:alert(1)", "method": "link"},
            {"unsubscribe_url": URL, "method": "mailto"},
        ],
    ),
    "unsubscribe_history_status_known": ("unsubscribe_history", [{"status": "done"}]),
    "unsubscribe_history_failure_has_reason": (
        "unsubscribe_history",
        [
            {"status": "failed"},
            {"status": "failed", "failure_reason": ""},
            {"status": "succeeded", "failure_reason": "none"},
            {"failure_reason": "not yet"},
        ],
    ),
    "audit_log_action_known": ("audit_log", [{"action": "coffee"}]),
    "audit_log_method_known": (
        "audit_log",
        [
            {
                "action": "unsubscribe",
                "sender": SHOP,
                "unsubscribe_url": URL,
                "method": "x",
                "outcome": "failed",
                "user_id": None,
                "session_id": None,
            }
        ],
    ),
    "audit_log_outcome_known": (
        "audit_log",
        [
            {
                "action": "unsubscribe",
                "sender": SHOP,
                "unsubscribe_url": URL,
                "method": "link",
                "outcome": "x",
                "user_id": None,
                "session_id": None,
            }
        ],
    ),
    "audit_log_entry_type_known": (
        "audit_log",
        [{"action": "allow_list_add", "entry_type": "x", "entry_value": SHOP, "user_id": None, "session_id": None}],
    ),
    "audit_log_tells_all": (
        "audit_log",
        [
            {"session_id": None},
            {"sender": SHOP},
            {
                "action": "unsubscribe",
                "sender": SHOP,
                "method": "link",
                "outcome": "failed",
                "user_id": None,
                "session_id": None,
            },
            {"action": "allow_list_add", "entry_type": "email", "user_id": None, "session_id": None},
        ],
    ),
}


async def insert(db: Connection, table: str, /, **values: object) -> asyncpg.Record:
    """Insert the sample row of a table, with `values` in place of its own."""
    row = {**SAMPLES[table], **values}
    places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    statement = f"insert into email_unsubscribe.{table} ({', '.join(row)}) values ({places}) returning *"
    inserted = await db.fetchrow(statement, *row.values())
    assert inserted is not None
    return inserted


async def one_mailbox(db: Connection) -> None:
    """The owner is logged in; the shop has written twice, and there is no unsubscribe attempt yet."""
    await insert(db, "users", id=OWNER, subject="provider|1")
    await insert(db, "sessions", id=SESSION)
    await insert(db, "sender_emails", message_id="m-1", received_at=START)
    await insert(db, "sender_emails", message_id="m-2", received_at=START + timedelta(days=2))


@pytest.fixture
async def mailbox(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "email-unsubscribe-mailbox", one_mailbox) as connection:
        yield connection


@pytest.fixture
async def dsn(postgres: Server) -> AsyncIterator[str]:
    """A database of its own, for tests with several sessions."""
    async with unsubscriber(postgres) as found:
        yield found


async def facts(db: Connection, sender: str = SHOP) -> tuple[object, ...] | None:
    """first_seen, last_seen, unsubscribed_at and emails_after_unsubscribe of a sender."""
    row = await db.fetchrow(
        "select first_seen, last_seen, unsubscribed_at, emails_after_unsubscribe"
        " from email_unsubscribe.senders where sender = $1",
        sender,
    )
    return None if row is None else tuple(row)


async def audited(db: Connection) -> list[dict[str, object]]:
    """The audit log, oldest first, without ids, times, roles and nulls."""
    rows = await db.fetch("select * from email_unsubscribe.audit_log order by id")
    return [
        {k: v for k, v in row.items() if v is not None and k not in {"id", "occurred_at", "db_role"}} for row in rows
    ]


# --- Structure -------------------------------------------------------------------------------------------------


async def test_the_tables_are_those_specified_and_those_they_need(db: Connection) -> None:
    tables = await db.fetch(
        "select tablename from pg_tables where schemaname = 'email_unsubscribe' and tablename <> 'alembic_version'"
    )
    assert sorted(TABLES) == sorted(table["tablename"] for table in tables)


@for_each("table", TABLES)
async def test_a_table_stores_what_the_specification_says(db: Connection, table: str) -> None:
    columns = await db.fetch(
        "select a.attname, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull,"
        "       case when a.attgenerated <> '' then 'generated'"
        "            else coalesce(pg_get_expr(d.adbin, d.adrelid), '-') end as default"
        " from pg_attribute a left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)"
        " where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum",
        f"email_unsubscribe.{table}",
    )
    assert [column for column in COLUMNS if column[0] == table] == [
        (table, c["attname"], c["type"], "not null" if c["attnotnull"] else "null", c["default"]) for c in columns
    ]


@for_each("table", TABLES)
async def test_a_required_column_refuses_null(mailbox: Connection, table: str) -> None:
    for column in [c[1] for c in COLUMNS if c[0] == table and c[3] == "not null" and c[4] != "generated"]:
        with pytest.raises(asyncpg.NotNullViolationError) as caught:
            async with mailbox.transaction():
                await insert(mailbox, table, **{column: None})
        assert column == caught.value.column_name or (column, "domain") == ("value", caught.value.column_name)


@for_each("constraint", VIOLATIONS)
async def test_every_check_constraint_refuses_its_violations(mailbox: Connection, constraint: str) -> None:
    table, rows = VIOLATIONS[constraint]
    for row in rows:
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with mailbox.transaction():
                await insert(mailbox, table, **row)
        assert constraint == caught.value.constraint_name, row


async def test_every_check_constraint_is_tested(db: Connection) -> None:
    checks = await db.fetch(
        "select conname from pg_constraint where connamespace = 'email_unsubscribe'::regnamespace and contype = 'c'"
    )
    assert set(VIOLATIONS) | NEVER_SEEN == {check["conname"] for check in checks}


@for_each(
    ("table", "values", "constraint"),
    [
        ("users", {"subject": "provider|1"}, "users_subject_key"),
        ("sender_emails", {"message_id": "m-1"}, "sender_emails_pkey"),
        ("senders", {"sender": SHOP}, "senders_sender_key"),
    ],
)
async def test_a_duplicate_of_a_unique_value_is_refused(
    mailbox: Connection, table: str, values: dict[str, object], constraint: str
) -> None:
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(mailbox, table, **values)
    assert constraint == caught.value.constraint_name


# --- Allow list ------------------------------------------------------------------------------------------------


@for_each(
    ("entry_type", "written", "kept", "domain"),
    [
        ("email", " Friend@Family.Example ", "friend@family.example", "family.example"),
        ("email", '"odd@name"@Family.example', '"odd@name"@family.example', "family.example"),
        ("domain", "Shop.EXAMPLE", "shop.example", "shop.example"),
        ("domain", "@shop.example.", "shop.example", "shop.example"),
    ],
)
async def test_an_allow_list_entry_is_stored_normalised(
    db: Connection, entry_type: str, written: str, kept: str, domain: str
) -> None:
    row = await insert(db, "allow_list", entry_type=entry_type, value=written)
    assert (kept, domain) == (row["value"], row["domain"])
    assert row["created_at"] == await db.fetchval("select now()")


async def test_an_entry_that_differs_only_in_spelling_is_a_duplicate(db: Connection) -> None:
    await insert(db, "allow_list", value="friend@family.example")
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(db, "allow_list", value="FRIEND@family.example ")
    assert "allow_list_entry_type_value_key" == caught.value.constraint_name


# --- Senders ---------------------------------------------------------------------------------------------------


async def unsubscribe(db: Connection, sender: str = SHOP, *, at: datetime, status: str = "succeeded") -> str:
    """Insert an attempt, and return its id."""
    reason = "no answer" if status == "failed" else None
    row = await insert(
        db, "unsubscribe_history", sender=sender, attempted_at=at, status=status, failure_reason=reason
    )
    return str(row["id"])


async def test_a_sender_is_tracked_from_the_first_email_to_the_last(mailbox: Connection) -> None:
    assert (START, START + timedelta(days=2), None, 0) == await facts(mailbox)
    for number, days in enumerate((5, -1, 3)):
        await insert(mailbox, "sender_emails", message_id=str(number), received_at=START + timedelta(days=days))
    assert (START - timedelta(days=1), START + timedelta(days=5), None, 0) == await facts(mailbox)


async def test_another_spelling_of_an_address_is_the_same_sender(mailbox: Connection) -> None:
    await insert(mailbox, "sender_emails", sender=" News@SHOP.example\n", received_at=START + timedelta(days=9))
    assert [(SHOP, "shop.example")] == [
        tuple(row) for row in await mailbox.fetch("select sender, domain from email_unsubscribe.senders")
    ]


@for_each(("sender", "spellings"), SPELLINGS.items())
async def test_case_blanks_and_unicode_forms_do_not_make_two_senders_of_one(
    mailbox: Connection, sender: str, spellings: list[str]
) -> None:
    for number, spelling in enumerate([sender, *spellings]):
        await insert(mailbox, "sender_emails", message_id=f"s-{number}", sender=spelling)
        await unsubscribe(mailbox, spelling, at=START)
    senders = (
        "select sender from email_unsubscribe.senders where domain <> 'shop.example' or sender <> $1 or sender = $2"
    )
    assert [sender] == [row["sender"] for row in await mailbox.fetch(senders, SHOP, sender)]
    await insert(mailbox, "allow_list", value=spellings[0])
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(mailbox, "allow_list", value=spellings[-1])


async def normal(db: Connection, texts: list[str]) -> list[str]:
    rows = await db.fetch(
        "select email_unsubscribe.normalised_address(t) as form from unnest($1::text[]) with ordinality as t (t, n)"
        " order by n",
        texts,
    )
    return [row["form"] for row in rows]


def respelled(address: str) -> list[str]:
    """The address in other letters and Unicode forms, where Python takes them for the same."""
    capitals = "".join(c.upper() if c.upper().lower() == c else c for c in address)
    return [
        capitals,
        *(unicodedata.normalize(form, address) for form in ("NFC", "NFD", "NFKC", "NFKD")),
        unicodedata.normalize("NFD", capitals),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in address),
        f"\u00a0\t{address}\u2009\r\n",
        "\u200b".join(address),
        f"{address}. ",
    ]


async def test_every_spelling_of_an_address_has_one_normal_form_which_is_its_own(db: Connection) -> None:
    """In the database, the only place that decides: the data layer passes addresses as they are."""
    random = Random(7)
    characters = [
        chr(code)
        for code in range(0x21, 0x2FFFF)
        if unicodedata.category(chr(code)) in ("Ll", "Lu", "Lt", "Lo", "Nd", "Mn", "Mc", "Po", "Pd")
    ]
    for _ in range(150):
        address = (
            "".join(random.choices(characters, k=8)) + "@" + "".join(random.choices(characters, k=5)) + ".example"
        )
        spellings = [address, *respelled(address)]
        forms = await normal(db, spellings)
        assert forms == await normal(db, forms), ascii(address)
        assert {forms[0]} == set(forms), (ascii(address), [ascii(form) for form in forms])


async def test_lower_case_is_that_of_unicode(db: Connection) -> None:
    """Each letter that has a small one of its own, compared with Python's tables."""
    characters = [
        chr(code)
        for code in range(0x80, 0x1F000)
        if unicodedata.normalize("NFKC", chr(code)) == chr(code) and unicodedata.category(chr(code)) != "Cs"
    ]
    small = await db.fetchval("select email_unsubscribe.small_letters($1)", "".join(characters))
    assert len(characters) == len(small)
    mapped = {before: after for before, after in zip(characters, small, strict=True) if before != after}
    assert "i" == mapped.pop("İ")
    assert len(mapped) > 1300
    wrong = {letter: small for letter, small in mapped.items() if small not in (letter.lower(), letter.casefold())}
    assert {} == wrong


def test_the_data_layer_passes_an_address_as_it_is() -> None:
    for sender, spellings in SPELLINGS.items():
        for spelling in (sender, *spellings):
            assert spelling == Email(message_id="1", sender=spelling, received_at=START).sender


async def test_senders_that_were_two_by_spelling_are_merged_by_the_migration(empty_database: str) -> None:
    async def apply() -> None:
        await migrate.apply(empty_database, ["email_unsubscribe"], report=lambda _: None)

    await apply()
    await migrate.rollback(empty_database, "email_unsubscribe", to="email_unsubscribe_0003", report=lambda _: None)
    async with session(empty_database) as db:
        for number, spelling in enumerate(("josé@shop.example", "jose\u0301@shop.example", "news@shop.example.")):
            await insert(db, "sender_emails", message_id=str(number), sender=spelling)
            await insert(
                db, "unsubscribe_history", sender=spelling, attempted_at=START - timedelta(days=1), status="succeeded"
            )
            await insert(db, "allow_list", value=spelling)
        logged = await db.fetchval("select count(*) from email_unsubscribe.audit_log where action = 'unsubscribe'")
    await apply()
    async with session(empty_database) as db:
        senders = await db.fetch(
            "select sender, emails_after_unsubscribe as after from email_unsubscribe.senders order by sender"
        )
        assert [("josé@shop.example", 2), ("news@shop.example", 1)] == [tuple(row) for row in senders]
        allowed = await db.fetch("select value from email_unsubscribe.allow_list order by value")
        assert ["josé@shop.example", "news@shop.example"] == [row["value"] for row in allowed]
        assert logged == await db.fetchval(
            "select count(*) from email_unsubscribe.audit_log where action = 'unsubscribe'"
        )
        with pytest.raises(asyncpg.RestrictViolationError):
            await db.execute("update email_unsubscribe.unsubscribe_history set status = 'pending'")


async def test_emails_after_an_unsubscribe_that_succeeded_are_counted(mailbox: Connection) -> None:
    at = START + timedelta(days=1)
    await unsubscribe(mailbox, at=START, status="failed")
    await unsubscribe(mailbox, at=at)
    assert (START, START + timedelta(days=2), at, 1) == await facts(mailbox)
    await insert(mailbox, "sender_emails", message_id="late", received_at=START + timedelta(hours=23))
    await insert(mailbox, "sender_emails", message_id="new", received_at=START + timedelta(days=3))
    assert (START, START + timedelta(days=3), at, 2) == await facts(mailbox)


async def test_an_attempt_that_is_settled_later_counts_from_when_it_was_made(mailbox: Connection) -> None:
    at = START + timedelta(days=1)
    attempt = await unsubscribe(mailbox, at=at, status="pending")
    assert (START, START + timedelta(days=2), None, 0) == await facts(mailbox)
    await mailbox.execute(
        "update email_unsubscribe.unsubscribe_history set status = 'succeeded' where id = $1", attempt
    )
    assert (START, START + timedelta(days=2), at, 1) == await facts(mailbox)


async def test_a_second_success_does_not_change_unsubscribed_at(mailbox: Connection) -> None:
    await unsubscribe(mailbox, at=START + timedelta(days=1))
    await unsubscribe(mailbox, at=START + timedelta(days=3))
    found = await facts(mailbox)
    assert found is not None
    assert (START + timedelta(days=1), 1) == found[2:]


async def test_a_sender_known_only_by_an_attempt_was_first_seen_at_its_time(mailbox: Connection) -> None:
    await unsubscribe(mailbox, "other@else.example", at=START)
    assert (START, START, START, 0) == await facts(mailbox, "other@else.example")


async def test_an_email_that_is_recorded_twice_counts_once(mailbox: Connection) -> None:
    await unsubscribe(mailbox, at=START)
    again = "insert into email_unsubscribe.sender_emails values ('m-2', $1, $2) on conflict do nothing"
    before = await facts(mailbox)
    await mailbox.execute(again, SHOP, START + timedelta(days=40))
    assert before == await facts(mailbox)


@for_each("statement", ["delete from", "truncate"])
async def test_a_sender_without_emails_or_attempts_is_deleted(mailbox: Connection, statement: str) -> None:
    await mailbox.execute(f"{statement} email_unsubscribe.sender_emails")
    assert await facts(mailbox) is None


TALLY = """
    select x.sender,
           coalesce(min(x.at) filter (where x.email), min(x.at)) as first_seen,
           coalesce(max(x.at) filter (where x.email), min(x.at)) as last_seen,
           min(x.at) filter (where x.done) as unsubscribed_at,
           count(*) filter (where x.email and x.at > (
               select min(h.attempted_at) from email_unsubscribe.unsubscribe_history h
               where h.sender = x.sender and h.status = 'succeeded'))::integer as emails_after_unsubscribe
    from (select sender, received_at as at, true as email, false as done from email_unsubscribe.sender_emails
          union all
          select sender, attempted_at, false, status = 'succeeded' from email_unsubscribe.unsubscribe_history) as x
    group by x.sender order by x.sender
"""


@for_each("seed", range(5))
async def test_the_numbers_of_a_sender_never_drift(db: Connection, seed: int) -> None:
    random = Random(seed)
    people = ["a@x.example", "b@x.example", "c@y.example"]

    def some_time() -> datetime:
        return START + timedelta(hours=random.randrange(100))

    for step in range(60):
        match random.randrange(8):
            case 0 | 1 | 2:
                emails = [(f"{step}-{n}", random.choice(people), some_time()) for n in range(random.randint(1, 4))]
                await db.execute(
                    "insert into email_unsubscribe.sender_emails"
                    " select * from unnest($1::text[], $2::text[], $3::timestamptz[])",
                    *map(list, zip(*emails, strict=True)),
                )
            case 3 | 4:
                status = random.choice(["pending", "succeeded", "failed"])
                await unsubscribe(db, random.choice(people), at=some_time(), status=status)
            case 5:
                await db.execute(
                    "update email_unsubscribe.unsubscribe_history set status = 'succeeded' where id ="
                    " (select min(id) from email_unsubscribe.unsubscribe_history where status = 'pending')"
                )
            case 6:
                await db.execute(
                    "update email_unsubscribe.sender_emails set sender = $1, received_at = $2 where message_id ="
                    " (select min(message_id) from email_unsubscribe.sender_emails)",
                    random.choice(people),
                    some_time(),
                )
            case _:
                table, key = random.choice([("sender_emails", "message_id"), ("unsubscribe_history", "id")])
                await db.execute(
                    f"delete from email_unsubscribe.{table} where {key} ="
                    f" (select max({key}) from email_unsubscribe.{table})"
                )
    kept = await db.fetch(
        "select sender, first_seen, last_seen, unsubscribed_at, emails_after_unsubscribe"
        " from email_unsubscribe.senders order by sender"
    )
    assert [tuple(row) for row in await db.fetch(TALLY)] == [tuple(row) for row in kept]
    assert kept


async def test_two_sessions_that_add_the_same_new_sender_both_count(dsn: str) -> None:
    async with session(dsn) as one, session(dsn) as two, session(dsn) as watcher:
        await unsubscribe(one, at=START)
        late = START + timedelta(days=1)
        first = one.transaction()
        await first.start()
        await insert(one, "sender_emails", message_id="1", received_at=late)
        await insert(one, "sender_emails", message_id="2", sender="new@else.example", received_at=late)
        other = asyncio.create_task(
            two.execute(
                "insert into email_unsubscribe.sender_emails values ('3', $1, $3), ('4', $2, $4)",
                SHOP,
                "new@else.example",
                late,
                START,
            )
        )
        await until_waiting(watcher, two.get_server_pid())
        await first.commit()
        await other
        assert (late, late, START, 2) == await facts(watcher)
        assert (START, late, None, 0) == await facts(watcher, "new@else.example")


async def test_two_sessions_that_count_emails_of_one_sender_miss_none(dsn: str) -> None:
    async with session(dsn) as one, session(dsn) as two, session(dsn) as holder:
        await unsubscribe(holder, at=START)
        late = START + timedelta(days=1)
        holding = holder.transaction()
        await holding.start()
        await holder.execute("select from email_unsubscribe.senders for update")
        counting = []
        for number, counter in enumerate((one, two)):  # both run until they need the lock on the sender's row
            work = insert(counter, "sender_emails", message_id=str(number), received_at=late)
            counting.append(asyncio.create_task(work))
            await until_waiting(holder, counter.get_server_pid())
        await holding.rollback()
        await asyncio.gather(*counting)
        assert (late, late, START, 2) == await facts(holder)


async def test_counting_in_an_old_snapshot_fails_rather_than_miscounts(dsn: str) -> None:
    async with session(dsn) as one, session(dsn) as two:
        for number, days in enumerate((0, 9)):
            await insert(one, "sender_emails", message_id=str(number), received_at=START + timedelta(days=days))
        old = two.transaction(isolation="repeatable_read")
        await old.start()
        await two.fetchval("select count(*) from email_unsubscribe.senders")
        # This does not change the sender now, but counts once the other session's attempt has succeeded.
        known = await facts(one)
        await insert(one, "sender_emails", message_id="between", received_at=START + timedelta(days=5))
        assert known == await facts(one)
        with pytest.raises(asyncpg.SerializationError):
            await unsubscribe(two, at=START + timedelta(days=1))
        await old.rollback()


# --- History ---------------------------------------------------------------------------------------------------


async def test_an_attempt_is_stored_with_all_that_the_specification_names(mailbox: Connection) -> None:
    row = await insert(mailbox, "unsubscribe_history", status="failed", failure_reason="HTTP 404")
    assert (SHOP, URL, "failed", "HTTP 404", await mailbox.fetchval("select now()")) == (
        row["sender"],
        row["unsubscribe_url"],
        row["status"],
        row["failure_reason"],
        row["attempted_at"],
    )


@for_each("status", ["succeeded", "failed"])
async def test_an_attempt_can_be_settled_only_once(mailbox: Connection, status: str) -> None:
    attempt = await unsubscribe(mailbox, at=START, status="pending")
    settle = "update email_unsubscribe.unsubscribe_history set status = $2, failure_reason = $3 where id = $1"
    reason = "no answer" if status == "failed" else None
    await mailbox.execute(settle, attempt, status, reason)
    await mailbox.execute(settle, attempt, status, reason)  # no change
    for other, why in (("pending", None), ("succeeded", None), ("failed", "other")):
        if other != status or why != reason:
            with pytest.raises(asyncpg.RestrictViolationError):
                async with mailbox.transaction():
                    await mailbox.execute(settle, attempt, other, why)


@for_each(
    "change",
    ["sender = 'other@else.example'", "unsubscribe_url = 'https://a'", "method = 'link'", "attempted_at = now()"],
)
async def test_an_attempt_cannot_be_rewritten(mailbox: Connection, change: str) -> None:
    await unsubscribe(mailbox, at=START, status="pending")
    with pytest.raises(asyncpg.RestrictViolationError):
        await mailbox.execute(f"update email_unsubscribe.unsubscribe_history set {change}")


# --- Audit log -------------------------------------------------------------------------------------------------

LOGIN = {"action": "login", "user_id": OWNER, "session_id": SESSION}


async def test_an_unsubscribe_attempt_is_logged_with_sender_url_method_time_and_outcome(mailbox: Connection) -> None:
    before = await mailbox.fetchval("select clock_timestamp()")
    attempt = await unsubscribe(mailbox, at=START, status="pending")
    await mailbox.execute(
        "update email_unsubscribe.unsubscribe_history set status = 'failed', failure_reason = 'x' where id = $1",
        attempt,
    )
    what = {"action": "unsubscribe", "sender": SHOP, "unsubscribe_url": URL, "method": "one_click"}
    assert [LOGIN, what | {"outcome": "pending"}, what | {"outcome": "failed"}] == await audited(mailbox)
    times = [
        row["occurred_at"] for row in await mailbox.fetch("select * from email_unsubscribe.audit_log order by id")
    ]
    assert times[0] < before < times[1] < times[2]


async def test_a_change_of_the_allow_list_is_logged_with_action_entry_and_time(mailbox: Connection) -> None:
    for value in ("one@a.example", "two@a.example"):
        await insert(mailbox, "allow_list", value=value)
    await mailbox.execute("update email_unsubscribe.allow_list set value = 'x@a.example' where value like 'two%'")
    await mailbox.execute("update email_unsubscribe.allow_list set created_at = now()")  # not logged
    await mailbox.execute("delete from email_unsubscribe.allow_list where value like 'one%'")
    await mailbox.execute("truncate email_unsubscribe.allow_list")
    log = [(entry["action"], entry.get("entry_type"), entry.get("entry_value")) for entry in await audited(mailbox)]
    assert [
        ("login", None, None),
        ("allow_list_add", "email", "one@a.example"),
        ("allow_list_add", "email", "two@a.example"),
        ("allow_list_remove", "email", "two@a.example"),
        ("allow_list_add", "email", "x@a.example"),
        ("allow_list_remove", "email", "one@a.example"),
        ("allow_list_remove", "email", "x@a.example"),
    ] == log


@for_each(
    ("reason", "action"), [("logout", "logout"), ("expired", "session_expired"), ("revoked", "session_revoked")]
)
async def test_login_and_the_end_of_a_session_are_logged(mailbox: Connection, reason: str, action: str) -> None:
    end = "update email_unsubscribe.sessions set ended_at = now() + interval '1 s', end_reason = $1"
    await mailbox.execute(end, reason)
    assert [LOGIN, LOGIN | {"action": action}] == await audited(mailbox)
    with pytest.raises(asyncpg.RestrictViolationError):
        await mailbox.execute("update email_unsubscribe.sessions set ended_at = null, end_reason = null")


@for_each(
    "statement",
    [
        "delete from email_unsubscribe.sessions",
        "delete from email_unsubscribe.users",
        "truncate email_unsubscribe.sessions",
    ],
)
async def test_deleting_an_open_session_is_logged_as_revoked(mailbox: Connection, statement: str) -> None:
    await mailbox.execute(statement)
    assert [LOGIN, LOGIN | {"action": "session_revoked"}] == await audited(mailbox)


async def test_a_rolled_back_change_is_not_logged(mailbox: Connection) -> None:
    undo = mailbox.transaction()
    await undo.start()
    await insert(mailbox, "allow_list")
    await unsubscribe(mailbox, at=START)
    await undo.rollback()
    assert [LOGIN] == await audited(mailbox)


@for_each(
    "statement",
    [
        "update email_unsubscribe.audit_log set action = 'logout'",
        "delete from email_unsubscribe.audit_log",
        "truncate email_unsubscribe.audit_log",
    ],
)
async def test_not_even_the_owner_can_change_the_audit_log(mailbox: Connection, statement: str) -> None:
    with pytest.raises(asyncpg.RestrictViolationError):
        async with mailbox.transaction():
            await mailbox.execute(statement)
    assert [LOGIN] == await audited(mailbox)


async def test_the_audit_log_names_the_credentials_that_acted(mailbox: Connection) -> None:
    assert await mailbox.fetchval("select session_user") == await mailbox.fetchval(
        "select db_role from email_unsubscribe.audit_log"
    )


# --- Capture and rights ----------------------------------------------------------------------------------------


async def published(db: Connection, after: int) -> list[tuple[str, str, str]]:
    rows = await db.fetch(
        "select w.table_name, e.topic, e.kind from rowcast.events e join rowcast.watched w on w.id = e.watch"
        " where e.id > $1 order by e.id",
        after,
    )
    return [tuple(row) for row in rows]


async def everything(db: Connection) -> str:
    """All captured events, as text."""
    return str(await db.fetchval("select string_agg(e::text, ' ') from rowcast.events e"))


async def test_each_change_is_published_in_its_topic(mailbox: Connection) -> None:
    start = await mailbox.fetchval("select max(id) from rowcast.events")
    await insert(mailbox, "allow_list")
    await unsubscribe(mailbox, at=START)
    await mailbox.execute("delete from email_unsubscribe.sessions")
    assert {
        ("allow_list", "allow_list", "insert"),
        ("audit_log", "audit", "insert"),
        ("unsubscribe_history", "history", "insert"),
        ("senders", "senders", "update"),
        ("sessions", f"account:{OWNER}", "delete"),
    } == set(await published(mailbox, start))


async def test_an_email_that_does_not_change_its_sender_is_not_published(mailbox: Connection) -> None:
    start = await mailbox.fetchval("select max(id) from rowcast.events")
    await insert(mailbox, "sender_emails", received_at=START + timedelta(hours=1))
    assert [] == await published(mailbox, start)


async def test_tokens_addresses_urls_and_reasons_are_never_published(mailbox: Connection) -> None:
    await insert(mailbox, "oauth_tokens", refresh_token=ENCRYPTED)
    await insert(mailbox, "allow_list", value="friend@family.example")
    await unsubscribe(mailbox, at=START, status="failed")
    for table in ("oauth_tokens", "sender_emails", "allow_list", "unsubscribe_history"):
        await mailbox.execute(f"delete from email_unsubscribe.{table}")
    published = await everything(mailbox)
    for secret in ("gAAAA", "gmail", "@", "s3cr3t", "https:", "no answer", "provider|", "m-1"):
        assert secret not in published
    assert "shop.example" in published
    watched = await mailbox.fetch("select table_name, columns from rowcast.watched where pack = 'email_unsubscribe'")
    private = {"access_token", "refresh_token", "unsubscribe_url", "failure_reason", "sender", "value", "entry_value"}
    assert not {column for row in watched for column in row["columns"]} & private
    assert not {"oauth_tokens", "sender_emails"} & {row["table_name"] for row in watched}


async def test_a_deleted_user_loses_every_right(mailbox: Connection) -> None:
    start = await mailbox.fetchval("select max(id) from rowcast.events")
    await mailbox.execute("delete from email_unsubscribe.users")
    revoked = await mailbox.fetch("select revokes from rowcast.events where id > $1 and revokes is not null", start)
    assert [{"user": OWNER}] == [json.loads(row["revokes"]) for row in revoked]
    assert await mailbox.fetchval("select email_unsubscribe.may_read($1, 'senders')", OWNER) is False


MAY_READ: list[tuple[str | None, str | None, bool]] = [
    (OWNER, "senders", True),
    (OWNER, "history", True),
    (OWNER, "allow_list", True),
    (OWNER, "audit", True),
    (OWNER, f"account:{OWNER}", True),
    (OWNER, f"account:{NOBODY}", False),
    (OWNER, "account:", False),
    (OWNER, "oauth_tokens", False),
    (OWNER, "sender_emails", False),
    (OWNER, "SENDERS", False),
    (OWNER, "senders ", False),
    (OWNER, "sender%", False),
    (OWNER, "*email_unsubscribe", False),
    (OWNER, "", False),
    (OWNER, None, False),
    (NOBODY, "senders", False),
    (NOBODY, f"account:{NOBODY}", False),
    ("", "senders", False),
    ("", "account:", False),
    (None, "senders", False),
    (None, None, False),
]


async def test_may_read_is_true_for_the_right_users_only_and_never_null(mailbox: Connection) -> None:
    assert MAY_READ == [
        (user, topic, await mailbox.fetchval("select email_unsubscribe.may_read($1, $2)", user, topic))
        for user, topic, _ in MAY_READ
    ]


async def test_no_function_uses_the_callers_search_path(db: Connection) -> None:
    functions = await db.fetch(
        "select proname, proconfig from pg_proc where pronamespace = 'email_unsubscribe'::regnamespace"
    )
    assert "may_read" in {f["proname"] for f in functions}
    assert all(f["proconfig"] == ["search_path=pg_catalog, pg_temp"] for f in functions)


async def test_the_sample_owner_may_read_the_sample_mailbox(db: Connection) -> None:
    await db.execute((ROOT / "ddl/email_unsubscribe/demo.sql").read_text())
    [user] = await db.fetch((ROOT / "ddl/email_unsubscribe/demo_users.sql").read_text())
    assert await db.fetchval("select email_unsubscribe.may_read($1, 'history')", user["id"]) is True
    assert 2 == await db.fetchval(
        "select emails_after_unsubscribe from email_unsubscribe.senders where domain = 'pushy.example'"
    )


# --- Speed -----------------------------------------------------------------------------------------------------


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in nodes(child)]


async def many(db: Connection) -> None:
    await db.execute(
        "insert into email_unsubscribe.sender_emails"
        " select n, 'sender' || n % 200 || '@x.example', now() - make_interval(mins => n)"
        " from generate_series(1, 5000) n"
    )
    await db.execute(
        "insert into email_unsubscribe.unsubscribe_history (sender, unsubscribe_url, method, attempted_at)"
        " select 'sender' || n % 200 || '@x.example', 'https://x.example', 'link', now() - make_interval(mins => n)"
        " from generate_series(1, 5000) n"
    )
    await db.execute("analyze email_unsubscribe.sender_emails, email_unsubscribe.unsubscribe_history")
    await db.execute("analyze email_unsubscribe.audit_log")


@pytest.fixture
async def crowd(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "email-unsubscribe-crowd", many) as connection:
        yield connection


@for_each(
    ("statement", "index"),
    [
        (
            "select * from email_unsubscribe.unsubscribe_history order by attempted_at desc, id desc limit 50",
            "unsubscribe_history_newest",
        ),
        ("select * from email_unsubscribe.audit_log order by occurred_at desc, id desc limit 50", "audit_log_newest"),
        (
            "select count(*) from email_unsubscribe.sender_emails"
            " where sender = 'sender7@x.example' and received_at > now() - interval '1 day'",
            "sender_emails_sender_received_at",
        ),
        (
            "select min(attempted_at) from email_unsubscribe.unsubscribe_history where sender = 'sender7@x.example'",
            "unsubscribe_history_sender_attempted_at",
        ),
    ],
)
async def test_frequent_queries_are_answered_by_their_index(crowd: Connection, statement: str, index: str) -> None:
    steps = nodes(json.loads(await crowd.fetchval(f"explain (format json) {statement}"))[0]["Plan"])
    assert index in {step.get("Index Name") for step in steps}
    assert not {"Seq Scan", "Sort"} & {step["Node Type"] for step in steps}
