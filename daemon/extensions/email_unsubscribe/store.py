"""What the unsubscriber of a mailbox stores, for an application in Python: models, and a Store with its methods.

::

    async with Store.open(dsn, keys=token_keys(settings)) as store:
        attempt = await store.begin_attempt(sender, url, "one_click")
        ...
        await store.settle_attempt(attempt.id)

The audit log, and what is known of each sender, are written by the database itself.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self, TypeVar

import asyncpg
from pydantic import AwareDatetime, BaseModel, ConfigDict, SecretStr, StringConstraints
from ulid import ULID

from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.packs.email_unsubscribe import PACK, EntryType, Method, Status
from daemon.postgres.connect import Connection, Pool, acquired, open_pool, retry
from daemon.postgres.errors import (
    DRIVER_ERRORS,
    TRANSIENT,
    DatabaseFault,
    DatabaseTimeout,
    TemporarilyUnavailable,
    explain,
)
from daemon.postgres.queries import Queries
from daemon.schema import migrate
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import BadSettings, Settings

log = get_logger()

T = TypeVar("T")
Row = TypeVar("Row", bound="_Stored")

POOL: Final = 5
"""Connections that a Store has at most."""

CLOSE_TIMEOUT: Final = 2.0
"""Seconds for the connections to close."""

BATCH: Final = 100
"""Accounts whose tokens are encrypted anew in one transaction."""

Address = Annotated[
    str, StringConstraints(strip_whitespace=True, to_lower=True, max_length=320, pattern=r"^\S+@[^@\s]+$")
]
"""An e-mail address, in the one form in which they are kept."""


class ExcessivePrivileges(OperatorFault):
    """This role has privileges outside schema {schema} ({what}). Use {role}, or revoke them."""

    exit_code: ClassVar[int] = 40

    def __init__(self, schema: str, what: Sequence[str]) -> None:
        self.schema, self.what, self.role = schema, "; ".join(what), f"{schema[:59]}_app"


class EncryptionUnavailable(OperatorFault):
    """The encryption library is missing: install Rowcast with the extra email_unsubscribe."""

    exit_code: ClassVar[int] = 41


class TokenUndecryptable(OperatorFault):
    """No key decrypts the {field} of an account: add the key it was encrypted with after the others."""

    exit_code: ClassVar[int] = 42

    def __init__(self, field: str) -> None:
        self.field = field


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Tokens(_Stored):
    """What the mailbox's provider has issued. `expiry` is that of the access token."""

    access_token: SecretStr
    refresh_token: SecretStr | None = None
    expiry: AwareDatetime


class StoredTokens(Tokens):
    """The same as it lay in the database, decrypted."""

    encrypted_at: AwareDatetime


class AllowListEntry(_Stored):
    """Somebody the user wants to hear from: one address, or a domain."""

    id: str
    entry_type: EntryType
    value: str
    created_at: AwareDatetime


class Email(_Stored):
    """That an e-mail was seen. `message_id` is what the mailbox calls it; nothing of its content is kept."""

    message_id: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    sender: Address
    received_at: AwareDatetime


class Sender(_Stored):
    """What is known of a sender. `unsubscribed_at` is the first attempt that succeeded."""

    id: str
    sender: str
    first_seen: AwareDatetime
    last_seen: AwareDatetime
    unsubscribed_at: AwareDatetime | None
    emails_after_unsubscribe: int


class Attempt(_Stored):
    """One attempt to unsubscribe. Whoever has the URL can unsubscribe the user, so that it does not show itself."""

    id: str
    sender: str
    unsubscribe_url: SecretStr
    method: Method
    attempted_at: AwareDatetime
    status: Status
    failure_reason: str | None


class Session(_Stored):
    """From login to logout."""

    id: str
    user_id: str
    started_at: AwareDatetime
    ended_at: AwareDatetime | None
    end_reason: Literal["logout", "expired", "revoked"] | None


class AuditEntry(_Stored):
    """Something that was done, and with which credentials. What does not belong to its action is None."""

    id: str
    occurred_at: AwareDatetime
    action: str
    db_role: str
    sender: str | None
    unsubscribe_url: SecretStr | None
    method: Method | None
    outcome: Status | None
    entry_type: EntryType | None
    entry_value: str | None
    user_id: str | None
    session_id: str | None


class Cipher:
    """Encrypts tokens with the first of its keys, and reads what any of them has encrypted.

    What is encrypted holds its account and its field: moved to another place in the table it is not read.
    Raises NoCipher and BadSettings.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        try:
            from cryptography.fernet import Fernet, InvalidToken, MultiFernet  # noqa: PLC0415 - it is an extra
        except ImportError:
            raise EncryptionUnavailable from None
        try:
            fernets = [Fernet(key) for key in keys]
            self._newest, self._all = fernets[0], MultiFernet(fernets)
        except (ValueError, IndexError):
            raise BadSettings("The keys for OAuth tokens are not of 32 bytes in URL-safe base64 each") from None
        self._invalid = InvalidToken

    def encrypt(self, token: SecretStr, account: str, field: str) -> str:
        """A token as it is stored."""
        return self._all.encrypt(json.dumps([account, field, token.get_secret_value()]).encode()).decode()

    def decrypt(self, stored: str, account: str, field: str) -> SecretStr:
        """The token. Raises TokenUnreadable for what no key opens, and for what belongs elsewhere."""
        try:
            *place, token = json.loads(self._all.decrypt(stored))
        except self._invalid:
            raise TokenUndecryptable(field) from None
        if place != [account, field]:
            raise TokenUndecryptable(field)
        return SecretStr(token)

    def renew(self, stored: str, field: str) -> str:
        """The same under the newest key; itself if it is that already. Raises TokenUnreadable."""
        try:
            self._newest.decrypt(stored)
        except self._invalid:
            try:
                return self._all.rotate(stored).decode()
            except self._invalid:
                raise TokenUndecryptable(field) from None
        return stored


class Store:
    """The data of one mailbox. Each method is one transaction, and is tried again while the fault may be passing.

    What it stores it names before the first attempt, so that an attempt whose end nobody heard of is not made twice.
    All methods raise a DatabaseFault.
    """

    def __init__(
        self, pool: Pool, cipher: Cipher, *, schema: str = PACK.name, within: float = 30.0, attempts: int = 5
    ) -> None:
        """`within` is how long, in seconds, one transaction may take; `attempts` how often it is tried."""
        self._pool, self._cipher, self._within, self._attempts = pool, cipher, within, attempts
        self._sql = _sql(schema)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        dsn: str,
        *,
        keys: Sequence[str],
        owner_dsn: str | None = None,
        schema: str = PACK.name,
        most: int = POOL,
        attempts: int = 5,
        any_role: bool = False,
    ) -> AsyncIterator[Self]:
        """A Store on a pool of up to `most` connections, for as long as the block lasts.

        With `owner_dsn`, the URL of a role that may, pending migrations are applied first; without it a schema that
        is not current is refused. Credentials that reach further than the schema are refused, unless `any_role`.
        Raises an OperatorFault: NotCurrent, TooMuchReach, BadSettings, NoCipher, a DatabaseFault.
        """
        cipher = Cipher(keys)
        if owner_dsn is not None:
            await migrate.apply(
                owner_dsn, [PACK.name], schemas={PACK.name: schema}, report=_report, attempts=attempts
            )
        newest = migrate.heads([PACK.name], schemas={PACK.name: schema})[schema]
        pool = await open_pool(
            dsn, application_name="email_unsubscribe", max_size=most, attempts=attempts, on_retry=_log_retry
        )
        try:
            store = cls(pool, cipher, schema=schema, attempts=attempts)
            reach = await store.run(lambda connection: connection.fetch(store._sql["reach"], schema))
            if reach and not any_role:
                raise ExcessivePrivileges(schema, [row["what"] for row in reach])
            at = await store.run(partial(migrate.current, schema=schema))
            if at != newest:
                raise SchemaNotCurrent(f"schema {schema} is at {at or 'nothing'}, not at {newest}")
            yield store
        finally:
            with suppress(TimeoutError, *DRIVER_ERRORS):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await pool.close()
            pool.terminate()

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` in one transaction: all of it or nothing.

        When the connection is lost, or another transaction is in the way, it is undone and done again, with growing
        pauses. So `work` should act on its connection alone, and bear that it is called several times.
        """

        async def once() -> T:
            try:
                async with acquired(self._pool, self._within) as connection:
                    try:
                        async with connection.transaction(isolation="read_committed"):
                            return await work(connection)
                    except asyncpg.InternalClientError:
                        # The server has said goodbye while the connection was idle, and the driver has read that but
                        # not yet the end of it.
                        connection.terminate()
                        raise TemporarilyUnavailable("the connection was lost") from None
            except DRIVER_ERRORS as error:
                raise explain(error) from None

        return await retry(once, on=(*TRANSIENT, DatabaseTimeout), attempts=self._attempts, on_retry=_log_retry)

    # Tokens.

    async def save_tokens(self, account: str, tokens: Tokens) -> None:
        """Keep the tokens of an account, encrypted. Without a refresh token the earlier one stays."""
        await self.run(lambda connection: self._save_tokens(connection, account, tokens))

    async def _save_tokens(self, connection: Connection, account: str, tokens: Tokens) -> None:
        refresh = tokens.refresh_token and self._cipher.encrypt(tokens.refresh_token, account, "refresh_token")
        access = self._cipher.encrypt(tokens.access_token, account, "access_token")
        await connection.execute(self._sql["save_tokens"], account, access, refresh, tokens.expiry)

    async def tokens(self, account: str) -> StoredTokens | None:
        """The tokens of an account; None if there are none. Raises TokenUnreadable."""
        row = await self._row("tokens", account)
        if row is None:
            return None
        opened = {
            field: row[field] and self._cipher.decrypt(row[field], account, field)
            for field in ("access_token", "refresh_token")
        }
        return StoredTokens(expiry=row["expiry"], encrypted_at=row["encrypted_at"], **opened)

    async def forget_tokens(self, account: str) -> None:
        """Delete the tokens of an account, if there are any."""
        await self.run(lambda connection: connection.execute(self._sql["forget_tokens"], account))

    async def rotate_token_keys(self, batch: int = BATCH) -> int:
        """Encrypt under the newest key what is not; for how many accounts that was needed.

        `batch` accounts are one transaction. Who interrupts it may start it again. Raises TokenUnreadable.
        """
        renewed, behind = 0, ""
        while True:
            accounts, count = await self.run(partial(self._rotate, behind=behind, batch=batch))
            renewed += count
            if len(accounts) < batch:
                return renewed
            behind = accounts[-1]

    async def _rotate(self, connection: Connection, *, behind: str, batch: int) -> tuple[list[str], int]:
        rows = await connection.fetch(self._sql["next_tokens"], behind, batch)
        count = 0
        for row in rows:
            stored = [row["access_token"], row["refresh_token"]]
            fields = ("access_token", "refresh_token")
            fresh = [text and self._cipher.renew(text, field) for text, field in zip(stored, fields, strict=True)]
            if fresh != stored:
                await connection.execute(self._sql["replace_tokens"], row["account"], *fresh)
                count += 1
        return [row["account"] for row in rows], count

    # Sessions.

    async def log_in(self, subject: str, tokens: Tokens | None = None) -> Session:
        """Begin a session of the user whom the provider calls `subject`, and keep the tokens that came with it.

        A user who is not known yet is added.
        """
        id_ = str(ULID())

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["add_user"], subject)
            user = await connection.fetchval(self._sql["user_of"], subject)
            if tokens is not None:
                await self._save_tokens(connection, subject, tokens)
            await connection.execute(self._sql["begin_session"], id_, user)
            return await connection.fetchrow(self._sql["session"], id_)

        return _one(Session, await self.run(work))

    async def log_out(self, session_id: str, reason: Literal["logout", "expired", "revoked"] = "logout") -> Session:
        """End a session, unless it has ended. Raises LookupError if there is none."""

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["end_session"], session_id, reason)
            return await connection.fetchrow(self._sql["session"], session_id)

        return _one(Session, await self.run(work))

    # The allow list.

    async def allow(self, entry_type: EntryType, value: str) -> AllowListEntry:
        """Put somebody on the allow list; if there already, that entry."""

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["allow"], entry_type, value)
            return await connection.fetchrow(self._sql["allowed"], entry_type, value)

        return _one(AllowListEntry, await self.run(work))

    async def disallow(self, entry_type: EntryType, value: str) -> bool:
        """Take somebody off the allow list. Was there such an entry?"""
        return bool(await self.run(lambda connection: connection.fetchval(self._sql["disallow"], entry_type, value)))

    async def allow_list(self) -> list[AllowListEntry]:
        """Who is on the allow list."""
        return await self._rows(AllowListEntry, "allow_list")

    # Senders.

    async def record_emails(self, emails: Sequence[Email]) -> int:
        """Note e-mails that were seen, each once; how many of them were new."""
        columns = (
            [email.message_id for email in emails],
            [email.sender for email in emails],
            [email.received_at for email in emails],
        )
        return int(await self.run(lambda connection: connection.fetchval(self._sql["record_emails"], *columns)))

    async def sender(self, address: str) -> Sender | None:
        """What is known of a sender; None if nothing is."""
        row = await self._row("sender", address)
        return None if row is None else _one(Sender, row)

    async def senders(self, limit: int = 100) -> list[Sender]:
        """The senders who wrote last."""
        return await self._rows(Sender, "senders", limit)

    # Attempts.

    async def begin_attempt(self, sender: str, unsubscribe_url: str, method: Method) -> Attempt:
        """Note an attempt, as pending, before it is made."""
        id_ = str(ULID())

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["begin_attempt"], id_, sender, unsubscribe_url, method)
            return await connection.fetchrow(self._sql["attempt"], id_)

        return _one(Attempt, await self.run(work))

    async def settle_attempt(self, attempt_id: str, failure_reason: str | None = None) -> Attempt:
        """Note how it ended: it has succeeded if there is no reason why it failed.

        Raises LookupError if there is no such attempt, and a DatabaseFault if it ended otherwise before.
        """
        status = "succeeded" if failure_reason is None else "failed"

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["settle_attempt"], attempt_id, status, failure_reason)
            return await connection.fetchrow(self._sql["attempt"], attempt_id)

        return _one(Attempt, await self.run(work))

    async def history(self, limit: int = 100) -> list[Attempt]:
        """The newest attempts."""
        return await self._rows(Attempt, "history", limit)

    # The audit log.

    async def audit(self, limit: int = 100) -> list[AuditEntry]:
        """The newest entries of the audit log."""
        return await self._rows(AuditEntry, "audit", limit)

    async def _row(self, name: str, *values: object) -> asyncpg.Record | None:
        return await self.run(lambda connection: connection.fetchrow(self._sql[name], *values))

    async def _rows(self, model: type[Row], name: str, *values: object) -> list[Row]:
        rows = await self.run(lambda connection: connection.fetch(self._sql[name], *values))
        return [model.model_validate(dict(row)) for row in rows]


def _one(model: type[Row], row: asyncpg.Record | None) -> Row:
    if row is None:
        raise LookupError("there is no such row")
    return model.model_validate(dict(row))


@cache
def _sql(schema: str) -> Mapping[str, str]:
    """The statements, for the schema in which the pack lives."""
    found = Queries(Path(__file__).with_name("queries.sql")).statements
    return {name: re.sub(rf"\b{PACK.name}\.", f"{schema}.", text) for name, text in found.items()}


def _log_retry(fault: DatabaseFault, attempt: int) -> None:
    log.warning("database_retry", reason=str(fault), attempt=attempt)


def _report(line: str) -> None:
    if line.lower().startswith("warning"):
        log.warning("schema_warning", done=line)
    else:
        log.info("schema_migration", done=line)


def token_keys(settings: Settings) -> list[str]:
    """The keys that encrypt OAuth tokens, the newest first. Raises BadSettings if there is none."""
    keys = settings.pack_secret("token_keys")
    if keys is None:
        raise BadSettings(
            "No keys for OAuth tokens are configured: set ROWCAST_TOKEN_KEYS_FILE, or ROWCAST_TOKEN_KEYS."
        )
    return keys.get_secret_value().split()


async def rotate_token_keys(settings: Settings) -> int:
    """Encrypt all tokens under the newest key, for the operator: with any role; for how many accounts it was needed.

    Raises an OperatorFault.
    """
    schema = settings.schemas.get(PACK.name, PACK.name)
    keys, attempts = token_keys(settings), settings.connect_attempts
    async with Store.open(
        settings.require_dsn(), keys=keys, schema=schema, attempts=attempts, any_role=True
    ) as store:
        return await store.rotate_token_keys()
