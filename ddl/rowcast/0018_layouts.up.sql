-- How the rows of a watched table are read, as it is known: by which columns and types, and from which files. What differs
-- from it was altered, of which no trigger tells. Its owner's functions alone read and write it.
create table rowcast.layouts (
    watch integer primary key,
    layout jsonb not null
);
revoke all on rowcast.layouts from public;

-- A trigger that was disabled and enabled again has another version.
alter table rowcast.capturing add column version xid;
