-- The rules of a secret's life hold for every write of the tables, not only for the functions that a job calls. New
-- constraints apply to new rows; the next revision checks existing ones.

create or replace function disclosure.keep_secret() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A check-in of the future would put the disclosure off for as long. Clocks may differ by minutes.
    if new.last_check_in > clock_timestamp() + interval '5 minutes' and isfinite(new.last_check_in)
       and (tg_op = 'INSERT' or new.last_check_in is distinct from old.last_check_in)
    then
        raise check_violation using
            message = 'a check-in cannot lie in the future',
            schema = tg_table_schema, table = tg_table_name, constraint = 'secrets_last_check_in_has_been';
    end if;
    -- A day is 24 hours, regardless of daylight saving time.
    new.next_check_in := new.last_check_in + new.check_in_days * interval '24 hours';
    if tg_op = 'UPDATE' then
        -- A failure that was counted ends the attempt.
        if new.retry_count > old.retry_count then
            new.processing_started_at := null;
            if new.last_retry_at is not distinct from old.last_retry_at then
                new.last_retry_at := clock_timestamp();
            end if;
        end if;
        -- The owner checked in, so a job that works on the secret must not continue. A failed secret waits again.
        if new.last_check_in > old.last_check_in and old.status = 'failed' and new.status = 'failed' then
            new.status := 'active';
        end if;
        if new.next_check_in > old.next_check_in then
            new.processing_started_at := null;
        end if;
        -- The count starts again at a check-in, and when somebody takes the secret out of `failed`.
        if new.last_check_in > old.last_check_in or (old.status = 'failed' and new.status <> 'failed') then
            new.retry_count := 0;
            new.last_retry_at := null;
        end if;
    end if;
    -- The sixth failure is final.
    if new.retry_count > 5 then
        new.status := 'failed';
    end if;
    if new.status <> 'active' then
        new.processing_started_at := null;
    end if;
    return new;
end
$$;

-- An entry that says that a recipient was told stays so, or the recipient would be told again. `sent_at` is set exactly
-- while the status is `sent`.
create function disclosure.keep_disclosure() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'UPDATE' then
        if old.status = 'sent'
           and (new.status, new.secret_id, new.recipient_email)
               is distinct from (old.status, old.secret_id, old.recipient_email)
        then
            raise exception 'disclosure % was sent, which cannot be undone', old.id using errcode = 'restrict_violation';
        end if;
        new.sent_at := coalesce(new.sent_at, old.sent_at);
    end if;
    new.sent_at := case when new.status = 'sent' then coalesce(new.sent_at, clock_timestamp()) end;
    return new;
end
$$;

create trigger disclosure_log_keep
before insert or update on disclosure.disclosure_log
for each row execute function disclosure.keep_disclosure();

revoke execute on function disclosure.keep_disclosure() from public;

-- The characters in these lists are blanks, control characters, and others that nobody sees. An address has none of
-- them, and a name or a title has something else.
alter table disclosure.users
add constraint users_name_visible check (
    name = '' or name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table disclosure.secrets
add constraint secrets_title_visible check (
    title = '' or title ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint secrets_sixth_failure_is_final check (retry_count <= 5 or status = 'failed') not valid,
add constraint secrets_only_active_are_claimed check (processing_started_at is null or status = 'active') not valid;

alter table disclosure.recipients
add constraint recipients_email_well_formed check (
    email !~ '[\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table disclosure.disclosure_log
add constraint disclosure_log_recipient_email_is_address check (
    recipient_email = '' or recipient_email ~ '^[^@]+@[^@]+$'
) not valid,
add constraint disclosure_log_recipient_email_well_formed check (
    recipient_email !~ '[\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint disclosure_log_sent_at_fits_status check ((status = 'sent') = (sent_at is not null)) not valid;
