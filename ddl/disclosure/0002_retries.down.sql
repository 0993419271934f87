-- Back to the tables as they were. Duplicates that were deleted stay deleted, and a secret that failed stays failed.

-- Capture must not name columns that go. It goes on with those that stay: whoever follows misses nothing meanwhile.
select rowcast.watch(
    to_regclass('disclosure.secrets'), pack => w.pack, topic => w.topic,
    columns => array_remove(array_remove(w.columns, 'retry_count'), 'last_retry_at')::text [],
    key => w.key::text [], soft_delete => w.soft_delete, revokes => w.revokes, model => w.model,
    per_row => w.per_row, on_error => w.on_error
)
from rowcast.watched as w
where w.schema_name = split_part('disclosure.secrets', '.', 1) and w.table_name = 'secrets'
  and w.function_name is not null;

create index disclosure_log_secret_id on disclosure.disclosure_log (secret_id);
drop index disclosure.idx_disclosure_log_batch_fetch;
drop index disclosure.idx_disclosure_log_unique;
alter table disclosure.secrets drop column last_retry_at, drop column retry_count;
