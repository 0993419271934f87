"""The unsubscriber: models of the rows that triggers/email_unsubscribe.sql publishes.

Senders and allow list entries appear by domain only: no e-mail address and no unsubscribe URL is published.
"""

from base64 import urlsafe_b64decode
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr

from daemon.packs import ULID, Pack, PackSecret, Row, Timestamp, Ulid

TOKEN_KEY_BYTES: Final = 32
"""The size of a Fernet key: one half signs, the other encrypts."""

Domain = Annotated[str, Field(max_length=255)]
Method = Literal["one_click", "link", "mailto"]
Status = Literal["pending", "succeeded", "failed"]
EntryType = Literal["email", "domain"]


class User(Row):
    """A user of the mailbox. The identity provider's name for the account is not published."""

    id: Ulid
    created_at: Timestamp


class Session(Row):
    """A session, from login to logout. `ended_at` and `end_reason` are null while it lasts."""

    id: Ulid
    user_id: Ulid
    started_at: Timestamp
    ended_at: Timestamp | None
    end_reason: Literal["logout", "expired", "revoked"] | None


class Sender(Row):
    """What is known about a sender. `unsubscribed_at` is the time of the first attempt that succeeded."""

    id: Ulid
    domain: Domain
    first_seen: Timestamp
    last_seen: Timestamp
    unsubscribed_at: Timestamp | None
    emails_after_unsubscribe: Annotated[int, Field(ge=0)]


class Attempt(Row):
    """One attempt to unsubscribe. The URL and the reason of a failure are not published."""

    id: Ulid
    domain: Domain
    method: Method
    attempted_at: Timestamp
    status: Status


class AllowListEntry(Row):
    """An address or a domain that the user wants to hear from. Of an address, only the domain is published."""

    id: Ulid
    entry_type: EntryType
    domain: Domain
    created_at: Timestamp


class AuditEntry(Row):
    """One logged action. Columns that do not apply to it are null. `user_id` outlives its user: no key checks it."""

    id: Ulid
    occurred_at: Timestamp
    action: Literal[
        "unsubscribe", "allow_list_add", "allow_list_remove", "login", "logout", "session_expired", "session_revoked"
    ]
    method: Method | None
    outcome: Status | None
    entry_type: EntryType | None
    user_id: Annotated[str, Field(max_length=26)] | None


def check_token_keys(keys: SecretStr) -> SecretStr:
    """Return the keys. Raises ValueError, without their text, unless they are a list of Fernet keys."""
    texts = keys.get_secret_value().split()
    try:
        is_valid = texts and all(len(urlsafe_b64decode(key)) == TOKEN_KEY_BYTES for key in texts)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"one key or more is needed, each of {TOKEN_KEY_BYTES} bytes in URL-safe base64, the newest first: "
            "`openssl rand -base64 32 | tr +/ -_` makes a good one"
        )
    return keys


PACK = Pack(
    name="email_unsubscribe",
    tables={
        "users": User,
        "sessions": Session,
        "senders": Sender,
        "unsubscribe_history": Attempt,
        "allow_list": AllowListEntry,
        "audit_log": AuditEntry,
    },
    migrates_on_start=True,
    topics=("senders", "history", "allow_list", "audit", rf"account:{ULID}"),
    secrets=(
        PackSecret(
            name="token_keys",
            description="keys for the OAuth tokens of email_unsubscribe, separated by spaces or newlines; the "
            "first one encrypts, all of them decrypt",
            file_description="file that contains these keys; if neither is set, $CREDENTIALS_DIRECTORY/token_keys",
            validate=check_token_keys,
        ),
    ),
)
