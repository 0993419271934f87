-- Triggers: maintain updated_at and resolved_at, require an author, and write the audit log.

-- clock_timestamp(), not the start of the transaction: the trigger runs after the row is locked, so the later of two
-- versions of a row has the later time even if its transaction began first.
create function asyncops.set_updated_at() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    new.updated_at := clock_timestamp();
    return new;
end
$$;

-- An UPDATE that changes nothing leaves updated_at alone.
create trigger update_updated_at
before update on asyncops.users
for each row when (old.* is distinct from new.*)
execute function asyncops.set_updated_at();

create trigger update_updated_at
before update on asyncops.status_updates
for each row when (old.* is distinct from new.*)
execute function asyncops.set_updated_at();

create trigger update_updated_at
before update on asyncops.incidents
for each row when (old.* is distinct from new.*)
execute function asyncops.set_updated_at();

create trigger update_updated_at
before update on asyncops.blockers
for each row when (old.* is distinct from new.*)
execute function asyncops.set_updated_at();

create trigger update_updated_at
before update on asyncops.decisions
for each row when (old.* is distinct from new.*)
execute function asyncops.set_updated_at();

-- A new password fulfils must_change_password.
create function asyncops.note_new_password() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    new.must_change_password := false;
    return new;
end
$$;

create trigger note_new_password
before update of password_hash on asyncops.users
for each row when (old.must_change_password and old.password_hash is distinct from new.password_hash)
execute function asyncops.note_new_password();

-- A row has resolved_at exactly while it is resolved or closed: summaries and archiving rely on it.
create function asyncops.keep_resolved_at() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    new.resolved_at := case when new.status in ('resolved', 'closed') then coalesce(new.resolved_at, clock_timestamp()) end;
    return new;
end
$$;

create trigger keep_resolved_at
before insert or update of status, resolved_at on asyncops.incidents
for each row execute function asyncops.keep_resolved_at();

create trigger keep_resolved_at
before insert or update of status, resolved_at on asyncops.blockers
for each row execute function asyncops.keep_resolved_at();

-- A row must have an author, and keeps it while the account exists. Only deleting the account removes the author,
-- through the foreign key's SET NULL. The argument is the column. Security definer, because a role that writes rows may
-- not be able to read users.
create function asyncops.require_author() returns trigger
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

-- The audit log of decisions: one row for a creation or a deletion, and one for each field of an update. It covers all
-- columns except updated_at, including columns added later.
-- The setting rowcast.actor, a user's id, says who acts. Without it, a creation is attributed to the creator, and an
-- update or a deletion is refused. Only the foreign key's SET NULL for a deleted account may have no actor.
-- Security definer, because nobody else may write the log.
create function asyncops.audit_decision() returns trigger
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

create trigger audit_decision
after insert or update or delete on asyncops.decisions
for each row execute function asyncops.audit_decision();

-- The audit log is append-only, even for its owner. Only the foreign key may set the name of a deleted account to null.
create function asyncops.keep_audit_log() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'UPDATE' then
        if new.changed_by_id is null
           and to_jsonb(old) - 'changed_by_id' = to_jsonb(new) - 'changed_by_id'
           and not exists (select from asyncops.users as u where u.id = old.changed_by_id)
        then
            return new;
        end if;
    end if;
    raise restrict_violation using
        message = format('%s is not allowed on the audit log of decisions: it is append-only', tg_op),
        schema = tg_table_schema, table = tg_table_name;
end
$$;

create trigger keep_audit_log
before update or delete on asyncops.decision_audit_log
for each row execute function asyncops.keep_audit_log();

create trigger keep_audit_log_whole
before truncate on asyncops.decision_audit_log
for each statement execute function asyncops.keep_audit_log();

-- TRUNCATE fires no row triggers, so the audit log would miss it.
create function asyncops.refuse_truncate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise restrict_violation using
        message = format('%I cannot be truncated, since the audit log would miss that: use delete', tg_table_name),
        schema = tg_table_schema, table = tg_table_name;
end
$$;

create trigger refuse_truncate
before truncate on asyncops.decisions
for each statement execute function asyncops.refuse_truncate();

revoke execute on function asyncops.set_updated_at() from public;
revoke execute on function asyncops.note_new_password() from public;
revoke execute on function asyncops.keep_resolved_at() from public;
revoke execute on function asyncops.require_author() from public;
revoke execute on function asyncops.audit_decision() from public;
revoke execute on function asyncops.keep_audit_log() from public;
revoke execute on function asyncops.refuse_truncate() from public;
