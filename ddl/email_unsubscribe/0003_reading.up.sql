-- Who may follow which topic.

-- May this user follow this topic now? Never null: false for a topic that is unknown, malformed or does not exist.
--   senders, history, allow_list, audit   the mailbox: every user
--   account:<id>                          the user's own sessions: that user
-- Security definer, because the daemon that calls it may not read the application's tables.
create function email_unsubscribe.may_read(user_id text, topic text) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from email_unsubscribe.users as u where u.id = may_read.user_id)
       and coalesce(may_read.topic in ('senders', 'history', 'allow_list', 'audit', 'account:' || may_read.user_id), false)
$$;
comment on function email_unsubscribe.may_read(text, text) is 'Whether this user may follow this topic. Called at every subscribe.';

revoke execute on function email_unsubscribe.may_read(text, text) from public;
