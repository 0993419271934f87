-- Revisions that daemons of an earlier version can work with. `daemon --apply-ddl` writes what a revision's file says, and
-- a daemon that finds a revision it does not know looks here.
create table rowcast.compatibility (
    schema_name name not null,
    revision text not null,
    compatible_with text not null,  -- the newest revision that the oldest of these daemons knows
    primary key (schema_name, revision)
);

-- Withdraws a pack's requests, and drops the extensions that Rowcast created and no other pack asked for. One that
-- something else uses stays, as a request of Rowcast itself: the next pack that asks for it and leaves drops it.
create or replace function rowcast.drop_extensions(wanted_by name) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    gone record;
begin
    for gone in
        delete from rowcast.extensions as x where x.wanted_by = drop_extensions.wanted_by
        returning x.name, x.created
    loop
        if gone.created and not exists (
            select from rowcast.extensions as x where x.name = gone.name and x.wanted_by <> 'rowcast'
        ) then
            begin
                execute format('drop extension if exists %I', gone.name);
                delete from rowcast.extensions as x where x.name = gone.name;
            exception when dependent_objects_still_exist then
                raise warning 'extension % stays: something else uses it', gone.name;
                insert into rowcast.extensions (name, wanted_by, created) values (gone.name, 'rowcast', true)
                on conflict do nothing;
            end;
        end if;
    end loop;
end
$$;
