-- Triggers: normalise addresses, maintain senders, settle each attempt once, and write the audit log.
-- The functions are security definer: a role that may record e-mails and attempts cannot write senders or the audit log
-- directly.

-- Normalises an address or a domain, so that another spelling finds it.
create function email_unsubscribe.normalised_address(address text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select lower(btrim(address, E' \t\r\n'))
$$;

create function email_unsubscribe.normalise_sender() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    new.sender := email_unsubscribe.normalised_address(new.sender);
    return new;
end
$$;

create trigger sender_emails_normalise
before insert or update on email_unsubscribe.sender_emails
for each row execute function email_unsubscribe.normalise_sender();

create trigger unsubscribe_history_normalise
before insert or update on email_unsubscribe.unsubscribe_history
for each row execute function email_unsubscribe.normalise_sender();

-- A domain may be given as @shop.example, or with a trailing dot.
create function email_unsubscribe.normalised_entry(entry_type text, value text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case entry_type when 'domain' then rtrim(ltrim(email_unsubscribe.normalised_address(value), '@'), '.')
                           else email_unsubscribe.normalised_address(value) end
$$;

create function email_unsubscribe.normalise_entry() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    new.value := email_unsubscribe.normalised_entry(new.entry_type, new.value);
    return new;
end
$$;

create trigger allow_list_normalise
before insert or update on email_unsubscribe.allow_list
for each row execute function email_unsubscribe.normalise_entry();

-- Recomputes these senders from sender_emails and unsubscribe_history. It recomputes rather than adds, so neither the
-- order of statements nor a repeated one can make the numbers drift.
-- A sender counts as unsubscribed from the first attempt that succeeded.
create function email_unsubscribe.refresh_senders(addresses text []) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if cardinality(addresses) = 0 then
        return;
    end if;
    -- In a fixed order, so that two concurrent calls cannot deadlock.
    insert into email_unsubscribe.senders (sender, first_seen, last_seen, unsubscribed_at, emails_after_unsubscribe)
    select t.* from email_unsubscribe.tally(addresses) as t order by t.sender
    on conflict do nothing;
    perform from email_unsubscribe.senders as s where s.sender = any (addresses) order by s.sender for update;
    -- Count again under the locks, in a snapshot that includes what the previous holder committed. Every row gets a new
    -- version even if nothing changed, so that a session that counted in an older snapshot (repeatable read) fails.
    update email_unsubscribe.senders as s
    set first_seen = t.first_seen, last_seen = t.last_seen, unsubscribed_at = t.unsubscribed_at,
        emails_after_unsubscribe = t.emails_after_unsubscribe
    from email_unsubscribe.tally(addresses) as t
    where s.sender = t.sender;
    -- Delete senders without any e-mail or attempt.
    delete from email_unsubscribe.senders as s
    where s.sender = any (addresses)
      and not exists (select from email_unsubscribe.sender_emails as m where m.sender = s.sender)
      and not exists (select from email_unsubscribe.unsubscribe_history as u where u.sender = s.sender);
end
$$;

-- What the tables say about these senders; no row for a sender without any data.
create function email_unsubscribe.tally(addresses text [])
returns table (
    sender text, first_seen timestamptz, last_seen timestamptz, unsubscribed_at timestamptz,
    emails_after_unsubscribe integer
)
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
    select a.address, coalesce(e.first_seen, h.first_attempt), coalesce(e.last_seen, h.first_attempt), h.unsubscribed_at,
           (select count(*)::integer from email_unsubscribe.sender_emails as m
            where m.sender = a.address and m.received_at > h.unsubscribed_at)
    from (select distinct u.address from unnest(addresses) as u (address)) as a
    cross join lateral (
        select min(m.received_at) as first_seen, max(m.received_at) as last_seen
        from email_unsubscribe.sender_emails as m where m.sender = a.address
    ) as e
    cross join lateral (
        select min(u.attempted_at) as first_attempt,
               min(u.attempted_at) filter (where u.status = 'succeeded') as unsubscribed_at
        from email_unsubscribe.unsubscribe_history as u where u.sender = a.address
    ) as h
    where coalesce(e.first_seen, h.first_attempt) is not null
$$;

create function email_unsubscribe.follow_senders() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    addresses text [];
begin
    if tg_op = 'INSERT' then
        addresses := array(select distinct n.sender from new_rows as n);
    elsif tg_op = 'DELETE' then
        addresses := array(select distinct o.sender from old_rows as o);
    elsif tg_op = 'UPDATE' then
        addresses := array(select o.sender from old_rows as o union select n.sender from new_rows as n);
    else
        addresses := array(select s.sender from email_unsubscribe.senders as s);
    end if;
    perform email_unsubscribe.refresh_senders(addresses);
    return null;
end
$$;

create trigger sender_emails_insert_follow
after insert on email_unsubscribe.sender_emails referencing new table as new_rows
for each statement execute function email_unsubscribe.follow_senders();

create trigger sender_emails_update_follow
after update on email_unsubscribe.sender_emails referencing old table as old_rows new table as new_rows
for each statement execute function email_unsubscribe.follow_senders();

create trigger sender_emails_delete_follow
after delete on email_unsubscribe.sender_emails referencing old table as old_rows
for each statement execute function email_unsubscribe.follow_senders();

create trigger sender_emails_truncate_follow
after truncate on email_unsubscribe.sender_emails
for each statement execute function email_unsubscribe.follow_senders();

create trigger unsubscribe_history_insert_follow
after insert on email_unsubscribe.unsubscribe_history referencing new table as new_rows
for each statement execute function email_unsubscribe.follow_senders();

create trigger unsubscribe_history_update_follow
after update on email_unsubscribe.unsubscribe_history referencing old table as old_rows new table as new_rows
for each statement execute function email_unsubscribe.follow_senders();

create trigger unsubscribe_history_delete_follow
after delete on email_unsubscribe.unsubscribe_history referencing old table as old_rows
for each statement execute function email_unsubscribe.follow_senders();

create trigger unsubscribe_history_truncate_follow
after truncate on email_unsubscribe.unsubscribe_history
for each statement execute function email_unsubscribe.follow_senders();

-- An attempt is settled once, and its other columns cannot change.
create function email_unsubscribe.settle_once() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if (old.status, old.failure_reason) is not distinct from (new.status, new.failure_reason)
       and (old.id, old.sender, old.unsubscribe_url, old.method, old.attempted_at)
           is not distinct from (new.id, new.sender, new.unsubscribe_url, new.method, new.attempted_at)
    then
        return new;  -- nothing changed
    end if;
    if old.status <> 'pending'
       or (old.id, old.sender, old.unsubscribe_url, old.method, old.attempted_at)
          is distinct from (new.id, new.sender, new.unsubscribe_url, new.method, new.attempted_at)
    then
        raise exception 'an unsubscribe attempt can be settled once, and cannot be changed otherwise'
            using errcode = 'restrict_violation';
    end if;
    return new;
end
$$;

-- Fires after the trigger that normalises: triggers of one kind fire in the order of their names.
create trigger unsubscribe_history_settle_once
before update on email_unsubscribe.unsubscribe_history
for each row execute function email_unsubscribe.settle_once();

create function email_unsubscribe.end_once() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if old.ended_at is not null
       or (old.id, old.user_id, old.started_at) is distinct from (new.id, new.user_id, new.started_at)
    then
        raise exception 'a session can be ended once, and cannot be changed otherwise' using errcode = 'restrict_violation';
    end if;
    return new;
end
$$;

create trigger sessions_end_once
before update on email_unsubscribe.sessions
for each row when (old.* is distinct from new.*)
execute function email_unsubscribe.end_once();

-- The audit log: the triggers below write it in the same transaction as the change, so both commit or neither does.
create function email_unsubscribe.audit_attempt() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into email_unsubscribe.audit_log (action, sender, unsubscribe_url, method, outcome)
    values ('unsubscribe', new.sender, new.unsubscribe_url, new.method, new.status);
    return null;
end
$$;

create trigger unsubscribe_history_audit_insert
after insert on email_unsubscribe.unsubscribe_history
for each row execute function email_unsubscribe.audit_attempt();

create trigger unsubscribe_history_audit_update
after update on email_unsubscribe.unsubscribe_history
for each row when (old.* is distinct from new.*)
execute function email_unsubscribe.audit_attempt();

create function email_unsubscribe.audit_allow_list() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'TRUNCATE' then
        insert into email_unsubscribe.audit_log (action, entry_type, entry_value)
        select 'allow_list_remove', a.entry_type, a.value from email_unsubscribe.allow_list as a;
        return null;
    end if;
    if tg_op in ('UPDATE', 'DELETE') then
        insert into email_unsubscribe.audit_log (action, entry_type, entry_value)
        values ('allow_list_remove', old.entry_type, old.value);
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        insert into email_unsubscribe.audit_log (action, entry_type, entry_value)
        values ('allow_list_add', new.entry_type, new.value);
    end if;
    return null;
end
$$;

create trigger allow_list_audit
after insert or delete on email_unsubscribe.allow_list
for each row execute function email_unsubscribe.audit_allow_list();

create trigger allow_list_audit_update
after update on email_unsubscribe.allow_list
for each row when (old.entry_type is distinct from new.entry_type or old.value is distinct from new.value)
execute function email_unsubscribe.audit_allow_list();

create trigger allow_list_audit_truncate
before truncate on email_unsubscribe.allow_list
for each statement execute function email_unsubscribe.audit_allow_list();

-- Deleting an open session, alone or with its user, counts as revoking it.
create function email_unsubscribe.audit_session() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    case tg_op
        when 'INSERT' then
            insert into email_unsubscribe.audit_log (action, user_id, session_id) values ('login', new.user_id, new.id);
        when 'UPDATE' then
            insert into email_unsubscribe.audit_log (action, user_id, session_id)
            values (case new.end_reason when 'logout' then 'logout' else 'session_' || new.end_reason end,
                    new.user_id, new.id);
        when 'DELETE' then
            insert into email_unsubscribe.audit_log (action, user_id, session_id)
            values ('session_revoked', old.user_id, old.id);
        else
            insert into email_unsubscribe.audit_log (action, user_id, session_id)
            select 'session_revoked', s.user_id, s.id from email_unsubscribe.sessions as s where s.ended_at is null;
    end case;
    return null;
end
$$;

create trigger sessions_audit_login
after insert on email_unsubscribe.sessions
for each row execute function email_unsubscribe.audit_session();

create trigger sessions_audit_end
after update on email_unsubscribe.sessions
for each row when (old.ended_at is null and new.ended_at is not null)
execute function email_unsubscribe.audit_session();

create trigger sessions_audit_delete
after delete on email_unsubscribe.sessions
for each row when (old.ended_at is null)
execute function email_unsubscribe.audit_session();

create trigger sessions_audit_truncate
before truncate on email_unsubscribe.sessions
for each statement execute function email_unsubscribe.audit_session();

-- Protects the log even from its owner. To remove old entries, disable the trigger first.
create function email_unsubscribe.refuse_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'the audit log is append-only' using errcode = 'restrict_violation';
end
$$;

create trigger audit_log_append_only
before update or delete or truncate on email_unsubscribe.audit_log
for each statement execute function email_unsubscribe.refuse_change();

revoke execute on function
    email_unsubscribe.normalised_address(text), email_unsubscribe.normalised_entry(text, text),
    email_unsubscribe.normalise_sender(), email_unsubscribe.normalise_entry(),
    email_unsubscribe.refresh_senders(text []), email_unsubscribe.tally(text []), email_unsubscribe.follow_senders(),
    email_unsubscribe.settle_once(), email_unsubscribe.end_once(), email_unsubscribe.audit_attempt(),
    email_unsubscribe.audit_allow_list(), email_unsubscribe.audit_session(), email_unsubscribe.refuse_change()
from public;
