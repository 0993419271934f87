-- A function in SQL locks every table that it mentions, so while one of them was locked, nobody could subscribe to
-- anything. PL/pgSQL locks what it comes to. Its plans are kept, also those that were made while a table was small.
create or replace function disclosure.may_read(user_id text, topic text) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
    if not exists (select from disclosure.users as u where u.id = may_read.user_id) then
        return false;
    end if;
    -- 18 digits always fit a bigint.
    if may_read.topic ~ '^secret:[1-9][0-9]{0,17}$' then
        return exists (
            select from disclosure.secrets as s
            where s.id = substr(may_read.topic, length('secret:') + 1)::bigint and s.user_id = may_read.user_id
        );
    end if;
    return coalesce(may_read.topic = 'owner:' || may_read.user_id, false);
end
$$;
