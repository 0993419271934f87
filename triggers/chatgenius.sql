-- Which tables of ChatGenius are captured, their topics, and which columns are published.
-- E-mail addresses and auth0_id never are.
--   channel:<id>   the channel, its messages, members, reactions, files and receipts
--   user:<id>      the user's memberships, settings and sync state
--   users          the user directory and everybody's status
-- Applied at every `daemon --apply-ddl`; watch() does nothing if nothing changed.
-- Tables come before those that they refer to, in the order in which a writer locks them.

-- The capture functions run as rowcast_capture, which may read only what the topic expressions look up.
do $$
begin
    -- The schema comes from a qualified name, because only those follow `--schema`.
    execute format('grant usage on schema %I to rowcast_capture', split_part('chatgenius.messages', '.', 1));
    grant select (id, channel_id) on chatgenius.messages to rowcast_capture;
exception when undefined_object then
    null;  -- the role does not exist: a warning said so, and the functions belong to the role that applies this
end
$$;

select rowcast.soft_deletes(t.relation::regclass, 'deleted_at')
from (values ('chatgenius.messages'), ('chatgenius.channels'), ('chatgenius.users')) as t (relation);

select rowcast.watch(
    'chatgenius.sync_state', pack => 'chatgenius',
    topic => $$'user:' || r.user_id$$,
    columns => '{id, user_id, last_sync, sync_type, metadata}',
    rows => $$r.user_id = split_part(topic, 'user:', 2)$$
);

select rowcast.watch(
    'chatgenius.user_status', pack => 'chatgenius',
    topic => $$'users'$$,
    columns => '{user_id, status, last_seen, custom_status}',
    key => '{user_id}',
    rows => $$topic = 'users'$$
);

select rowcast.watch(
    'chatgenius.user_settings', pack => 'chatgenius',
    topic => $$'user:' || r.user_id$$,
    columns => '{user_id, theme, notifications_enabled, preferences}',
    key => '{user_id}',
    rows => $$r.user_id = split_part(topic, 'user:', 2)$$
);

select rowcast.watch(
    'chatgenius.message_reads', pack => 'chatgenius',
    topic => $$(select 'channel:' || m.channel_id from chatgenius.messages as m where m.id = r.message_id)$$,
    columns => '{message_id, user_id, read_at}',
    key => '{message_id, user_id}',
    rows => $$r.message_id in (
        select m.id from chatgenius.messages as m where m.channel_id = split_part(topic, 'channel:', 2)
    )$$
);

-- A file without a message has no topic: it is published once it is attached.
select rowcast.watch(
    'chatgenius.files', pack => 'chatgenius',
    topic => $$(select 'channel:' || m.channel_id from chatgenius.messages as m where m.id = r.message_id)$$,
    columns => '{id, message_id, name, type, size, url, created_at}',
    rows => $$r.message_id in (
        select m.id from chatgenius.messages as m where m.channel_id = split_part(topic, 'channel:', 2)
    )$$
);

select rowcast.watch(
    'chatgenius.reactions', pack => 'chatgenius',
    topic => $$(select 'channel:' || m.channel_id from chatgenius.messages as m where m.id = r.message_id)$$,
    columns => '{id, message_id, user_id, emoji, created_at}',
    rows => $$r.message_id in (
        select m.id from chatgenius.messages as m where m.channel_id = split_part(topic, 'channel:', 2)
    )$$
);

-- Published to the channel and to the member, because a new member does not follow the channel yet.
select rowcast.watch(
    'chatgenius.channel_members', pack => 'chatgenius',
    topic => $$array['channel:' || r.channel_id, 'user:' || r.user_id]$$,
    columns => '{channel_id, user_id, role, joined_at}',
    key => '{channel_id, user_id}',
    revokes => $$jsonb_build_object('user', r.user_id, 'topic', 'channel:' || r.channel_id)$$,
    rows => $$r.channel_id = split_part(topic, 'channel:', 2) or r.user_id = split_part(topic, 'user:', 2)$$
);

select rowcast.watch(
    'chatgenius.messages', pack => 'chatgenius',
    topic => $$'channel:' || r.channel_id$$,
    columns => '{id, channel_id, user_id, content, metadata, created_at, updated_at}',
    soft_delete => 'deleted_at',
    rows => $$r.channel_id = split_part(topic, 'channel:', 2)$$
);

-- When a channel is deleted, everybody loses its topic.
select rowcast.watch(
    'chatgenius.channels', pack => 'chatgenius',
    topic => $$'channel:' || r.id$$,
    columns => '{id, name, description, created_at, updated_at}',
    soft_delete => 'deleted_at',
    revokes => $$jsonb_build_object('topic', 'channel:' || r.id)$$,
    rows => $$r.id = split_part(topic, 'channel:', 2)$$
);

-- A deleted user loses every topic.
select rowcast.watch(
    'chatgenius.users', pack => 'chatgenius',
    topic => $$'users'$$,
    columns => '{id, username, full_name, avatar_url, created_at, updated_at}',
    soft_delete => 'deleted_at',
    revokes => $$jsonb_build_object('user', r.id)$$,
    rows => $$topic = 'users'$$
);
