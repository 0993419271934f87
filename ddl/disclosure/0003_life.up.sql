-- The life of a secret: the effects of a check-in, and the functions that a job calls.
--
--   active     waiting; once it is due, a job may claim it
--   paused     stopped by the owner
--   triggered  every recipient was told
--   failed     more than five attempts failed: not retried until somebody sets it to `active`
--
-- A job claims due secrets. It holds a claim while `processing_started_at` equals the timestamp that it was given,
-- which is the version that optimistic locking compares. A job that has lost its claim (it took too long, or the owner
-- checked in or paused the secret) cannot change the secret.
--
-- The functions that a job calls are security definer, so that a job's role needs no rights on the tables: it sees the
-- secrets that it has claimed and their recipients, and writes only its reports.

create function disclosure.keep_secret() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A day is 24 hours, regardless of daylight saving time.
    new.next_check_in := new.last_check_in + new.check_in_days * interval '24 hours';
    if tg_op = 'UPDATE' then
        -- The owner checked in or stopped the secret, so a job that works on it must not continue.
        if new.next_check_in > old.next_check_in or new.status <> 'active' then
            new.processing_started_at := null;
        end if;
        -- The count starts again at a check-in, and when somebody takes the secret out of `failed`.
        if new.last_check_in > old.last_check_in or (old.status = 'failed' and new.status <> 'failed') then
            new.retry_count := 0;
            new.last_retry_at := null;
        end if;
    end if;
    return new;
end
$$;

-- The application chose next_check_in for existing rows; replace it by the computed time.
update disclosure.secrets as s
set next_check_in = s.last_check_in + s.check_in_days * interval '24 hours'
where s.next_check_in is distinct from s.last_check_in + s.check_in_days * interval '24 hours';

create trigger secrets_keep
before insert or update on disclosure.secrets
for each row execute function disclosure.keep_secret();

-- Claims secrets that are due: active, past next_check_in, unclaimed, and with a recipient. A claim older than `expiry`
-- is void, because its job must have died. After a failure a secret waits for `retry_after`, so that one outage does
-- not use up all attempts. Rows locked by others are skipped. The timestamp has no microseconds: some languages' times
-- have none, and it must come back unchanged.
create function disclosure.claim_due(
    max_secrets integer default 10,
    expiry interval default '15 minutes',
    retry_after interval default '5 minutes'
) returns table (
    secret_id bigint, claimed_at timestamptz, algorithm text, key_id text, ciphertext bytea, iv bytea, auth_tag bytea
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    clock constant timestamptz := clock_timestamp();
    stamp constant timestamptz := date_trunc('milliseconds', clock);
begin
    if (max_secrets between 1 and 1000) is not true then
        raise exception 'max_secrets must be a number from 1 to 1000' using errcode = 'invalid_parameter_value';
    end if;
    if (expiry >= interval '1 minute') is not true then
        raise exception 'expiry must be one minute or more, so that a running job keeps its claims'
            using errcode = 'invalid_parameter_value';
    end if;
    if (retry_after >= interval '0') is not true then
        raise exception 'retry_after must not be negative' using errcode = 'invalid_parameter_value';
    end if;
    return query
    with due as materialized (
        select d.id
        from disclosure.secrets as d
        where d.status = 'active' and d.next_check_in <= clock
          and (d.processing_started_at is null or d.processing_started_at < clock - expiry)
          and (d.last_retry_at is null or d.last_retry_at <= clock - retry_after)
          and exists (select from disclosure.recipients as r where r.secret_id = d.id)
        order by d.next_check_in, d.id
        limit max_secrets
        for no key update of d skip locked
    )
    update disclosure.secrets as s
    set processing_started_at = stamp
    from due
    where s.id = due.id
    returning s.id, s.processing_started_at, s.algorithm::text, s.key_id::text, s.ciphertext, s.iv, s.auth_tag;
end
$$;
comment on function disclosure.claim_due(integer, interval, interval) is
'Claims due secrets for the caller alone. Commit before you send anything to a recipient.';

-- Is this claim still held? Never null. Only for the functions below, which call it with their owner's rights.
create function disclosure.is_claimed(secret_id bigint, claimed_at timestamptz) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from disclosure.secrets as s
        where s.id = is_claimed.secret_id and s.status = 'active'
          and s.processing_started_at = is_claimed.claimed_at
    )
$$;

-- The log entries with this status for these addresses: one read of idx_disclosure_log_batch_fetch, which contains
-- every column that the query uses.
create function disclosure.existing_disclosures(
    secret_id bigint, recipient_emails text [], status text default 'sent'
) returns table (recipient_email text, created_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select l.recipient_email::text, l.created_at
    from disclosure.disclosure_log as l
    where l.secret_id = existing_disclosures.secret_id
      and l.recipient_email = any (existing_disclosures.recipient_emails)
      and l.status = existing_disclosures.status
$$;

-- The recipients that the holder of the claim still has to tell.
create function disclosure.recipients_due(secret_id bigint, claimed_at timestamptz) returns setof text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    emails text [];
begin
    if disclosure.is_claimed(recipients_due.secret_id, recipients_due.claimed_at) then
        emails := array(
            select r.email::text from disclosure.recipients as r
            where r.secret_id = recipients_due.secret_id order by r.id
        );
        return query
        select e.email
        from unnest(emails) with ordinality as e (email, place)
        where not e.email = any (
            array(select a.recipient_email from disclosure.existing_disclosures(recipients_due.secret_id, emails) as a)
        )
        order by e.place;
    end if;
end
$$;

-- Records that a recipient is about to be told, and returns the entry's id. Null means: do not tell. Either the claim
-- is lost, or this is not a recipient of the secret, or the recipient was already told.
create function disclosure.begin_attempt(secret_id bigint, claimed_at timestamptz, recipient_email text)
returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    begun bigint;
begin
    insert into disclosure.disclosure_log (secret_id, recipient_email)
    select r.secret_id, r.email
    from disclosure.recipients as r
    where r.secret_id = begin_attempt.secret_id and r.email = begin_attempt.recipient_email
      and disclosure.is_claimed(begin_attempt.secret_id, begin_attempt.claimed_at)
      and not exists (
          select from disclosure.existing_disclosures(begin_attempt.secret_id, array[begin_attempt.recipient_email])
      )
    returning id into begun;
    return begun;
end
$$;

-- Records that a recipient was told. It needs no claim: the e-mail has gone out, and the next job must know.
-- False: the entry was already closed. Raises unique_violation if another entry says that the recipient was told.
create function disclosure.record_sent(attempt_id bigint) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    update disclosure.disclosure_log as l
    set status = 'sent', sent_at = clock_timestamp()
    where l.id = record_sent.attempt_id and l.status = 'pending';
    return found;
end
$$;

-- Records that a recipient could not be told, and why. False: the entry was already closed.
create function disclosure.record_unsent(attempt_id bigint, error text) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    update disclosure.disclosure_log as l
    set status = 'failed', error = record_unsent.error
    where l.id = record_unsent.attempt_id and l.status = 'pending';
    return found;
end
$$;

-- Ends a job's work on a secret whose recipients were all told. False: the claim is lost, and nothing was changed.
-- Raises object_not_in_prerequisite_state if a recipient was not told, or if there is none.
create function disclosure.record_success(secret_id bigint, claimed_at timestamptz) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    update disclosure.secrets as s
    set status = 'triggered', processing_started_at = null
    where s.id = record_success.secret_id and s.status = 'active'
      and s.processing_started_at = record_success.claimed_at
      and exists (select from disclosure.recipients as r where r.secret_id = s.id)
      and not exists (
          select from disclosure.recipients as r
          where r.secret_id = s.id and not exists (
              select from disclosure.disclosure_log as l
              where l.secret_id = r.secret_id and l.recipient_email = r.email and l.status = 'sent'
          )
      );
    if found then
        return true;
    end if;
    if disclosure.is_claimed(record_success.secret_id, record_success.claimed_at) then
        raise exception 'secret % has not been sent to every recipient', record_success.secret_id
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    return false;
end
$$;

-- Ends a job's work on a secret that could not be disclosed to everybody, and counts a failure. The sixth is final.
-- Returns the new status of the secret; null: the claim is lost, and nothing was changed.
create function disclosure.record_failure(secret_id bigint, claimed_at timestamptz) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    now_it_is text;
begin
    update disclosure.secrets as s
    set retry_count = s.retry_count + 1,
        last_retry_at = clock_timestamp(),
        processing_started_at = null,
        status = case when s.retry_count + 1 > 5 then 'failed' else s.status end
    where s.id = record_failure.secret_id and s.status = 'active'
      and s.processing_started_at = record_failure.claimed_at
    returning s.status into now_it_is;
    return now_it_is;
end
$$;

-- The operator grants a job's role the functions that it calls; see the guide. Nobody needs the others.
revoke execute on function disclosure.keep_secret() from public;
revoke execute on function disclosure.claim_due(integer, interval, interval) from public;
revoke execute on function disclosure.is_claimed(bigint, timestamptz) from public;
revoke execute on function disclosure.existing_disclosures(bigint, text [], text) from public;
revoke execute on function disclosure.recipients_due(bigint, timestamptz) from public;
revoke execute on function disclosure.begin_attempt(bigint, timestamptz, text) from public;
revoke execute on function disclosure.record_sent(bigint) from public;
revoke execute on function disclosure.record_unsent(bigint, text) from public;
revoke execute on function disclosure.record_success(bigint, timestamptz) from public;
revoke execute on function disclosure.record_failure(bigint, timestamptz) from public;
