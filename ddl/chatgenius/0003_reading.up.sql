-- Reading: views without deleted rows, and who may follow which topic.

create view chatgenius.live_users as
select u.id, u.auth0_id, u.email, u.username, u.full_name, u.avatar_url, u.created_at, u.updated_at
from chatgenius.users as u
where u.deleted_at is null;

create view chatgenius.live_channels as
select c.id, c.name, c.description, c.created_at, c.updated_at
from chatgenius.channels as c
where c.deleted_at is null;

-- Leaves out messages of deleted channels, but keeps those of deleted authors: they are part of the conversation.
create view chatgenius.live_messages as
select m.id, m.channel_id, m.user_id, m.content, m.created_at, m.updated_at, m.metadata
from chatgenius.messages as m
where m.deleted_at is null
  and exists (select from chatgenius.channels as c where c.id = m.channel_id and c.deleted_at is null);

-- By default a view reads with its owner's rights. From PostgreSQL 15 on it can read with the caller's, so a grant
-- on a view does not bypass the tables' own grants and row policies.
do $$
begin
    if current_setting('server_version_num')::integer >= 150000 then
        alter view chatgenius.live_users set (security_invoker = true);
        alter view chatgenius.live_channels set (security_invoker = true);
        alter view chatgenius.live_messages set (security_invoker = true);
    end if;
end
$$;

-- May this user follow this topic now? Never null: false for a topic that is unknown, malformed or does not exist.
--   users             the user directory: every user who is not deleted
--   user:<id>         the user's own data: that user
--   channel:<id>      a channel that is not deleted: its members
-- Security definer, because the daemon that calls it may not read the application's tables.
create function chatgenius.may_read(user_id text, topic text) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from chatgenius.users as u where u.id = may_read.user_id and u.deleted_at is null)
       and case
               when may_read.topic = 'users' then true
               when may_read.topic like 'user:%' then may_read.topic = 'user:' || may_read.user_id
               when may_read.topic like 'channel:%' then exists (
                   select from chatgenius.channel_members as m
                   join chatgenius.channels as c on c.id = m.channel_id
                   where m.channel_id = substr(may_read.topic, length('channel:') + 1)
                     and m.user_id = may_read.user_id
                     and c.deleted_at is null
               )
               else false
           end
$$;
comment on function chatgenius.may_read(text, text) is 'Whether this user may follow this topic. Called at every subscribe.';

revoke execute on function chatgenius.may_read(text, text) from public;
