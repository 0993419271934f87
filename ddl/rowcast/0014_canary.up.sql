-- One row, which each daemon whose canary is on writes now and then, with a mark of its own, and waits for.
create table rowcast.canary (
    id integer primary key constraint canary_is_one_row check (id = 1),
    mark text not null
);
revoke all on rowcast.canary from public;

-- Captures it as rowcast.watch() captures other tables, but in a topic of Rowcast's own, which no client may follow.
-- The table counts as watched from its first row on, and as one that nobody watches any more: a daemon that writes no
-- canary has nothing to check.
create function rowcast.capture_canary() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    watch_ integer;
begin
    insert into rowcast.watched (schema_name, table_name, pack, model, topic, columns, key, per_row, on_error, definition)
    values ('rowcast', 'canary', 'rowcast', 'canary', '', '{id, mark}', '{id}', true, 'strict', '')
    on conflict do nothing;
    select w.id into strict watch_ from rowcast.watched as w where w.schema_name = 'rowcast' and w.table_name = 'canary';
    insert into rowcast.events (watch, topic, kind, key, record)
    values (watch_, 'rowcast:canary', 'update', '{"id":1}', json_build_object('id', new.id, 'mark', new.mark));
    perform rowcast.ring();
    return null;
end
$$;
revoke execute on function rowcast.capture_canary() from public;

create trigger capture_canary after insert or update on rowcast.canary
for each row execute function rowcast.capture_canary();
