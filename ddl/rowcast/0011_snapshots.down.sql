do $$
declare
    snapshot name;
begin
    for snapshot in select w.snapshot_name from rowcast.watched as w where w.snapshot_name is not null loop
        execute format('drop function if exists rowcast.%I(text, bigint)', snapshot);
    end loop;
end
$$;
drop function if exists rowcast.watch(regclass, text, text [], text [], name, text, text, text, boolean, text, text);
alter table rowcast.watched drop column rows, drop column snapshot_name, drop column snapshot_definition;
