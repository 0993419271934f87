-- Has a row, until a crash of Postgres empties this table with all other unlogged ones.
create unlogged table rowcast.since_crash (
    started_at timestamptz primary key default clock_timestamp()
);
insert into rowcast.since_crash default values;

-- Resets the packs whose unlogged tables a crash has emptied. Returns these tables.
create function rowcast.reset_emptied() returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from rowcast.since_crash) then
        return;
    end if;
    return query
        with emptied as (
            insert into rowcast.events (watch, topic, kind, key, revokes)
            select w.id, '*' || w.pack, 'truncate', '{}', case when w.revokes is not null then '{}'::jsonb end
            from rowcast.watched as w
            where w.function_name is not null and exists (
                select from rowcast.with_partitions(to_regclass(format('%I.%I', w.schema_name, w.table_name))) as r (relation)
                join pg_class as c on c.oid = r.relation where c.relpersistence = 'u'
            )
            returning watch
        )
        select format('%I.%I', w.schema_name, w.table_name) from emptied as e join rowcast.watched as w on w.id = e.watch;
    insert into rowcast.since_crash default values;
end
$$;

revoke all on rowcast.since_crash from public;
revoke all on function rowcast.reset_emptied() from public;
