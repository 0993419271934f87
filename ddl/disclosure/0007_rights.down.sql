create or replace function disclosure.may_read(user_id text, topic text) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from disclosure.users as u where u.id = may_read.user_id)
       and case
               when may_read.topic like 'owner:%' then may_read.topic = 'owner:' || may_read.user_id
               -- 18 digits always fit a bigint.
               when may_read.topic ~ '^secret:[1-9][0-9]{0,17}$' then exists (
                   select from disclosure.secrets as s
                   where s.id = substr(may_read.topic, length('secret:') + 1)::bigint and s.user_id = may_read.user_id
               )
               else false
           end
$$;
