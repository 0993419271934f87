-- How to read: only what lives, and only by those who may.

create view chatgenius.live_users as
select u.id, u.auth0_id, u.email, u.username, u.full_name, u.avatar_url, u.created_at, u.updated_at
from chatgenius.users as u
where u.deleted_at is null;

create view chatgenius.live_channels as
select c.id, c.name, c.description, c.created_at, c.updated_at
from chatgenius.channels as c
where c.deleted_at is null;

-- Not those of a deleted channel either. Those of a deleted author do live: they are part of the conversation.
create view chatgenius.live_messages as
select m.id, m.channel_id, m.user_id, m.content, m.created_at, m.updated_at, m.metadata
from chatgenius.messages as m
where m.deleted_at is null
  and exists (select from chatgenius.channels as c where c.id = m.channel_id and c.deleted_at is null);

-- A view reads with its owner's rights unless told otherwise, which Postgres can be told since 15: then a grant
-- on a view gives no way around the tables' own grants and row policies.
do $$
begin
    if current_setting('server_version_num')::integer >= 150000 then
        alter view chatgenius.live_users set (security_invoker = true);
        alter view chatgenius.live_channels set (security_invoker = true);
        alter view chatgenius.live_messages set (security_invoker = true);
    end if;
end
$$;

-- May this user follow this topic now? Never null: what is unknown, malformed or not there is simply not allowed.
--   users             the directory: every living user
--   user:<id>         the user's own affairs: that user
--   channel:<id>      a living channel: its members
-- Definer's rights, since the daemon that asks reads none of the application's tables.
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
comment on function chatgenius.may_read(text, text) is 'May this user follow this topic now? Asked at every subscribe.';

revoke execute on function chatgenius.may_read(text, text) from public;
