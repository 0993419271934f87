-- Reading: views without archived rows, and who may follow which topic.

-- The default reads. Archived rows stay in the tables.
create view asyncops.live_status_updates as
select s.id, s.user_id, s.title, s.content, s.tags, s.created_at, s.updated_at
from asyncops.status_updates as s
where s.archived_at is null;

create view asyncops.live_incidents as
select
    i.id, i.reported_by_id, i.assigned_to_id, i.title, i.description, i.severity, i.status, i.resolution_notes,
    i.created_at, i.updated_at, i.resolved_at
from asyncops.incidents as i
where i.archived_at is null;

create view asyncops.live_blockers as
select
    b.id, b.reported_by_id, b.description, b.impact, b.status, b.resolution_notes, b.related_status_id,
    b.related_incident_id, b.created_at, b.updated_at, b.resolved_at
from asyncops.blockers as b
where b.archived_at is null;

-- By default a view reads with its owner's rights. From PostgreSQL 15 on it can read with the caller's, so a grant
-- on a view does not bypass the tables' own grants and row policies.
do $$
begin
    if current_setting('server_version_num')::integer >= 150000 then
        alter view asyncops.live_status_updates set (security_invoker = true);
        alter view asyncops.live_incidents set (security_invoker = true);
        alter view asyncops.live_blockers set (security_invoker = true);
    end if;
end
$$;

-- May this user follow this topic now? Never null: false for a topic that is unknown, malformed or does not exist.
--   team:members, team:status_updates, team:incidents, team:blockers, team:decisions, team:summaries: every active user
--   user:<id>         the user's own data: that user, while active
-- Security definer, because the daemon that calls it may not read the application's tables.
create function asyncops.may_read(user_id text, topic text) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (
               select from asyncops.users as u
               where u.is_active
                 and u.id = case when may_read.user_id ~ '^[1-9][0-9]{0,9}$' then may_read.user_id::bigint end
           )
       and coalesce(
               may_read.topic in ('team:members', 'team:status_updates', 'team:incidents', 'team:blockers',
                                  'team:decisions', 'team:summaries')
               or may_read.topic = 'user:' || may_read.user_id,
               false
           )
$$;
comment on function asyncops.may_read(text, text) is 'Whether this user may follow this topic. Called at every subscribe.';

revoke execute on function asyncops.may_read(text, text) from public;
