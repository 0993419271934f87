-- The ten tables of ChatGenius with their keys, checks and indexes.
--
-- Ids are ULIDs: text that sorts by creation time and does not reveal how many rows there are. Ids and the columns that
-- reference them compare byte by byte (collate "C"), which is creation order and the cheapest collation. Rows that
-- people remove are kept, with `deleted_at` set. A hard DELETE is for cleaning up; each foreign key below says what it
-- does to the rows that refer to the deleted one.

-- The specification lists these extensions. Nothing here uses them: ids and hashes come from built-in functions.
-- The schema comes from a qualified name, because only those follow `--schema`.
select rowcast.want_extension(split_part('chatgenius.users', '.', 1)::name, 'uuid-ossp');
select rowcast.want_extension(split_part('chatgenius.users', '.', 1)::name, 'pgcrypto');
select rowcast.want_extension(split_part('chatgenius.users', '.', 1)::name, 'citext');

create table chatgenius.users (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    auth0_id varchar(128) not null,
    email varchar(255) not null,
    username varchar(255) not null,
    full_name varchar(255),
    avatar_url text,
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    deleted_at timestamptz,
    constraint users_pkey primary key (id),
    constraint users_auth0_id_key unique (auth0_id),
    constraint users_email_key unique (email),
    constraint users_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint users_auth0_id_not_empty check (auth0_id <> ''),
    constraint users_email_not_empty check (email <> ''),
    constraint users_username_not_empty check (username <> '')
);

create table chatgenius.channels (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    name varchar(255) not null,
    description text,
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    deleted_at timestamptz,
    constraint channels_pkey primary key (id),
    constraint channels_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint channels_name_not_empty check (name <> '')
);

-- `content` may be empty: a message can consist of its files alone.
create table chatgenius.messages (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    channel_id varchar(26) collate "C" not null,
    user_id varchar(26) collate "C" not null,
    content text not null,
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    deleted_at timestamptz,
    metadata jsonb,
    constraint messages_pkey primary key (id),
    -- A channel's history is part of it. To be able to restore a channel, set channels.deleted_at instead.
    constraint messages_channel_id_fkey foreign key (channel_id) references chatgenius.channels (id)
        on delete cascade,
    -- Messages belong to the conversation and outlive the account: soft-delete authors.
    -- To erase a person for good, first erase or reassign the messages.
    constraint messages_user_id_fkey foreign key (user_id) references chatgenius.users (id) on delete restrict,
    constraint messages_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    -- An object can gain a member later without breaking its readers.
    constraint messages_metadata_is_object check (jsonb_typeof(metadata) = 'object')
);

create table chatgenius.channel_members (
    channel_id varchar(26) collate "C" not null,
    user_id varchar(26) collate "C" not null,
    role varchar(50) not null default 'member',
    joined_at timestamptz not null default current_timestamp,
    constraint channel_members_pkey primary key (channel_id, user_id),
    -- A membership is a link: it means nothing without either end.
    constraint channel_members_channel_id_fkey foreign key (channel_id) references chatgenius.channels (id)
        on delete cascade,
    constraint channel_members_user_id_fkey foreign key (user_id) references chatgenius.users (id)
        on delete cascade,
    constraint channel_members_role_known check (role in ('owner', 'admin', 'member', 'guest'))
);

create table chatgenius.reactions (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    message_id varchar(26) collate "C" not null,
    user_id varchar(26) collate "C" not null,
    emoji varchar(50) not null,
    created_at timestamptz not null default current_timestamp,
    constraint reactions_pkey primary key (id),
    constraint reactions_message_id_user_id_emoji_key unique (message_id, user_id, emoji),
    -- A reaction says something about a message and means nothing without it.
    constraint reactions_message_id_fkey foreign key (message_id) references chatgenius.messages (id)
        on delete cascade,
    -- A reaction is one person's click, not part of the conversation: it is deleted with the person.
    constraint reactions_user_id_fkey foreign key (user_id) references chatgenius.users (id) on delete cascade,
    constraint reactions_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint reactions_emoji_not_empty check (emoji <> '')
);

-- A file is uploaded before its message is sent, hence the nullable message_id. `size` is in bytes.
create table chatgenius.files (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    message_id varchar(26) collate "C",
    name varchar(255) not null,
    type varchar(100) not null,
    size bigint not null,
    url text not null,
    created_at timestamptz not null default current_timestamp,
    constraint files_pkey primary key (id),
    -- The row is the only record of where the stored object is: it stays, unattached, until a sweeper has
    -- removed the object. A cascade would leave the object in storage forever.
    constraint files_message_id_fkey foreign key (message_id) references chatgenius.messages (id)
        on delete set null,
    constraint files_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint files_name_not_empty check (name <> ''),
    constraint files_type_not_empty check (type <> ''),
    constraint files_size_not_negative check (size >= 0),
    constraint files_url_not_empty check (url <> '')
);

create table chatgenius.user_settings (
    user_id varchar(26) collate "C" not null,
    theme varchar(50) default 'light',
    notifications_enabled boolean default true,
    preferences jsonb default '{}'::jsonb,
    constraint user_settings_pkey primary key (user_id),
    -- Settings are an extension of the user's own row.
    constraint user_settings_user_id_fkey foreign key (user_id) references chatgenius.users (id)
        on delete cascade,
    constraint user_settings_theme_known check (theme in ('light', 'dark', 'system')),
    constraint user_settings_preferences_is_object check (jsonb_typeof(preferences) = 'object')
);

create table chatgenius.user_status (
    user_id varchar(26) collate "C" not null,
    status varchar(50) not null default 'offline',
    last_seen timestamptz not null default current_timestamp,
    custom_status text,
    constraint user_status_pkey primary key (user_id),
    -- A status is an extension of the user's own row.
    constraint user_status_user_id_fkey foreign key (user_id) references chatgenius.users (id)
        on delete cascade,
    -- busy: working, still notified; dnd: do not disturb.
    constraint user_status_status_known check (status in ('online', 'away', 'busy', 'dnd', 'offline'))
);

create table chatgenius.message_reads (
    message_id varchar(26) collate "C" not null,
    user_id varchar(26) collate "C" not null,
    read_at timestamptz not null default current_timestamp,
    constraint message_reads_pkey primary key (message_id, user_id),
    -- A receipt is a link: it means nothing without either end.
    constraint message_reads_message_id_fkey foreign key (message_id) references chatgenius.messages (id)
        on delete cascade,
    constraint message_reads_user_id_fkey foreign key (user_id) references chatgenius.users (id)
        on delete cascade
);

create table chatgenius.sync_state (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    user_id varchar(26) collate "C" not null,
    last_sync timestamptz not null default current_timestamp,
    sync_type varchar(50) not null,
    metadata jsonb,
    constraint sync_state_pkey primary key (id),
    -- The state of a user's offline copy is useless to anybody else.
    constraint sync_state_user_id_fkey foreign key (user_id) references chatgenius.users (id)
        on delete cascade,
    constraint sync_state_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    -- What was synchronised: everything from scratch, everything that changed, or one part only.
    constraint sync_state_sync_type_known check (
        sync_type in ('full', 'incremental', 'channels', 'messages', 'reactions', 'files', 'reads', 'users')
    ),
    constraint sync_state_metadata_is_object check (jsonb_typeof(metadata) = 'object')
);

-- Indexes. Every foreign key leads one; otherwise each DELETE of a referenced row would scan the referencing table.
-- Already covered by keys: channel_members.channel_id, reactions.message_id, message_reads.message_id,
-- user_settings.user_id, user_status.user_id.

-- One address must not have two accounts, regardless of case.
create unique index users_email_lower_key on chatgenius.users (lower(email));

-- The most frequent read of a chat: the newest messages of a channel, paged by (created_at, id).
create index messages_live_newest on chatgenius.messages (channel_id, created_at desc, id desc)
where deleted_at is null;

-- The index above skips deleted messages, which the foreign key must find too.
create index messages_channel_id on chatgenius.messages (channel_id);

create index messages_user_id on chatgenius.messages (user_id);

-- Also serves the query "which channels am I in".
create index channel_members_user_id on chatgenius.channel_members (user_id);

create index reactions_user_id on chatgenius.reactions (user_id);

-- Also finds unattached files for the sweeper.
create index files_message_id on chatgenius.files (message_id);

create index message_reads_user_id on chatgenius.message_reads (user_id);

-- Also serves the query "when did I last sync this".
create index sync_state_user_id on chatgenius.sync_state (user_id, sync_type, last_sync desc);
