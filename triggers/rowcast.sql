-- Capture: rowcast.watch() writes one small static trigger function per table.
-- `daemon --apply-ddl` runs this file every time, after Rowcast's own revisions. It is idempotent.

-- Does this transaction have to notify the daemon? While the leader sleeps, it holds this lock exclusively, so every
-- writer notifies. While it polls, each writer shares the lock until its transaction ends, and does not notify. That
-- matters because a transaction that executed NOTIFY holds a lock of the whole cluster during the flush of its commit,
-- so no two of them can share a flush. daemon/log/wakeup_lock.py is the other side.
-- A session that prepares transactions for two-phase commit must do neither. It runs `set rowcast.ring = off`, and the
-- daemon's safety poll finds its events.
create or replace function rowcast.must_ring() returns boolean
language sql volatile
as $$
    select coalesce(pg_catalog.current_setting('rowcast.ring', true), 'on') operator(pg_catalog.<>) 'off'
       and not pg_catalog.pg_try_advisory_xact_lock_shared(23203506649396085)
$$;

-- Notifies the daemon. The payload is empty on purpose: notifications can be folded, forged or missed, so they carry no
-- data.
create or replace function rowcast.ring() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if rowcast.must_ring() then
        perform pg_notify('rowcast', '');
    end if;
end
$$;

-- A select list with the columns of the row `alias`.
create or replace function rowcast.columns_of(alias text, columns name []) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select string_agg(format('%s.%I', alias, c), ', ' order by n) from unnest(columns) with ordinality as u (c, n)
$$;

-- The same as one JSON expression, `{"id":...}`.
create or replace function rowcast.json_of(alias text, columns name []) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('(select row_to_json(x) from (select %s) as x)', rowcast.columns_of(alias, columns))
$$;

-- The condition that the row `alias` is not soft-deleted.
create or replace function rowcast.live_of(alias text, soft_delete name) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when soft_delete is null then 'true' else format('%s.%I is null', alias, soft_delete) end
$$;

-- The rights that end when it is unknown which rows are gone: `{}`, every right of the pack, if rows of this table give
-- rights.
create or replace function rowcast.every_right(watched rowcast.watched) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when watched.revokes is null then 'null::jsonb' else $q$'{}'::jsonb$q$ end
$$;

-- The body of a capture function. `topics` is an array expression over the row `r`; `each_topic` returns the same topics
-- as rows. `old_rows` and `new_rows` are the relations to read the rows from. A single format() inserts all names, so
-- that no name is parsed as part of the template.
create or replace function rowcast.capture_body(
    watched rowcast.watched, relation regclass, topics text, each_topic text, old_rows text, new_rows text
) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    same_key text;
    changed text;
    rights text := 'select null::jsonb as old, null::jsonb as new, false as changed';
begin
    select string_agg(format('o.%1$I = n.%1$I', c), ' and ') into same_key from unnest(watched.key) as k (c);
    -- Types that may lack an equality operator in pg_catalog are compared as text.
    select string_agg(format(
               case when t.typnamespace <> 'pg_catalog'::regnamespace or t.typname in ('json', 'xml', 'point', 'polygon')
                    then 'case when o.%1$I::text is distinct from n.%1$I::text then %2$L end'
                    else 'case when o.%1$I is distinct from n.%1$I then %2$L end' end, c, c), ', ' order by n)
      into changed
      from unnest(watched.columns) with ordinality as u (c, n)
      join pg_attribute as a on a.attrelid = relation and a.attname = u.c
      join pg_type as t on t.oid = a.atttypid;

    if watched.revokes is not null then
        rights := format($rights$
            select b.old, b.new, b.old is distinct from b.new as changed
            from (select case when live.old then (select (%1$s) from (select o.*) as r) end as old,
                         case when live.new then (select (%1$s) from (select n.*) as r) end as new) as b$rights$,
            watched.revokes);
    end if;

    return format($body$
    if tg_op = 'INSERT' then
        insert into rowcast.events (watch, topic, kind, key, record, actor, grants)
        select %1$s, t.topic, 'insert', row_to_json(k), row_to_json(x), nullif(current_setting('rowcast.actor', true), ''), g.gives
        from %5$s as r cross join lateral (select %8$s) as g (gives) cross join lateral %21$s as t (topic)
        cross join lateral (select %9$s) as k cross join lateral (select %12$s) as x
        where t.topic is not null and %14$s;
    elsif tg_op = 'UPDATE' then
        insert into rowcast.events (watch, topic, kind, key, record, changed, actor, grants, revokes)
        select %1$s, e.topic, e.kind, e.key, e.record, e.changed, nullif(current_setting('rowcast.actor', true), ''),
               case when rights.changed and e.step = 2 then rights.new end, case when rights.changed then rights.old end
        from %4$s as o full join %5$s as n on %6$s
        cross join lateral (select (%17$s) and %15$s as old, (%18$s) and %16$s as new) as live
        cross join lateral (select
            case when live.old then (select %2$s from (select o.*) as r) else '{}' end as old,
            case when live.new then (select %2$s from (select n.*) as r) else '{}' end as new) as topics
        cross join lateral (%19$s) as rights
        cross join lateral (
            select 1 as step, t.topic, (case when live.new then 'leave' else 'delete' end)::rowcast.kind as kind,
                   %10$s as key, null::json as record, null::name[] as changed
            from unnest(topics.old) as t (topic) where t.topic <> all (topics.new)
            union all
            select 2, t.topic, (case when t.topic = any (topics.old) then 'update'
                                     when live.old or not %17$s then 'insert' else 'restore' end)::rowcast.kind,
                   %11$s, %13$s, case when t.topic = any (topics.old) then c.changed end
            from unnest(topics.new) as t (topic)
            cross join lateral (select array_remove(array[%7$s]::name[], null) as changed) as c
            where not t.topic = any (topics.old) or c.changed <> '{}' or rights.changed
        ) as e
        order by e.step;
    elsif tg_op = 'DELETE' then
        insert into rowcast.events (watch, topic, kind, key, actor, revokes)
        select %1$s, t.topic, 'delete', row_to_json(k), nullif(current_setting('rowcast.actor', true), ''), g.gives
        from %4$s as r cross join lateral (select %8$s) as g (gives) cross join lateral %21$s as t (topic)
        cross join lateral (select %9$s) as k
        where t.topic is not null and %14$s;
    else
        insert into rowcast.events (watch, topic, kind, key, revokes) values (%1$s, %3$s, 'truncate', '{}', %20$s);
    end if;
    if found and rowcast.must_ring() then
        perform pg_notify('rowcast', '');
    end if;$body$,
        watched.id,                                          --  1
        topics,                                              --  2  of the row r
        quote_literal('*' || watched.pack),                  --  3  the topic for changes that concern the whole pack
        old_rows,                                            --  4
        new_rows,                                            --  5
        same_key,                                            --  6  of o and n
        changed,                                             --  7  the names of the columns in which o and n differ
        coalesce('(' || watched.revokes || ')', 'null::jsonb'),  --  8  of the row r
        rowcast.columns_of('r', watched.key),                --  9
        rowcast.json_of('o', watched.key),                   -- 10
        rowcast.json_of('n', watched.key),                   -- 11
        rowcast.columns_of('r', watched.columns),            -- 12
        rowcast.json_of('n', watched.columns),               -- 13
        rowcast.live_of('r', watched.soft_delete),           -- 14
        rowcast.live_of('o', watched.soft_delete),           -- 15
        rowcast.live_of('n', watched.soft_delete),           -- 16
        format('o.%I is not null', watched.key[1]),          -- 17  is there an o, or only an n?
        format('n.%I is not null', watched.key[1]),          -- 18
        rights,                                              -- 19  the rights that the row gives before and after
        rowcast.every_right(watched),                        -- 20
        each_topic                                           -- 21
    );
end
$$;

-- The relation and all its partitions, if it has any. A statement trigger fires for the table that the statement names,
-- which can be any of them.
create or replace function rowcast.with_partitions(relation regclass) returns setof regclass
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select relation union select p.relid from pg_partition_tree(relation) as p
$$;

-- The capture triggers that a relation and its partitions should have, and whether each exists as it should.
create or replace function rowcast.capture_triggers(relation regclass, per_row boolean, function_name name)
returns table (target regclass, trigger_name name, operation text, stands boolean)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select target, w.name, w.operation, exists (
        select from pg_trigger as t
        join pg_proc as p on p.oid = t.tgfoid
        where t.tgrelid = target and t.tgname = w.name and p.proname = function_name
          and p.pronamespace = 'rowcast'::regnamespace
          and t.tgenabled = case when per_row then 'A' else 'O' end
    )
    from rowcast.with_partitions(relation) as target
    cross join (values ('rowcast_insert'::name, 'insert'), ('rowcast_update', 'update'),
                       ('rowcast_delete', 'delete'), ('rowcast_truncate', 'truncate')) as w (name, operation)
    -- Postgres clones the row triggers of a partitioned table to its partitions.
    where not per_row or operation = 'truncate' or target = relation
$$;

-- Captures a table: every committed change of a row becomes one event in each of its topics.
--   relation     the table; the partitions of a partitioned table are captured as that table
--   topic        SQL expression over the row `r`, of type text or text[]; null: the row is not published
--   columns      the published columns; a column added to the table later is not published until it is listed here
--   key          not null and unique; published with every event
--   soft_delete  a column that is not null once the row counts as deleted
--   revokes      SQL expression over `r`, jsonb {"user": ..., "topic": ...}: the right that begins and ends with the row.
--                Without "user" it is every user's; without "topic" it is to every topic of the pack. Only rows with a
--                topic begin and end rights
--   model        the pack's row model that validates the row (default: the table's name)
--   per_row      row triggers, enabled always: for tables fed by logical replication, which fires no others
--   on_error     strict: a statement that cannot be captured fails; lenient: the failure is recorded in rowcast.lost,
--                and subscribers of the pack get a reset
-- Does nothing, and takes no lock, if the table is already captured this way. Returns what it did.
create or replace function rowcast.watch(
    relation regclass, topic text, columns text [], key text [] default '{id}', soft_delete name default null,
    revokes text default null, pack text default null, model text default null,
    per_row boolean default false, on_error text default 'strict'
) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    w rowcast.watched;
    known rowcast.watched;
    topics text;
    each_topic text;
    type_ text;
    missing text;
    body text;
    definition text;
    owner_exists constant boolean := exists (select from pg_roles where rolname = 'rowcast_capture');
    trigger_ record;
begin
    select n.nspname, c.relname into w.schema_name, w.table_name
    from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = relation and c.relkind in ('r', 'p') and c.relpersistence <> 't';
    if w.table_name is null or w.schema_name in ('rowcast', 'pg_catalog', 'information_schema') then
        raise exception 'rowcast: % cannot be watched: it is not an ordinary or partitioned table', relation
            using errcode = 'wrong_object_type';
    end if;
    if on_error not in ('strict', 'lenient') then
        raise exception 'rowcast: on_error is strict or lenient, not %', on_error using errcode = 'invalid_parameter_value';
    end if;
    if cardinality(columns) = 0 or cardinality(key) = 0 then
        raise exception 'rowcast: % needs at least one column and a key', relation using errcode = 'invalid_parameter_value';
    end if;
    select string_agg(quote_ident(c), ', ') into missing
    from unnest(columns || key || soft_delete::text) as u (c)
    where c is not null and not exists (
        select from pg_attribute as a where a.attrelid = relation and a.attname = c and a.attnum > 0 and not a.attisdropped
    );
    if missing is not null then
        raise exception 'rowcast: % has no column %', relation, missing using errcode = 'undefined_column';
    end if;
    if not exists (
        select from pg_index as i
        where i.indrelid = relation and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
          and (select array_agg(a.attname::text order by a.attname::text) from pg_attribute as a
               where a.attrelid = relation and a.attnum = any (i.indkey[0:i.indnkeyatts - 1]))
              <@ watch.key
    ) or exists (
        select from pg_attribute as a
        where a.attrelid = relation and a.attname = any (watch.key) and not a.attnotnull
    ) then
        raise exception 'rowcast: (%) is no key of %: it must be unique and not null', array_to_string(key, ', '), relation
            using errcode = 'invalid_parameter_value';
    end if;

    -- Both expressions are tried here, on no row, so that a mistake fails here and not in an application's insert.
    execute format('select pg_typeof(%s) from (values (1)) as one left join %s as r on false', topic, relation) into type_;
    topics := case
        when type_ in ('text', 'character varying', 'unknown', 'name') then format('array_remove(array[(%s)::text], null)', topic)
        when type_ in ('text[]', 'character varying[]') then
            format('array(select distinct x::text from unnest(%s) as u (x) where x is not null order by 1)', topic)
    end;
    if topics is null then
        raise exception 'rowcast: a topic is text or text[], this expression gives %', type_ using errcode = 'datatype_mismatch';
    end if;
    -- A single topic needs no array, unless its expression has a subquery, which should run only once.
    each_topic := case when type_ like '%[]' or topic ~* '\mselect\M' then format('unnest(%s)', topics)
                       else format('(select (%s)::text)', topic) end;
    if revokes is not null then
        execute format('select pg_typeof(%s) from (values (1)) as one left join %s as r on false', revokes, relation) into type_;
        if type_ <> 'jsonb' then
            raise exception 'rowcast: revokes is jsonb, this expression gives %', type_ using errcode = 'datatype_mismatch';
        end if;
    end if;

    w.pack := coalesce(pack, w.schema_name);
    w.model := coalesce(model, w.table_name);
    w.topic := topic;
    w.columns := columns;
    w.key := key;
    w.soft_delete := soft_delete;
    w.revokes := revokes;
    w.per_row := per_row;
    w.on_error := on_error;

    select k.* into known from rowcast.watched as k where (k.schema_name, k.table_name) = (w.schema_name, w.table_name);
    w.id := coalesce(known.id, nextval(pg_get_serial_sequence('rowcast.watched', 'id')));
    w.function_name := left(format('capture_%s_%s', w.id, regexp_replace(lower(w.table_name), '[^a-z0-9_]', '', 'g')), 63);
    -- `offset 0` keeps the planner from folding the single row into the full join, which it could not perform then.
    body := rowcast.capture_body(w, relation, topics, each_topic,
        case when per_row then '(select old.* offset 0)' else 'old_rows' end,
        case when per_row then '(select new.* offset 0)' else 'new_rows' end);
    if on_error = 'lenient' then
        body := format($lenient$
    begin%s
    exception when others then
        insert into rowcast.lost (watch, operation, sqlstate, reason) values (%s, tg_op, sqlstate, sqlerrm);
        insert into rowcast.events (watch, topic, kind, key, revokes) values (%s, %L, 'lost', '{}', %s);
        perform rowcast.ring();
    end;$lenient$, body, w.id, w.id, '*' || w.pack, rowcast.every_right(w));
    end if;
    definition := format(
        E'create or replace function rowcast.%I() returns trigger\nlanguage plpgsql security definer\n'
        'set search_path = pg_catalog, pg_temp\nset timezone = ''UTC''\nas $capture$\nbegin%s\n    return null;\nend\n$capture$',
        w.function_name, body);
    w.definition := md5(definition);

    if known.definition = w.definition and known.function_name is not null
       and (known.model, known.pack) = (w.model, w.pack)
       and not exists (select from rowcast.capture_triggers(relation, per_row, w.function_name) as c where not c.stands)
    then
        return format('%s is watched already', relation);
    end if;

    perform rowcast.unwatch(relation);
    execute definition;
    execute format('revoke all on function rowcast.%I() from public', w.function_name);
    if owner_exists and pg_has_role(current_user, 'rowcast_capture', 'MEMBER') then
        -- To become a function's owner, a role needs the right to create in its schema.
        grant create on schema rowcast to rowcast_capture;
        execute format('alter function rowcast.%I() owner to rowcast_capture', w.function_name);
        revoke create on schema rowcast from rowcast_capture;
    end if;

    for trigger_ in select * from rowcast.capture_triggers(relation, per_row, w.function_name) loop
        execute format('create trigger %I after %s on %s %s for each %s execute function rowcast.%I()',
            trigger_.trigger_name, trigger_.operation, trigger_.target,
            case when per_row then '' else case trigger_.operation
                when 'insert' then 'referencing new table as new_rows'
                when 'update' then 'referencing old table as old_rows new table as new_rows'
                when 'delete' then 'referencing old table as old_rows'
                else '' end end,
            case when per_row and trigger_.operation <> 'truncate' then 'row' else 'statement' end,
            w.function_name);
        if per_row then
            execute format('alter table %s enable always trigger %I', trigger_.target, trigger_.trigger_name);
        end if;
    end loop;

    insert into rowcast.watched (id, schema_name, table_name, pack, model, topic, columns, key, soft_delete, revokes,
                                 per_row, on_error, function_name, definition)
    overriding system value
    values (w.id, w.schema_name, w.table_name, w.pack, w.model, w.topic, w.columns, w.key, w.soft_delete, w.revokes,
            w.per_row, w.on_error, w.function_name, w.definition)
    on conflict (schema_name, table_name) do update set
        pack = excluded.pack, model = excluded.model, topic = excluded.topic, columns = excluded.columns,
        key = excluded.key, soft_delete = excluded.soft_delete, revokes = excluded.revokes, per_row = excluded.per_row,
        on_error = excluded.on_error, function_name = excluded.function_name, definition = excluded.definition;
    return format('%s is watched now', relation);
end
$$;

-- Stops capturing a table. Its events stay in the log.
create or replace function rowcast.unwatch(relation regclass) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    known rowcast.watched;
    found_ record;
begin
    select w.* into known from rowcast.watched as w
    join pg_class as c on c.relname = w.table_name and c.relnamespace = to_regnamespace(quote_ident(w.schema_name))
    where c.oid = relation and w.function_name is not null;
    if known.id is null then
        return format('%s was not watched', relation);
    end if;
    for found_ in
        select t.tgrelid::regclass as target, t.tgname from pg_trigger as t
        join pg_proc as p on p.oid = t.tgfoid and p.pronamespace = 'rowcast'::regnamespace
        where p.proname = known.function_name and t.tgparentid = 0
    loop
        execute format('drop trigger %I on %s', found_.tgname, found_.target);
    end loop;
    execute format('drop function if exists rowcast.%I()', known.function_name);
    update rowcast.watched as w set function_name = null where w.id = known.id;
    return format('%s is no longer watched', relation);
end
$$;

-- Drops the capture functions of tables that were dropped. Their triggers were dropped with the tables.
create or replace function rowcast.unwatch_dropped() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    gone rowcast.watched;
begin
    for gone in
        select w.* from rowcast.watched as w
        where w.function_name is not null and to_regclass(format('%I.%I', w.schema_name, w.table_name)) is null
    loop
        execute format('drop function if exists rowcast.%I()', gone.function_name);
        update rowcast.watched as w set function_name = null where w.id = gone.id;
    end loop;
end
$$;

revoke all on all functions in schema rowcast from public;
grant execute on function rowcast.ulid() to public;
do $$
begin
    grant execute on function rowcast.ring(), rowcast.must_ring() to rowcast_capture;
exception when undefined_object then
    null;  -- the role could not be created; a warning was raised then
end
$$;
