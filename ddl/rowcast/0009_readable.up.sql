-- Whether the daemon can read an event: an error if its text has no equivalent in UTF-8. A function, so that a look for new
-- events does not set up what it needs for this in a database that is UTF8.
create function rowcast.is_readable(xid xid8, id bigint) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select convert_to(concat_ws('', e.topic, e.key, e.record, e.actor, e.grants, e.revokes), 'UTF8') is not null
    from rowcast.events as e where e.xid = is_readable.xid and e.id = is_readable.id
$$;
revoke all on function rowcast.is_readable(xid8, bigint) from public;

-- Functions of triggers/rowcast.sql that others have taken the place of.
-- squawk-ignore ban-drop-function
drop function if exists rowcast.capture_settings();
-- squawk-ignore ban-drop-function
drop function if exists rowcast.definition_of(text);
-- squawk-ignore ban-drop-function
drop function if exists rowcast.over_of(jsonb, text, name [], name []);
