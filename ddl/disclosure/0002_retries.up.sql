-- Counts failed attempts, and ensures that no recipient is told twice.

-- Blocks writes to the log until the unique index exists, or a duplicate could slip in after the delete. Reads wait
-- only for the drop index at the end.
lock table disclosure.disclosure_log in share row exclusive mode;

-- A constant default does not rewrite existing rows; the check scans them once.
alter table disclosure.secrets
add column retry_count integer not null default 0
constraint secrets_retry_count_not_negative check (retry_count >= 0),
add column last_retry_at timestamptz;

-- Of several sent entries for one recipient, the newest stays.
delete from disclosure.disclosure_log as l
using (
    select d.id, row_number() over (
        partition by d.secret_id, d.recipient_email order by d.created_at desc, d.id desc
    ) as place
    from disclosure.disclosure_log as d
    where d.status = 'sent'
) as sent
where l.id = sent.id and sent.place > 1;

-- Not concurrently: building it in this transaction is what keeps the log free of new duplicates. The log is small; it
-- grows by one row for each attempt to tell one recipient.
-- squawk-ignore require-concurrent-index-creation
create unique index idx_disclosure_log_unique on disclosure.disclosure_log (secret_id, recipient_email)
where status = 'sent';

-- squawk-ignore require-concurrent-index-creation
create index idx_disclosure_log_batch_fetch on disclosure.disclosure_log (
    secret_id, recipient_email, status, created_at
);

-- The index above starts with the same column and serves the foreign key too.
-- squawk-ignore require-concurrent-index-deletion
drop index disclosure.disclosure_log_secret_id;
