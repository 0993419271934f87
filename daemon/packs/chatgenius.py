"""ChatGenius: models of the rows that triggers/chatgenius.sql publishes."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from daemon.packs import ULID, BigInt, JsonObject, Pack, Row, Timestamp, Ulid

Name = Annotated[str, Field(min_length=1, max_length=255)]


class User(Row):
    """A user in the directory. E-mail address and auth0_id are not published."""

    id: Ulid
    username: Name
    full_name: Annotated[str, Field(max_length=255)] | None
    avatar_url: str | None
    created_at: Timestamp
    updated_at: Timestamp


class Channel(Row):
    """A channel of the chat."""

    id: Ulid
    name: Name
    description: str | None
    created_at: Timestamp
    updated_at: Timestamp


class Message(Row):
    """A message. `content` may be empty, since a message can consist of files alone."""

    id: Ulid
    channel_id: Ulid
    user_id: Ulid
    content: str
    metadata: JsonObject | None
    created_at: Timestamp
    updated_at: Timestamp


class ChannelMember(Row):
    """A user's membership of a channel."""

    key: ClassVar[tuple[str, ...]] = ("channel_id", "user_id")

    channel_id: Ulid
    user_id: Ulid
    role: Literal["owner", "admin", "member", "guest"]
    joined_at: Timestamp


class Reaction(Row):
    """A user's emoji on a message."""

    id: Ulid
    message_id: Ulid
    user_id: Ulid
    emoji: Annotated[str, Field(min_length=1, max_length=50)]
    created_at: Timestamp


class File(Row):
    """A stored file, usually attached to a message; `size` is in bytes."""

    id: Ulid
    message_id: Ulid | None
    name: Name
    type: Annotated[str, Field(min_length=1, max_length=100)]
    size: Annotated[BigInt, Field(ge=0)]
    url: Annotated[str, Field(min_length=1)]
    created_at: Timestamp


class UserSettings(Row):
    """A user's preferences."""

    key: ClassVar[tuple[str, ...]] = ("user_id",)

    user_id: Ulid
    theme: Literal["light", "dark", "system"] | None
    notifications_enabled: bool | None
    preferences: JsonObject | None


class UserStatus(Row):
    """A user's presence."""

    key: ClassVar[tuple[str, ...]] = ("user_id",)

    user_id: Ulid
    status: Literal["online", "away", "busy", "dnd", "offline"]
    last_seen: Timestamp
    custom_status: str | None


class MessageRead(Row):
    """A read receipt: a user has read a message."""

    key: ClassVar[tuple[str, ...]] = ("message_id", "user_id")

    message_id: Ulid
    user_id: Ulid
    read_at: Timestamp


class SyncState(Row):
    """When a user's offline copy was last synchronised."""

    id: Ulid
    user_id: Ulid
    last_sync: Timestamp
    sync_type: Literal["full", "incremental", "channels", "messages", "reactions", "files", "reads", "users"]
    metadata: JsonObject | None


PACK = Pack(
    name="chatgenius",
    tables={
        "users": User,
        "channels": Channel,
        "messages": Message,
        "channel_members": ChannelMember,
        "reactions": Reaction,
        "files": File,
        "user_settings": UserSettings,
        "user_status": UserStatus,
        "message_reads": MessageRead,
        "sync_state": SyncState,
    },
    topics=(rf"channel:{ULID}", rf"user:{ULID}", "users"),
    presence_hook="presence_changed",
    ack_hook="acknowledged",
    is_default=True,
)
