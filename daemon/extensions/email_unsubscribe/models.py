"""What the data layer of email_unsubscribe takes and returns: validated, frozen models.

Tokens and unsubscribe URLs are `SecretStr`, so that a log line or a traceback does not show them.
"""

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, SecretStr, StringConstraints

from daemon.packs.email_unsubscribe import EntryType, Method, Status

Address = Annotated[str, StringConstraints(max_length=320, pattern=r"^\s*\S+[@\uff20\ufe6b]\S+\s*$")]
"""An e-mail address as it was found. The database decides which spellings are one sender."""


class StoredModel(BaseModel):
    """The base of all models here: frozen, without extra fields, and with no input in its errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Tokens(StoredModel):
    """OAuth tokens as the mailbox's provider issued them. `expiry` is that of the access token."""

    access_token: SecretStr
    refresh_token: SecretStr | None = None
    expiry: AwareDatetime


class StoredTokens(Tokens):
    """Tokens from the database, decrypted."""

    encrypted_at: AwareDatetime


class AllowListEntry(StoredModel):
    """An address or a domain that the user wants to hear from."""

    id: str
    entry_type: EntryType
    value: str
    created_at: AwareDatetime


class Email(StoredModel):
    """An e-mail that was seen; its content is not stored. `message_id` is the mailbox's id of it."""

    message_id: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    sender: Address
    received_at: AwareDatetime


class Sender(StoredModel):
    """What is known about a sender. `unsubscribed_at` is the time of the first attempt that succeeded."""

    id: str
    sender: str
    first_seen: AwareDatetime
    last_seen: AwareDatetime
    unsubscribed_at: AwareDatetime | None
    emails_after_unsubscribe: int


class Attempt(StoredModel):
    """One attempt to unsubscribe. The URL is secret, since anyone who has it can unsubscribe the user."""

    id: str
    sender: str
    unsubscribe_url: SecretStr
    method: Method
    attempted_at: AwareDatetime
    status: Status
    failure_reason: str | None


class Session(StoredModel):
    """A user's session, from login to logout."""

    id: str
    user_id: str
    started_at: AwareDatetime
    ended_at: AwareDatetime | None
    end_reason: Literal["logout", "expired", "revoked"] | None


class AuditEntry(StoredModel):
    """One logged action, and the database role that performed it. Fields that do not apply to it are None."""

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
