-- Occasional work: creating the first admin, daily summaries, archiving. Also the application's role.

-- Creates an admin, who must change the password at the first login. Without a password_hash, it generates a password
-- of 144 random bits, stores its hash, and returns the only copy: no file, statement or log ever contains the password.
create function asyncops.create_admin(
    -- In two parts, because `--schema` would replace the name before the dot.
    email text default 'admin@asyncops' || '.local', full_name text default 'Administrator',
    password_hash text default null, out id integer, out password text
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    pgcrypto constant name := (
        select n.nspname from pg_extension as e join pg_namespace as n on n.oid = e.extnamespace where e.extname = 'pgcrypto'
    );
    hash text := password_hash;
begin
    if hash is null then
        if pgcrypto is null then
            raise feature_not_supported using
                message = 'this database lacks the extension pgcrypto, which hashes passwords',
                hint = 'Create it, or pass a bcrypt hash as password_hash.';
        end if;
        execute format('select translate(encode(%I.gen_random_bytes(18), ''base64''), ''+/'', ''-_'')', pgcrypto)
        into password;
        execute format('select %1$I.crypt($1, %1$I.gen_salt(''bf''::text, 12::integer))', pgcrypto) into hash using password;
    end if;
    insert into asyncops.users (email, password_hash, full_name, role, must_change_password)
    values (create_admin.email, hash, create_admin.full_name, 'admin', true)
    returning users.id into create_admin.id;
end
$$;
comment on function asyncops.create_admin(text, text, text) is
'Creates an admin and returns the password, which must be changed at the first login.';

-- Summarises what happened on a day and what was active at its end, or is active now if the day has not ended. Days are
-- UTC days. Generating a summary again replaces the old one. It includes archived rows, so archiving changes no
-- summary. Security definer, because only this function writes summaries.
create function asyncops.generate_daily_summary(for_date date default (now() at time zone 'UTC')::date)
returns asyncops.daily_summaries
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    with day as (
        select for_date::timestamp at time zone 'UTC' as begins, (for_date + 1)::timestamp at time zone 'UTC' as ends
    ), updates as (
        select coalesce(jsonb_agg(jsonb_build_object(
                   'id', s.id, 'title', s.title, 'author', u.full_name,
                   'created_at', to_char(s.created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
               ) order by s.created_at, s.id), '[]') as list,
               count(*)::integer as number
        from asyncops.status_updates as s
        join asyncops.users as u on u.id = s.user_id
        join day on s.created_at >= day.begins and s.created_at < day.ends
    ), incident as (
        select coalesce(jsonb_agg(jsonb_build_object(
                   'id', i.id, 'title', i.title, 'severity', i.severity, 'status', i.status
               ) order by i.created_at, i.id), '[]') as list,
               count(*)::integer as number,
               count(*) filter (where i.severity = 'critical') as critical
        from asyncops.incidents as i
        join day on i.created_at < day.ends and (i.resolved_at is null or i.resolved_at >= day.ends)
    ), blocker as (
        select coalesce(jsonb_agg(jsonb_build_object(
                   'id', b.id, 'description', b.description, 'status', b.status
               ) order by b.created_at, b.id), '[]') as list,
               count(*)::integer as number
        from asyncops.blockers as b
        join day on b.created_at < day.ends and (b.resolved_at is null or b.resolved_at >= day.ends)
    ), decision as (
        select coalesce(jsonb_agg(jsonb_build_object(
                   'id', d.id, 'title', d.title, 'decision_date', to_char(d.decision_date, 'YYYY-MM-DD')
               ) order by d.decision_date, d.id), '[]') as list,
               count(*)::integer as number
        from asyncops.decisions as d
        where d.decision_date > for_date - 7 and d.decision_date <= for_date
    )
    insert into asyncops.daily_summaries as kept
        (summary_date, content, status_updates_count, incidents_count, blockers_count, decisions_count, generated_at)
    select for_date,
           jsonb_build_object(
               'status_updates', updates.list, 'incidents', incident.list, 'blockers', blocker.list,
               'recent_decisions', decision.list,
               'statistics', jsonb_build_object(
                   'total_status_updates', updates.number, 'critical_incidents', incident.critical,
                   'active_blockers', blocker.number, 'decisions_last_7_days', decision.number
               )
           ),
           updates.number, incident.number, blocker.number, decision.number, clock_timestamp()
    from updates, incident, blocker, decision
    on conflict (summary_date) do update set
        content = excluded.content, status_updates_count = excluded.status_updates_count,
        incidents_count = excluded.incidents_count, blockers_count = excluded.blockers_count,
        decisions_count = excluded.decisions_count, generated_at = excluded.generated_at
    returning kept.*
$$;
comment on function asyncops.generate_daily_summary(date) is 'Writes the summary of a day, or replaces it.';

-- Archives old rows: status updates after a year, incidents after a year if they are resolved or closed, blockers six
-- months after they were resolved. Nothing else is archived, and nothing is deleted. Each call handles the oldest rows,
-- at most `max_rows` per table, to keep transactions short: call it until it returns three zeros. Rows locked by others
-- wait for the next call, and concurrent calls are safe.
create function asyncops.archive(
    max_rows integer default 1000, as_of timestamptz default now(),
    out status_updates integer, out incidents integer, out blockers integer
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    update asyncops.status_updates as s set archived_at = clock_timestamp()
    where s.id in (
        select o.id from asyncops.status_updates as o
        where o.archived_at is null and o.created_at < as_of - interval '1 year'
        order by o.created_at limit max_rows for update skip locked
    );
    get diagnostics status_updates = row_count;
    update asyncops.incidents as i set archived_at = clock_timestamp()
    where i.id in (
        select o.id from asyncops.incidents as o
        where o.archived_at is null and o.status in ('resolved', 'closed') and o.created_at < as_of - interval '1 year'
        order by o.created_at limit max_rows for update skip locked
    );
    get diagnostics incidents = row_count;
    update asyncops.blockers as b set archived_at = clock_timestamp()
    where b.id in (
        select o.id from asyncops.blockers as o
        where o.archived_at is null and o.status = 'resolved' and o.resolved_at < as_of - interval '6 months'
        order by o.resolved_at limit max_rows for update skip locked
    );
    get diagnostics blockers = row_count;
end
$$;
comment on function asyncops.archive(integer, timestamptz) is
'Archives old rows in batches: call it until it returns zeros.';

revoke execute on function asyncops.create_admin(text, text, text) from public;
revoke execute on function asyncops.generate_daily_summary(date) from public;
revoke execute on function asyncops.archive(integer, timestamptz) from public;

-- The application connects as a member of this role, which may read and write rows but not change the schema.
-- triggers/asyncops.sql grants its rights at every apply. All databases of the cluster share its roles.
do $$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'asyncops_app') then
        create role asyncops_app nologin;
    end if;
exception
    when duplicate_object or unique_violation then
        null;  -- another database of this cluster created it first
    when insufficient_privilege then
        raise warning 'rowcast: % may not create the role asyncops_app; create it, and apply again to give it its rights.',
            current_user;
end
$$;
