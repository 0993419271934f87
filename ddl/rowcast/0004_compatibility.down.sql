-- An extension that is kept for Rowcast itself is dropped, or forgotten if something still uses it.
select rowcast.drop_extensions('rowcast');
delete from rowcast.extensions as x where x.wanted_by = 'rowcast';

-- Withdraws a pack's requests, and drops the extensions that Rowcast created and no other pack asked for.
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
        if gone.created and not exists (select from rowcast.extensions as x where x.name = gone.name) then
            begin
                execute format('drop extension if exists %I', gone.name);
            exception when dependent_objects_still_exist then
                raise warning 'extension % stays: something else uses it', gone.name;
            end;
        end if;
    end loop;
end
$$;

drop table rowcast.compatibility;
