-- Restores the previous tables. Deleted duplicates do not come back, and a failed secret stays failed.

-- Capture must not name columns that are dropped. It continues with the others, so that subscribers miss nothing.
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
