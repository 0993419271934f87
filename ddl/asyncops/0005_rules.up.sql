-- Rules for every write: a reopened row returns from the archive, a deactivated user creates nothing and changes no
-- decision, and nothing is dated ahead. Also what counts as an address, a name or a title. New constraints apply to new
-- rows; the next revision checks existing ones.

-- A row that is opened again is work to do, so it returns from the archive.
create function asyncops.unarchive() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    new.archived_at := null;
    return new;
end
$$;

create trigger unarchive
before update of status on asyncops.incidents
for each row when (
    old.archived_at is not null and old.status is distinct from new.status and new.status not in ('resolved', 'closed')
)
execute function asyncops.unarchive();

create trigger unarchive
before update of status on asyncops.blockers
for each row when (
    old.archived_at is not null and old.status is distinct from new.status and new.status <> 'resolved'
)
execute function asyncops.unarchive();

revoke execute on function asyncops.unarchive() from public;

-- A row must have an author, who is active when the row is created, and keeps the author while the account exists. Only
-- deleting the account removes the author, through the foreign key's SET NULL. The argument is the column. Security
-- definer, because a role that writes rows may not be able to read users.
create or replace function asyncops.require_author() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    author constant integer := (to_jsonb(new) ->> tg_argv[0])::integer;
begin
    if author is not null then
        if exists (select from asyncops.users as u where u.id = author and not u.is_active)
           and (tg_op = 'INSERT' or to_jsonb(old) ->> tg_argv[0] is distinct from author::text)
        then
            raise insufficient_privilege using
                message = format('the user in column %I of relation %I is deactivated', tg_argv[0], tg_table_name),
                schema = tg_table_schema, table = tg_table_name, column = tg_argv[0];
        end if;
        return new;
    end if;
    if tg_op = 'UPDATE' then
        if not exists (select from asyncops.users as u where u.id = (to_jsonb(old) ->> tg_argv[0])::integer) then
            return new;
        end if;
    end if;
    raise not_null_violation using
        message = format('null value in column %I of relation %I: a new row must name the user who created it', tg_argv[0], tg_table_name),
        schema = tg_table_schema, table = tg_table_name, column = tg_argv[0];
end
$$;

drop trigger require_author on asyncops.incidents;
create trigger require_author
before insert or update of reported_by_id on asyncops.incidents
for each row
execute function asyncops.require_author('reported_by_id');

drop trigger require_author on asyncops.blockers;
create trigger require_author
before insert or update of reported_by_id on asyncops.blockers
for each row
execute function asyncops.require_author('reported_by_id');

drop trigger require_author on asyncops.decisions;
create trigger require_author
before insert or update of created_by_id on asyncops.decisions
for each row
execute function asyncops.require_author('created_by_id');

create trigger require_author
before insert or update of user_id on asyncops.status_updates
for each row
execute function asyncops.require_author('user_id');

-- One row for a creation or a deletion, and one for each field of an update. It covers all columns except updated_at,
-- including columns added later.
-- The setting rowcast.actor, the id of an active user, says who acts. Without it, a creation is attributed to the
-- creator, and an update or a deletion is refused. Only the foreign key's SET NULL for a deleted account may have no
-- actor. Security definer, because nobody else may write the log.
create or replace function asyncops.audit_decision() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    actor constant text := current_setting('rowcast.actor', true);
    unwritten constant text [] := '{created_by_id, updated_at}';  -- what the deletion of an account may change
    who integer;
    is_active boolean;
    account_deleted boolean := false;
begin
    if actor ~ '^[1-9][0-9]{0,9}$' then
        select u.id, u.is_active into who, is_active from asyncops.users as u where u.id = actor::bigint;
    end if;
    if tg_op = 'UPDATE' then
        account_deleted := old.created_by_id is not null and new.created_by_id is null
                           and to_jsonb(old) - unwritten = to_jsonb(new) - unwritten;
    end if;
    if not is_active and not account_deleted then
        raise insufficient_privilege using
            message = 'the user who changes this decision is deactivated',
            schema = tg_table_schema, table = tg_table_name;
    end if;
    if tg_op = 'INSERT' then
        insert into asyncops.decision_audit_log (decision_id, changed_by_id, change_type, changed_at)
        values (new.id, coalesce(who, new.created_by_id), 'created', clock_timestamp());
        return null;
    end if;
    if who is null and not account_deleted then
        raise not_null_violation using
            message = 'the user who changes this decision is not known, and the audit log must name one',
            hint = 'Set the user in the transaction: select set_config(''rowcast.actor'', ''<the id of the user>'', true)',
            schema = tg_table_schema, table = 'decision_audit_log', column = 'changed_by_id';
    end if;
    if tg_op = 'DELETE' then
        insert into asyncops.decision_audit_log (decision_id, changed_by_id, change_type, changed_at)
        values (old.id, who, 'deleted', clock_timestamp());
    else
        insert into asyncops.decision_audit_log
            (decision_id, changed_by_id, change_type, field_name, old_value, new_value, changed_at)
        select new.id, who, 'updated', a.attname, to_jsonb(old) ->> a.attname, to_jsonb(new) ->> a.attname, clock_timestamp()
        from pg_attribute as a
        where a.attrelid = tg_relid and a.attnum > 0 and not a.attisdropped and a.attname <> 'updated_at'
          and to_jsonb(old) -> a.attname::text is distinct from to_jsonb(new) -> a.attname::text
        order by a.attnum;
    end if;
    return null;
end
$$;

-- The characters in these lists are blanks, control characters, and others that nobody sees. An address has none of
-- them, and a name or a title has something else.
alter table asyncops.users
add constraint users_email_is_address check (email ~ '^[^@]+@[^@]+$') not valid,
add constraint users_email_well_formed check (
    email !~ '[\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint users_full_name_visible check (
    full_name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table asyncops.status_updates
add constraint status_updates_title_visible check (
    title ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table asyncops.incidents
add constraint incidents_title_visible check (
    title ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

-- A decision has been made, and a summary is about a day that has begun. A decision's date is that of its author, who
-- may be a day ahead of UTC.
alter table asyncops.decisions
add constraint decisions_title_visible check (
    title ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint decisions_decision_date_not_ahead check (
    decision_date <= (updated_at at time zone 'UTC')::date + 1
) not valid;

alter table asyncops.daily_summaries
add constraint daily_summaries_summary_date_not_ahead check (
    summary_date <= (generated_at at time zone 'UTC')::date
) not valid;
