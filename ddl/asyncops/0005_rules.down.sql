alter table asyncops.daily_summaries drop constraint daily_summaries_summary_date_not_ahead;
alter table asyncops.decisions
drop constraint decisions_decision_date_not_ahead,
drop constraint decisions_title_visible;
alter table asyncops.incidents drop constraint incidents_title_visible;
alter table asyncops.status_updates drop constraint status_updates_title_visible;
alter table asyncops.users
drop constraint users_full_name_visible,
drop constraint users_email_well_formed,
drop constraint users_email_is_address;

create or replace function asyncops.audit_decision() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    actor constant text := current_setting('rowcast.actor', true);
    unwritten constant text [] := '{created_by_id, updated_at}';  -- what the deletion of an account may change
    who integer;
    account_deleted boolean := false;
begin
    if actor ~ '^[1-9][0-9]{0,9}$' then
        select u.id into who from asyncops.users as u where u.id = actor::bigint;
    end if;
    if tg_op = 'INSERT' then
        insert into asyncops.decision_audit_log (decision_id, changed_by_id, change_type, changed_at)
        values (new.id, coalesce(who, new.created_by_id), 'created', clock_timestamp());
        return null;
    end if;
    if tg_op = 'UPDATE' then
        account_deleted := old.created_by_id is not null and new.created_by_id is null
                           and to_jsonb(old) - unwritten = to_jsonb(new) - unwritten;
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

drop trigger require_author on asyncops.status_updates;
drop trigger require_author on asyncops.incidents;
drop trigger require_author on asyncops.blockers;
drop trigger require_author on asyncops.decisions;

create or replace function asyncops.require_author() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
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

create trigger require_author
before insert or update of reported_by_id on asyncops.incidents
for each row when (new.reported_by_id is null)
execute function asyncops.require_author('reported_by_id');

create trigger require_author
before insert or update of reported_by_id on asyncops.blockers
for each row when (new.reported_by_id is null)
execute function asyncops.require_author('reported_by_id');

create trigger require_author
before insert or update of created_by_id on asyncops.decisions
for each row when (new.created_by_id is null)
execute function asyncops.require_author('created_by_id');

drop trigger unarchive on asyncops.blockers;
drop trigger unarchive on asyncops.incidents;
drop function asyncops.unarchive();
