alter table disclosure.disclosure_log
drop constraint disclosure_log_sent_at_fits_status,
drop constraint disclosure_log_recipient_email_well_formed,
drop constraint disclosure_log_recipient_email_is_address;
alter table disclosure.recipients drop constraint recipients_email_well_formed;
alter table disclosure.secrets
drop constraint secrets_only_active_are_claimed,
drop constraint secrets_sixth_failure_is_final,
drop constraint secrets_title_visible;
alter table disclosure.users drop constraint users_name_visible;
drop trigger disclosure_log_keep on disclosure.disclosure_log;
drop function disclosure.keep_disclosure();

create or replace function disclosure.keep_secret() returns trigger
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
