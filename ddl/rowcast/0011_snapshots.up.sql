-- How the rows of a topic are found in a watched table, and the function that reads them; triggers/rowcast.sql writes it.
alter table rowcast.watched
    add column rows text,
    add column snapshot_name name,  -- null until the table is watched again, and once it is unwatched
    add column snapshot_definition text;

-- The function of triggers/rowcast.sql that one with a further parameter has taken the place of.
-- squawk-ignore ban-drop-function
drop function if exists rowcast.watch(regclass, text, text [], text [], name, text, text, text, boolean, text);
