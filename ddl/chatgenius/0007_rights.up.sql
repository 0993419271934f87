-- A function in SQL locks every table that it mentions, so while one of them was locked, nobody could subscribe to
-- anything. PL/pgSQL locks what it comes to. Its plans are kept, also those that were made while a table was small.
create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
    if not exists (select from chatgenius.users as u where u.id = may_read.user_id and u.deleted_at is null) then
        return false;
    end if;
    if may_read.topic like 'channel:%' then
        return exists (
            select from chatgenius.channel_members as m
            join chatgenius.channels as c on c.id = m.channel_id
            where m.channel_id = substr(may_read.topic, length('channel:') + 1)
              and m.user_id = may_read.user_id
              and c.deleted_at is null
        );
    end if;
    return coalesce(may_read.topic in ('users', 'user:' || may_read.user_id), false);
end
$$;
