"""Secrets and their disclosure: models of the rows that triggers/disclosure.sql publishes.

They contain ids, times, counts and states; secrets and recipients are not published.
"""

from typing import Annotated, Literal

from pydantic import Field

from daemon.packs import NUMBER, ULID, BigInt, Pack, Row, Timestamp, Ulid

Id = Annotated[BigInt, Field(ge=1)]


class User(Row):
    """A user who keeps secrets."""

    id: Ulid
    created_at: Timestamp


class Secret(Row):
    """A secret without its content. It is being disclosed while `processing_started_at` is set.

    A database at revision disclosure_0001 does not publish the columns about retries, hence their defaults.
    """

    id: Id
    user_id: Ulid
    status: Literal["active", "paused", "triggered", "failed"]
    check_in_days: Annotated[int, Field(ge=1, le=3650)]
    last_check_in: Timestamp
    next_check_in: Timestamp
    retry_count: Annotated[int, Field(ge=0)] = 0
    last_retry_at: Timestamp | None = None
    processing_started_at: Timestamp | None
    created_at: Timestamp


class Disclosure(Row):
    """One attempt to disclose a secret to one recipient, who is not published."""

    id: Id
    secret_id: Id
    status: Literal["pending", "sent", "failed"]
    created_at: Timestamp
    sent_at: Timestamp | None


PACK = Pack(
    name="disclosure",
    tables={"users": User, "secrets": Secret, "disclosure_log": Disclosure},
    topics=(rf"owner:{ULID}", rf"secret:{NUMBER}"),
)
