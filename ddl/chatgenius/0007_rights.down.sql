create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
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
