-- May this user follow this topic now? Never null: false for a topic that is unknown, malformed or does not exist.
--   owner:<id>     the user and the user's secrets: that user
--   secret:<id>    a secret and the log of its disclosure: its owner. Recipients have no accounts here
-- Security definer, because the daemon that calls it may not read the application's tables.
create function disclosure.may_read(user_id text, topic text) returns boolean
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
comment on function disclosure.may_read(text, text) is 'Whether this user may follow this topic. Called at every subscribe.';

revoke execute on function disclosure.may_read(text, text) from public;
