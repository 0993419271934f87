-- Failed attempts are counted, and nobody is told twice.

-- Nobody writes to the log between the clearing and the index, or a duplicate could slip in. Reading
-- goes on until the index at the end goes.
lock table disclosure.disclosure_log in share row exclusive mode;

-- A constant default is not written into the rows that are there; they are read once, for the check.
alter table disclosure.secrets
add column retry_count integer not null default 0
constraint secrets_retry_count_not_negative check (retry_count >= 0),
add column last_retry_at timestamptz;

-- Of what was sent to one recipient more than once, the newest entry stays.
delete from disclosure.disclosure_log as l
using (
    select d.id, row_number() over (
        partition by d.secret_id, d.recipient_email order by d.created_at desc, d.id desc
    ) as place
    from disclosure.disclosure_log as d
    where d.status = 'sent'
) as sent
where l.id = sent.id and sent.place > 1;

-- Built in this transaction and not concurrently, which is what makes the clearing above hold. A log of disclosures is
-- small: it grows by one row for each attempt to tell one recipient.
-- squawk-ignore require-concurrent-index-creation
create unique index idx_disclosure_log_unique on disclosure.disclosure_log (secret_id, recipient_email)
where status = 'sent';

-- squawk-ignore require-concurrent-index-creation
create index idx_disclosure_log_batch_fetch on disclosure.disclosure_log (
    secret_id, recipient_email, status, created_at
);

-- The index above begins with the same column, and serves the foreign key as well.
-- squawk-ignore require-concurrent-index-deletion
drop index disclosure.disclosure_log_secret_id;
