-- The usual trigger for notifications: NOTIFY with the row as payload.
create function chatgenius.relay() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pg_notify('relay', row_to_json(new)::text);
    return null;
end
$$;

create trigger relay after insert on chatgenius.messages
for each row execute function chatgenius.relay();
