"""The data layer for applications that unsubscribe a mailbox: a `Store` with a method for each operation.

::

    async with Store.open(dsn, owner_dsn=settings.dsn, keys=token_keys(settings)) as store:
        attempt = await store.begin_attempt(sender, url, "one_click")
        ...
        await store.settle_attempt(attempt.id)

The database itself maintains the audit log and the statistics of each sender.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Final, Literal, Self, TypeVar

import asyncpg
from ulid import ULID

from daemon.core.errors import OperatorFault
from daemon.extensions.email_unsubscribe.cipher import Cipher, RotationIncomplete, TokenUndecryptable, token_keys
from daemon.extensions.email_unsubscribe.models import (
    AllowListEntry,
    Attempt,
    AuditEntry,
    Email,
    Sender,
    Session,
    StoredModel,
    StoredTokens,
    Tokens,
)
from daemon.logs import get_logger
from daemon.packs.email_unsubscribe import PACK, EntryType, Method
from daemon.postgres.connect import Connection, Pool, acquired, open_pool, retry
from daemon.postgres.errors import (
    DRIVER_ERRORS,
    TRANSIENT,
    DatabaseFault,
    DatabaseTimeout,
    TemporarilyUnavailable,
    explain,
    violations_logged,
)
from daemon.postgres.queries import Queries
from daemon.schema import migrate
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import Settings

log = get_logger()

T = TypeVar("T")
Model = TypeVar("Model", bound=StoredModel)

MAX_POOL_SIZE: Final = 5
"""Connections that a Store opens at most, by default."""

CLOSE_TIMEOUT: Final = 2.0
"""Seconds that `Store.open` waits for its connections to close."""

ROTATION_BATCH: Final = 100
"""Accounts whose tokens are re-encrypted in one transaction."""


class ExcessivePrivileges(OperatorFault):
    """This role has privileges outside schema {schema} ({what}). Use {role}, or revoke them."""

    exit_code: ClassVar[int] = 40

    def __init__(self, schema: str, what: Sequence[str]) -> None:
        self.schema, self.what, self.role = schema, "; ".join(what), f"{schema[:59]}_app"


class Store:
    """The data of one mailbox. Each method is one transaction, retried after faults that may pass.

    Ids are chosen before the first attempt, so a retry after a lost confirmation does not store a row twice.
    All methods raise a DatabaseFault.
    """

    def __init__(
        self, pool: Pool, cipher: Cipher, *, schema: str = PACK.name, time_limit: float = 30.0, attempts: int = 5
    ) -> None:
        """Each transaction may take `time_limit` seconds and is tried `attempts` times."""
        self._pool, self._cipher, self._time_limit, self._attempts = pool, cipher, time_limit, attempts
        self._sql = _statements(schema)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        dsn: str,
        *,
        owner_dsn: str | None,
        keys: Sequence[str],
        schema: str = PACK.name,
        max_size: int = MAX_POOL_SIZE,
        attempts: int = 5,
        any_role: bool = False,
    ) -> AsyncIterator[Self]:
        """A Store on a pool of up to `max_size` connections, closed at the end of the block.

        Pending migrations are applied first, by the role of `owner_dsn`, since `dsn` is that of a role which may not.
        If it is None, something else applies them, and a schema that is not current is refused. A role with
        privileges outside the schema is refused, unless `any_role`. Raises SchemaNotCurrent,
        ExcessivePrivileges, BadSettings, EncryptionUnavailable, or a DatabaseFault.
        """
        cipher = Cipher(keys)
        if owner_dsn is not None:
            with violations_logged():
                await migrate.apply(
                    owner_dsn,
                    [PACK.name],
                    schemas={PACK.name: schema},
                    report=migrate.log_report,
                    attempts=attempts,
                )
        newest = migrate.heads([PACK.name], schemas={PACK.name: schema})[schema]
        pool = await open_pool(
            dsn, application_name="email_unsubscribe", max_size=max_size, attempts=attempts, on_retry=_log_retry
        )
        try:
            store = cls(pool, cipher, schema=schema, attempts=attempts)
            excess = await store.run(lambda connection: connection.fetch(store._sql["excessive_privileges"], schema))
            if excess and not any_role:
                raise ExcessivePrivileges(schema, [row["what"] for row in excess])
            current = await store.run(partial(migrate.current, schema=schema))
            if current != newest:
                raise SchemaNotCurrent(f"schema {schema} is at {current or 'nothing'}, not at {newest}")
            yield store
        finally:
            with suppress(TimeoutError, *DRIVER_ERRORS):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await pool.close()
            pool.terminate()

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Call `work` in one transaction, and return its result.

        When the connection is lost, or another transaction is in the way, the transaction is rolled back and `work`
        is called again, after a growing delay. So `work` must be safe to call several times: it should have no
        effects but those on its connection.
        """

        async def once() -> T:
            try:
                async with acquired(self._pool, self._time_limit) as connection:
                    try:
                        async with connection.transaction(isolation="read_committed"):
                            return await work(connection)
                    except asyncpg.InternalClientError:
                        # The server closed the idle connection, and the driver has read its last message but not
                        # yet the end of the stream.
                        connection.terminate()
                        raise TemporarilyUnavailable("the connection was lost") from None
            except DRIVER_ERRORS as error:
                raise explain(error) from None

        with violations_logged():
            return await retry(once, on=(*TRANSIENT, DatabaseTimeout), attempts=self._attempts, on_retry=_log_retry)

    # Tokens.

    async def save_tokens(self, account: str, tokens: Tokens) -> None:
        """Store the tokens of an account, encrypted. Without a new refresh token, the stored one is kept."""
        await self.run(lambda connection: self._save_tokens(connection, account, tokens))

    async def _save_tokens(self, connection: Connection, account: str, tokens: Tokens) -> None:
        refresh = tokens.refresh_token and self._cipher.encrypt(tokens.refresh_token, account, "refresh_token")
        access = self._cipher.encrypt(tokens.access_token, account, "access_token")
        await connection.execute(self._sql["save_tokens"], account, access, refresh, tokens.expiry)

    async def tokens(self, account: str) -> StoredTokens | None:
        """The tokens of an account; None if there are none. Raises TokenUndecryptable."""
        row = await self._row("tokens", account)
        if row is None:
            return None
        decrypted = {
            field: row[field] and self._cipher.decrypt(row[field], account, field)
            for field in ("access_token", "refresh_token")
        }
        return StoredTokens(expiry=row["expiry"], encrypted_at=row["encrypted_at"], **decrypted)

    async def forget_tokens(self, account: str) -> None:
        """Delete the tokens of an account, if there are any."""
        await self.run(lambda connection: connection.execute(self._sql["forget_tokens"], account))

    async def rotate_token_keys(self, batch: int = ROTATION_BATCH) -> int:
        """Re-encrypt all tokens that are not under the first key, and return the number of accounts they belong to.

        Each transaction covers `batch` accounts; you can interrupt the rotation and start it again. Raises
        RotationIncomplete, when all other tokens are done, if no key decrypts some of them.
        """
        renewed, unreadable, last_account = 0, list[str](), ""
        while True:
            accounts, count, failed = await self.run(partial(self._rotate_batch, after=last_account, batch=batch))
            renewed += count
            unreadable += failed
            if len(accounts) < batch:
                break
            last_account = accounts[-1]
        if unreadable:
            raise RotationIncomplete(unreadable, renewed)
        return renewed

    async def _rotate_batch(
        self, connection: Connection, *, after: str, batch: int
    ) -> tuple[list[str], int, list[str]]:
        """The accounts of the next batch, how many of them were re-encrypted, and those with unreadable tokens."""
        rows = await connection.fetch(self._sql["next_tokens"], after, batch)
        count, unreadable = 0, []
        for row in rows:
            stored = [row["access_token"], row["refresh_token"]]
            fields = ("access_token", "refresh_token")
            try:
                fresh = [text and self._cipher.renew(text, field) for text, field in zip(stored, fields, strict=True)]
            except TokenUndecryptable:
                unreadable.append(row["account"])
                continue
            if fresh != stored:
                await connection.execute(self._sql["replace_tokens"], row["account"], *fresh)
                count += 1
        return [row["account"] for row in rows], count, unreadable

    # Sessions.

    async def log_in(self, subject: str, tokens: Tokens | None = None) -> Session:
        """Begin a session of the user whom the provider calls `subject`, and store the tokens if there are any.

        An unknown user is added.
        """
        id_ = str(ULID())

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["add_user"], subject)
            user = await connection.fetchval(self._sql["user_of"], subject)
            if tokens is not None:
                await self._save_tokens(connection, subject, tokens)
            await connection.execute(self._sql["begin_session"], id_, user)
            return await connection.fetchrow(self._sql["session"], id_)

        return _model_of(Session, await self.run(work))

    async def log_out(self, session_id: str, reason: Literal["logout", "expired", "revoked"] = "logout") -> Session:
        """End a session; one that has ended is returned as it is. Raises LookupError if there is none."""

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["end_session"], session_id, reason)
            return await connection.fetchrow(self._sql["session"], session_id)

        return _model_of(Session, await self.run(work))

    # The allow list.

    async def allow(self, entry_type: EntryType, value: str) -> AllowListEntry:
        """Add an entry to the allow list, or return the existing one."""

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["allow"], entry_type, value)
            return await connection.fetchrow(self._sql["allowed"], entry_type, value)

        return _model_of(AllowListEntry, await self.run(work))

    async def disallow(self, entry_type: EntryType, value: str) -> bool:
        """Remove an entry from the allow list; False if it was not there."""
        return bool(await self.run(lambda connection: connection.fetchval(self._sql["disallow"], entry_type, value)))

    async def allow_list(self) -> list[AllowListEntry]:
        """All entries of the allow list."""
        return await self._rows(AllowListEntry, "allow_list")

    # Senders.

    async def record_emails(self, emails: Sequence[Email]) -> int:
        """Record e-mails by their message ids, and return how many were new."""
        columns = (
            [email.message_id for email in emails],
            [email.sender for email in emails],
            [email.received_at for email in emails],
        )
        return int(await self.run(lambda connection: connection.fetchval(self._sql["record_emails"], *columns)))

    async def sender(self, address: str) -> Sender | None:
        """The sender with this address; None if there is none."""
        row = await self._row("sender", address)
        return None if row is None else _model_of(Sender, row)

    async def senders(self, limit: int = 100) -> list[Sender]:
        """The senders, the one with the latest e-mail first."""
        return await self._rows(Sender, "senders", limit)

    # Attempts.

    async def begin_attempt(self, sender: str, unsubscribe_url: str, method: Method) -> Attempt:
        """Record an attempt as pending. Call this before you make the attempt."""
        id_ = str(ULID())

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["begin_attempt"], id_, sender, unsubscribe_url, method)
            return await connection.fetchrow(self._sql["attempt"], id_)

        return _model_of(Attempt, await self.run(work))

    async def settle_attempt(self, attempt_id: str, failure_reason: str | None = None) -> Attempt:
        """Record the outcome of an attempt: failed for `failure_reason`, or succeeded if that is None.

        Raises LookupError if there is no such attempt, and a DatabaseFault if it was settled differently before.
        """
        status = "succeeded" if failure_reason is None else "failed"

        async def work(connection: Connection) -> asyncpg.Record | None:
            await connection.execute(self._sql["settle_attempt"], attempt_id, status, failure_reason)
            return await connection.fetchrow(self._sql["attempt"], attempt_id)

        return _model_of(Attempt, await self.run(work))

    async def history(self, limit: int = 100) -> list[Attempt]:
        """The attempts, newest first."""
        return await self._rows(Attempt, "history", limit)

    # The audit log.

    async def audit(self, limit: int = 100) -> list[AuditEntry]:
        """The entries of the audit log, newest first."""
        return await self._rows(AuditEntry, "audit", limit)

    async def _row(self, name: str, *values: object) -> asyncpg.Record | None:
        return await self.run(lambda connection: connection.fetchrow(self._sql[name], *values))

    async def _rows(self, model: type[Model], name: str, *values: object) -> list[Model]:
        rows = await self.run(lambda connection: connection.fetch(self._sql[name], *values))
        return [model.model_validate(dict(row)) for row in rows]


def _model_of(model: type[Model], row: asyncpg.Record | None) -> Model:
    if row is None:
        raise LookupError("there is no such row")
    return model.model_validate(dict(row))


@cache
def _statements(schema: str) -> Mapping[str, str]:
    """The statements of queries.sql by name, for a pack in this schema."""
    statements = Queries(Path(__file__).with_name("queries.sql")).statements
    return {name: re.sub(rf"\b{PACK.name}\.", f"{schema}.", text) for name, text in statements.items()}


def _log_retry(fault: DatabaseFault, attempt: int) -> None:
    log.warning("database_retry", reason=str(fault), attempt=attempt)


async def rotate_token_keys(settings: Settings) -> int:
    """Re-encrypt all tokens with the first key, as any role, and return the number of accounts that needed it.

    Raises an OperatorFault.
    """
    schema = settings.schemas.get(PACK.name, PACK.name)
    keys, attempts = token_keys(settings), settings.connect_attempts
    async with Store.open(
        settings.require_dsn(), owner_dsn=None, keys=keys, schema=schema, attempts=attempts, any_role=True
    ) as store:
        return await store.rotate_token_keys()
