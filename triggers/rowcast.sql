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

-- Has this transaction captured something? Capture functions cannot read events themselves.
create or replace function rowcast.has_captured() returns boolean
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from rowcast.events as e where e.xid = pg_current_xact_id())
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

-- The settings that a value's text, or the meaning of an expression, depends on, as pg_proc.proconfig shows them. Every
-- capture function runs with these, whatever is set in the writer's session; with the first two if it is `simple`, since
-- each costs every statement a microsecond or two. With row security off, a query that it would filter fails instead.
create or replace function rowcast.capture_settings(simple boolean) returns text []
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select array['TimeZone=UTC', 'search_path=pg_catalog, pg_temp'] || case when simple then '{}' else array[
        'DateStyle=iso, ymd', 'IntervalStyle=postgres', 'extra_float_digits=1', 'bytea_output=hex', 'lc_monetary=C',
        'lc_numeric=C', 'lc_time=C', 'quote_all_identifiers=off', 'array_nulls=on', 'xmloption=content',
        'transform_null_equals=off', 'standard_conforming_strings=on', 'row_security=off'
    ] end
$$;

-- What capture has to know of a table's columns, as JSON by name. It is looked up once for a table.
--   text_form    the type is not built in: a string made by its output function. format() calls that alone, where a cast
--                would call whatever the owner of the type has defined
--   array_form   the same for each element of an array
--   same         values that are equal also read the same, so = and "is distinct from" can compare them
--   simple       as JSON it depends on no setting but TimeZone; so does its text, unless it is_time, a date or a time
--   searchable   = finds the value in an index, wherever the type comes from
--   short        its text is never longer than some hundred bytes
--   size         an expression for the bytes of %1$s; null for what is never large
-- Only superusers can change how the types of Postgres itself behave; 16384 is the first oid of any other object.
create or replace function rowcast.captured_columns(relation regclass) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive column_ as (
        select a.attname as name, a.attcollation, greatest(a.atttypmod, t.typtypmod) as modifier, t.typtype = 'd' as is_domain,
               t.oid as type_, t.typtype, t.typbasetype
        from pg_attribute as a join pg_type as t on t.oid = a.atttypid
        where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
        union all
        select c.name, c.attcollation, greatest(c.modifier, t.typtypmod), true, t.oid, t.typtype, t.typbasetype
        from column_ as c join pg_type as t on c.typtype = 'd' and t.oid = c.typbasetype
    ), fact as (
        select c.name, c.is_domain, t.oid, t.typtype, t.typlen, t.typelem,
               case when t.typcategory = 'A' and t.typlen = -1 then t.typelem else 0 end as array_element,
               t.oid < 16384 and t.typelem < 16384 as is_builtin,
               exists (select from pg_type as e where e.oid = t.typelem and e.typarray = t.oid
                       and e.oid >= 16384 and e.typdelim = ',') as array_form,
               coalesce((select l.collisdeterministic from pg_collation as l where l.oid = c.attcollation), true) as is_plain,
               case when t.oid in ('varchar'::regtype, 'bpchar'::regtype) and c.modifier > 4 then c.modifier - 4 end as most
        from column_ as c join pg_type as t on t.oid = c.type_
        where c.typtype <> 'd'
    )
    select jsonb_object_agg(f.name, jsonb_build_object(
        'text_form', not f.is_builtin and not f.array_form,
        'array_form', f.array_form,
        'simple', (case when f.array_element <> 0 then f.array_element else f.oid end) in ('bool'::regtype, 'int2'::regtype,
            'int4'::regtype, 'int8'::regtype, 'oid'::regtype, 'numeric'::regtype, 'uuid'::regtype, 'text'::regtype,
            'varchar'::regtype, 'bpchar'::regtype, 'name'::regtype, 'date'::regtype, 'timestamp'::regtype,
            'timestamptz'::regtype, 'json'::regtype, 'jsonb'::regtype, 'inet'::regtype, 'cidr'::regtype),
        'is_time', (case when f.array_element <> 0 then f.array_element else f.oid end)
            in ('date'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype),
        'same', f.typtype = 'e' and not f.is_domain or f.oid in ('bool'::regtype, 'int2'::regtype, 'int4'::regtype,
            'int8'::regtype, 'oid'::regtype, 'uuid'::regtype, 'date'::regtype, 'time'::regtype, 'timestamp'::regtype,
            'timestamptz'::regtype, 'bytea'::regtype, '"char"'::regtype, 'macaddr'::regtype, 'pg_lsn'::regtype)
            or f.oid in ('text'::regtype, 'varchar'::regtype, 'name'::regtype) and f.is_plain,
        -- The operators of enumerations, ranges and arrays take no domain over these.
        'searchable', (f.is_builtin or f.typtype = 'e') and not (f.is_domain and (f.typtype <> 'b' or f.typelem <> 0)),
        'short', f.typlen > 0 or f.oid in ('inet'::regtype, 'cidr'::regtype) or f.most <= 100,
        'size', case
            when f.typlen > 0 or f.oid in ('numeric'::regtype, 'inet'::regtype, 'cidr'::regtype) or f.most <= 10000 then null
            when f.oid in ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'bytea'::regtype)
            then 'coalesce(octet_length(%1$s), 0)'
            -- A value that is stored elsewhere may be a hundred times as large: in a row it is unpacked.
            else 'pg_column_size(row(%1$s))' end))
    from fact as f
$$;

-- A select list with columns of the row `alias` as they are published. `facts` are those of rowcast.captured_columns.
create or replace function rowcast.published(facts jsonb, alias text, columns name []) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    -- The text as the output function writes it; null for null. Composite values with nothing but nulls are not null.
    text_of constant text := $q$case when %1$s.%2$I is distinct from null then format('%%s', %1$s.%2$I) end$q$;
begin
    return (
        select string_agg(format(
            case when (facts -> u.name ->> 'array_form')::boolean then '(' || text_of || ')::text[] as %2$I'
                 when (facts -> u.name ->> 'text_form')::boolean then text_of || ' as %2$I'
                 else '%1$s.%2$I' end, alias, u.name), ', ' order by u.n)
        from unnest(columns) with ordinality as u (name, n)
    );
end
$$;

-- The condition that the rows `a` and `b` have the same key, which is: a key that reads the same. An index can answer it
-- if `a` is a table.
create or replace function rowcast.same_key(facts jsonb, key name [], a text, b text) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (
        select string_agg(concat_ws(' and ',
            case when (facts -> u.name ->> 'searchable')::boolean then format('%1$s.%3$I = %2$s.%3$I', a, b, u.name) end,
            case when not (facts -> u.name ->> 'same')::boolean
                 then format($q$format('%%s', %1$s.%3$I) collate "C" = format('%%s', %2$s.%3$I) collate "C"$q$, a, b, u.name) end),
            ' and ')
        from unnest(key) as u (name)
    );
end
$$;

-- The condition that the row `alias` is not soft-deleted.
create or replace function rowcast.live_of(alias text, soft_delete name) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when soft_delete is null then 'true' else format('%s.%I is null', alias, soft_delete) end
$$;

-- The bytes of the columns of the row `alias` that may be large; null if there are none.
create or replace function rowcast.size_of(facts jsonb, alias text, columns name []) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (
        select case when count(*) > 2 then '0::bigint + ' else '' end  -- the sum of two is an integer: no value has 2^30
            || string_agg(format(facts -> u.name ->> 'size', format('%s.%I', alias, u.name)), ' + ')
        from unnest(columns) as u (name) where facts -> u.name ->> 'size' is not null
    );
end
$$;

-- The condition that the key `k` is too long to tell; null if it cannot be. What is too large becomes a `limit`, which
-- resets the topic.
create or replace function rowcast.long_key(facts jsonb, key name []) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (select 'pg_column_size(k.key) > 1000' from unnest(key) as u (name)
            having not bool_and((facts -> u.name ->> 'short')::boolean));
end
$$;

-- The record of a row whose published columns are the relation `x`: null if the row `alias` is too large to tell, or its key
-- `k` too long. Nothing of a row that is too large is converted: only its size is looked up.
create or replace function rowcast.record_of(facts jsonb, alias text, columns name [], key name []) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    over constant text := nullif(concat_ws(' or ', rowcast.size_of(facts, alias, columns) || ' > 16777216',
                                           rowcast.long_key(facts, key)), '');
    record constant text := 'row_to_json(x.*)';
begin
    return coalesce('case when not (' || over || ') then ' || record || ' end', record);
end
$$;

-- The relation `v` with the record of the row `alias`, only if `condition`. `offset 0`: it is made once, however often it is
-- used.
create or replace function rowcast.record_row(
    facts jsonb, alias text, columns name [], key name [], condition text default 'true'
) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('(select %s as record from (select %s) as x where %s offset 0) as v',
        rowcast.record_of(facts, alias, columns, key), rowcast.published(facts, alias, columns), condition)
$$;

-- The bytes of the record `v`, which its stored form, if that is compressed, does not show.
create or replace function rowcast.bytes_of(facts jsonb, columns name []) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return case when rowcast.size_of(facts, 'r', columns) is null then 'null' else 'pg_column_size(v.record)' end;
end
$$;

-- The relation `k` with the key of the row `alias` as JSON. `offset 0`: it is made once, however often it is used.
create or replace function rowcast.key_of(facts jsonb, alias text, key name []) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return format('(select row_to_json(x.*) as key from (select %s) as x%s) as k', rowcast.published(facts, alias, key),
                  case when rowcast.long_key(facts, key) is not null then ' offset 0' end);
end
$$;

-- A right without what makes it too large. A user or a topic of more than 250 characters cannot exist.
create or replace function rowcast.short_right(gives jsonb) returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when not (length(gives ->> 'user') > 250 or length(gives ->> 'topic') > 250)
                     or gives ->> 'user' is null and gives ->> 'topic' is null
                then jsonb_strip_nulls(jsonb_build_object('user', gives -> 'user', 'topic', gives -> 'topic')) end
$$;

-- The rights that end when it is unknown which rows are gone: `{}`, every right of the pack, if rows of this table give
-- rights.
create or replace function rowcast.every_right(watched rowcast.watched) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when watched.revokes is null then 'null::jsonb' else $q$'{}'::jsonb$q$ end
$$;

-- The statement that captures inserted rows, which are those of the relation `r`. `offset 0` keeps the expressions of `v` from
-- being repeated where they are used: each function in a statement costs its writer a part of a microsecond, whenever
-- it is executed.
create or replace function rowcast.insert_body(
    watched rowcast.watched, facts jsonb, each_topic text, rights text, source text
) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format($body$
            insert into rowcast.events (watch, topic, kind, key, record, bytes, actor, grants)
            select %1$s, %2$s, %3$s, %4$s, v.record, %5$s, left(nullif(current_setting('rowcast.actor', true), ''), 250), v.gives
            from (
                select t.topic, k.key, %6$s as record, g.gives
                from %7$s cross join lateral (select %8$s from (select r.*) as r) as g (gives)
                cross join lateral (select %9$s from (select r.*) as r) as t (topic)
                cross join lateral %10$s cross join lateral (select %11$s) as x
                where %12$s offset 0
            ) as v%13$s
            where v.topic is not null;$body$,
        watched.id,
        case when s.several then 't.topic' else 'v.topic' end,
        case when s.may_be_null then $q$case when v.record is null then 'limit'::rowcast.kind else 'insert'::rowcast.kind end$q$
             else $q$'insert'$q$ end,
        case when s.may_be_null then $q$case when v.record is null then '{}'::json else v.key end$q$ else 'v.key' end,
        rowcast.bytes_of(facts, watched.columns),
        s.record, source, rights,
        case when s.several then substr(each_topic, length('unnest') + 1) else each_topic end,  -- the array in parentheses
        rowcast.key_of(facts, 'r', watched.key),
        rowcast.published(facts, 'r', watched.columns),
        rowcast.live_of('r', watched.soft_delete),
        case when s.several then ' cross join lateral unnest(v.topic) as t (topic)' else '' end)
    from (select r.record, r.record like 'case %' as may_be_null, each_topic like 'unnest(%' as several
          from (select rowcast.record_of(facts, 'r', watched.columns, watched.key) as record) as r) as s
$$;

-- The statement that captures what became of rows: the relation `pairs` joins each old version `o` with the new one `n`.
-- One of them may be missing. `version` has the topics of both, and the names of the columns that read differently. What left
-- a topic is told before what came into one: of the topics `t`, numbered, those of the old version come first.
create or replace function rowcast.update_body(
    watched rowcast.watched, facts jsonb, topics text, rights text, pairs text
) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format($body$
            insert into rowcast.events (watch, topic, kind, key, record, bytes, changed, actor, grants, revokes)
            select %1$s, t.topic,
                   case when t.n <= cardinality(version.old)
                        then case%9$s when live.new then 'leave'::rowcast.kind else 'delete'::rowcast.kind end
                        when v.record is null then 'limit'::rowcast.kind
                        when %17$s then 'update'::rowcast.kind
                        when live.old or not (%3$s) then 'insert'::rowcast.kind else 'restore'::rowcast.kind end,
                   case when t.n > cardinality(version.old) and v.record is null then '{}'::json else %10$s end,
                   v.record, %12$s,
                   case when t.n > cardinality(version.old) and %17$s then version.changed end,
                   left(nullif(current_setting('rowcast.actor', true), ''), 250),
                   %16$s
            from %2$s
            cross join lateral (select (%3$s) and %5$s as old, (%4$s) and %6$s as new) as live
            cross join lateral (select
                case when live.old then (select %7$s from (select o.*) as r) else '{}' end as old,
                case when live.new then (select %7$s from (select n.*) as r) else '{}' end as new,
                array_remove(array[%14$s], null) as changed offset 0) as version%19$s
            cross join lateral (%8$s) as rights
            cross join lateral unnest(version.old || version.new) with ordinality as t (topic, n)
            cross join lateral (select %11$s) as e cross join lateral %13$s left join lateral %15$s on true
            where case when t.n <= cardinality(version.old) then not %18$s
                       else not %17$s or version.changed <> '{}' or rights.changed end
            order by t.n > cardinality(version.old);$body$,
        watched.id,                                                         --  1
        pairs,                                                              --  2
        format('o.%I is distinct from null', watched.key[1]),               --  3  is there an o, or only an n?
        format('n.%I is distinct from null', watched.key[1]),               --  4
        rowcast.live_of('o', watched.soft_delete),                          --  5
        rowcast.live_of('n', watched.soft_delete),                          --  6
        topics,                                                             --  7  of the row r
        case when watched.revokes is null then 'select null::jsonb as old, null::jsonb as new, false as changed'
             else format($q$select b.old, b.new, b.old is distinct from b.new as changed
                from (select case when live.old then (select %1$s from (select o.*) as r) end as old,
                             case when live.new then (select %1$s from (select n.*) as r) end as new) as b$q$, rights) end,  -- 8
        ' when ' || s.long_key || $q$ then 'limit'::rowcast.kind$q$,        --  9
        coalesce('case when ' || s.long_key || $q$ then '{}'::json else k.key end$q$, 'k.key'),  -- 10
        (select string_agg(format('case when o.%1$I is distinct from null then o.%2$I else n.%2$I end as %2$I', watched.key[1], u.name),
                           ', ') from unnest(watched.key) as u (name)),     -- 11  the key
        rowcast.bytes_of(facts, watched.columns),                           -- 12
        rowcast.key_of(facts, 'e', watched.key),                            -- 13
        s.changed,                                                          -- 14
        rowcast.record_row(facts, 'n', watched.columns, watched.key, 't.n > cardinality(version.old)'),  -- 15
        case when watched.revokes is null then 'null::jsonb, null::jsonb' else 'case when rights.changed and '
            't.n > cardinality(version.old) then rights.new end, case when rights.changed then rights.old end' end,  -- 16
        format(s.is_in, 'old'),                                             -- 17
        format(s.is_in, 'new'),                                             -- 18
        case when s.may_be_many then $q$
            cross join lateral (select
                case when cardinality(version.old) > 100 then jsonb_object(version.old, version.old) end as old,
                case when cardinality(version.new) > 100 then jsonb_object(version.new, version.new) end as new
                offset 0) as sets$q$ end)                                   -- 19
    from (select rowcast.long_key(facts, watched.key) as long_key,
                 -- Two values with the same binary image read the same, whatever their type and collation.
                 (select string_agg(format(
                      case when (facts -> u.name ->> 'same')::boolean
                           then 'case when o.%1$I is distinct from n.%1$I then %2$L::name end'
                           else 'case when record_image_ne(row(o.%1$I), row(n.%1$I)) then %2$L::name end' end, u.name, u.name),
                      ', ' order by u.n)
                  from unnest(watched.columns) with ordinality as u (name, n)) as changed,
                 m.may_be_many,
                 -- Looking each of many topics up in an array would take the square of their number.
                 case when m.may_be_many
                      then '(case when sets.%1$s is null then t.topic = any (version.%1$s) else sets.%1$s ? t.topic end)'
                      else 't.topic = any (version.%1$s)' end as is_in
          from (select topics not like 'array_remove(array[%' as may_be_many) as m) as s
$$;

-- The statement that captures deleted rows, which are those of the relation `r`.
create or replace function rowcast.delete_body(
    watched rowcast.watched, facts jsonb, each_topic text, rights text, source text
) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format($body$
            insert into rowcast.events (watch, topic, kind, key, actor, revokes)
            select %1$s, t.topic, %2$s, %3$s, left(nullif(current_setting('rowcast.actor', true), ''), 250), g.gives
            from %4$s cross join lateral (select %5$s from (select r.*) as r) as g (gives)
            cross join lateral (select %6$s from (select r.*) as r) as t (topic)
            cross join lateral %7$s
            where t.topic is not null and %8$s;$body$,
        watched.id,
        coalesce('case when ' || s.long_key || $q$ then 'limit'::rowcast.kind else 'delete'::rowcast.kind end$q$, $q$'delete'$q$),
        coalesce('case when ' || s.long_key || $q$ then '{}'::json else k.key end$q$, 'k.key'),
        source, rights, each_topic,
        rowcast.key_of(facts, 'r', watched.key),
        rowcast.live_of('r', watched.soft_delete))
    from (select rowcast.long_key(facts, watched.key) as long_key) as s
$$;

-- Are these columns unique at every moment? False if they may repeat until the statement or the transaction ends, because
-- the constraint is deferrable. Null if they are not unique.
create or replace function rowcast.unique_at_once(relation regclass, key text []) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select bool_or(i.indimmediate) from pg_index as i
    where i.indrelid = relation and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
      and (select array_agg(a.attname::text order by a.attname::text) from pg_attribute as a
           where a.attrelid = relation and a.attnum = any (i.indkey[0:i.indnkeyatts - 1]))
          <@ key
$$;

-- The foreign keys whose actions can update a row of the relation that their own statement has updated. A rule may add such
-- an update to the action on any table.
create or replace function rowcast.doubtful_foreign_keys(relation regclass) returns setof oid
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select f.oid from pg_constraint as f
    where f.contype = 'f' and (
        f.conrelid = relation and (f.confupdtype in ('c', 'n', 'd') or f.confdeltype in ('n', 'd'))
        or (f.confupdtype in ('c', 'n', 'd') or f.confdeltype in ('c', 'n', 'd'))
        and exists (select from pg_rewrite as r where r.ev_class = f.conrelid)
    )
$$;

-- The body of a capture function. `topics` is an array expression over the row `r`; `each_topic` gives its elements as
-- rows: `unnest(...)` or, if there is only one, its expression; `used` are the columns that anything of it needs. A single
-- format() inserts all names, so that no name is parsed as part of the template. Names of columns never collide with these:
-- they are always qualified, and so is a whole row (`k.*`). An expression sees no other relation than `r`, so it may name
-- columns without it.
--
-- A statement's triggers run after those of the statements that they themselves, or functions in the statement, execute.
-- So the first capture in a command of the client tells what its statement wrote. Each further one in the same command
-- may tell of rows that have changed since: it reads them again, and tells what they are now. `rowcast.captured` is the
-- time of the command that was captured last in this session, as bytes, which no setting changes; it is not local to the
-- transaction, which would cost more and tell the same. It is empty after a `reset all`, be it between
-- transactions, as connection pools do, or in a trigger: then an earlier capture of the transaction counts.
-- Referential actions add to the old and new rows of the statement that caused them. If one can update a row that the
-- statement itself has updated, there may be two versions of it among these rows; then they are read again, too. So are
-- they always if the key is deferrable: two rows may have it for a while. And in a MERGE into a partitioned table, Postgres 15
-- may show a row that is updated as the one that was inserted before it: rows without their other version are read again.
--
-- A row that MERGE moves to another partition is in neither transition table of its UPDATE (PostgreSQL 15 to 18): then a reset
-- is told. A row trigger adds up the hashes of the keys of rows that may move, in a setting for each depth of triggers, since
-- these may move rows, too. If the UPDATE has them all, the sum is that of its old rows whose key is gone, as every key has the
-- columns by which the table is partitioned; or, if rows take each other's keys, that of all its old rows.
create or replace function rowcast.capture_body(
    watched rowcast.watched, relation regclass, topics text, each_topic text, used name []
) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    facts constant jsonb := rowcast.captured_columns(relation);
    name constant text := format('%I.%I', watched.schema_name, watched.table_name);
    -- `offset 0` keeps the planner from folding the single row into the full join, which it could not perform then. Without the
    -- table's oid in it, a session would keep the statement as it was before a column got another type or name.
    old_rows constant text := case when watched.per_row
        then format('(select old.* where %L::regclass is not null offset 0)', relation::oid) else 'old_rows' end;
    new_rows constant text := case when watched.per_row
        then format('(select new.* where %L::regclass is not null offset 0)', relation::oid) else 'new_rows' end;
    same_key constant text := rowcast.same_key(facts, watched.key, 'o', 'n');
    rights constant text := coalesce('(select case when pg_column_size(v.gives) > 1000 then rowcast.short_right(v.gives) '
        'else v.gives end from (select (' || watched.revokes || ') as gives offset 0) as v)', 'null::jsonb');
    columns constant text := (select string_agg(format('c.%I', u.name), ', ') from unnest(used) as u (name));
    -- Each expression of a function costs its first use in a transaction a microsecond, and so does each function in it.
    again text := $q$starts_with(command, current_setting('rowcast.captured', true))$q$;
    current_row text;
    readable text;  -- whether the rows can be read again
    doubts text;
    repeats text;  -- those that say there are two versions of a row
    update_again text;
    is_partitioned constant boolean := not watched.per_row and exists (
        select from pg_partitioned_table as p where p.partrelid = relation);
    moved constant text := format($q$'rowcast.moved_%s_' || pg_trigger_depth()$q$, watched.id);
    hash_of_old constant text := (
        select format($q$hashtextextended(format('%s', %s), 0)$q$, string_agg('%L', ' '), string_agg(format('old.%I', u.name), ', '))
        from unnest(watched.key) as u (name));
    update_first text := rowcast.update_body(watched, facts, topics, rights,
                                             format('%s as o full join %s as n on %s', old_rows, new_rows, same_key));
    delete_first constant text := rowcast.delete_body(watched, facts, each_topic, rights, old_rows || ' as r');
begin
    -- The table may have been renamed, and another may have its name.
    readable := case when (select c.relkind = 'r' and not c.relispartition from pg_class as c where c.oid = relation)
        then format('tg_table_name = %L and tg_table_schema = %L and not row_security_active(tg_relid) and %s',
                    watched.table_name, watched.schema_name,
                    (select string_agg(format($q$has_column_privilege(tg_relid, %L, 'select')$q$, u.name), ' and ') from unnest(used) as u (name)))
        else format('coalesce((
            select (t.oid = tg_relid or t.oid in (select a.relid from pg_partition_ancestors(tg_relid) as a))
               and not row_security_active(t.oid) and bool_and(has_column_privilege(t.oid, u.name, ''select''))
            from (select to_regclass(%L)) as t (oid) cross join unnest(%L::name[]) as u (name)
            group by t.oid
        ), false)', name, used) end;
    current_row := '(select ' || columns || ' from ' || name || ' as c where '
        || rowcast.same_key(facts, watched.key, 'c', 'b') || ' offset 0)';
    if not rowcast.unique_at_once(relation, watched.key::text []) then
        again := 'true';
    elsif not watched.per_row then
        select string_agg(d.doubt, ' or '), string_agg(d.doubt, ' or ') filter (where d.repeats) into doubts, repeats from (
            select format('exists (select from %s as v group by %s having count(*) > 1)', v.name,
                          string_agg(format($q$format('%%s', v.%I) collate "C"$q$, u.name), ', ')) as doubt,
                   true as repeats
            from (values ('old_rows'), ('new_rows')) as v (name) cross join unnest(watched.key) as u (name)
            where exists (select from rowcast.doubtful_foreign_keys(relation))
            group by v.name
            union all
            select format('exists (select from old_rows as o full join new_rows as n on %s '
                          'where not (o.%2$I is distinct from null and n.%2$I is distinct from null))', same_key, watched.key[1]),
                   false
            from pg_class as c where c.oid = relation and c.relkind = 'p'
        ) as d;
        if doubts is not null then
            update_first := E'\n        again := ' || doubts || E';\n        if not again then' || update_first || E'\n        end if;';
        end if;
    end if;
    update_again := rowcast.update_body(watched, facts, topics, rights, format(
        '%s as o full join %s as m on %s cross join lateral (select %s) as b left join lateral %s as n on true',
        old_rows, new_rows, rowcast.same_key(facts, watched.key, 'o', 'm'),
        (select string_agg(format('case when o.%1$I is distinct from null then o.%2$I else m.%2$I end as %2$I',
                                  watched.key[1], u.name), ', ')
         from unnest(watched.key) as u (name)), current_row));
    if repeats is not null then
        -- An old version may be one that nobody has been told of: then the row is told although it reads the same.
        update_again := E'\n        if ' || repeats || ' then'
            || replace(update_again, $q$or version.changed <> '{}'$q$, 'or true') || E'\n        else' || update_again
            || E'\n        end if;';
    end if;
    return format($body$
#variable_conflict use_column
declare
    command constant text := encode(timestamptz_send(statement_timestamp()), 'hex');
    again boolean := %9$s;%16$s%14$s
    loop
    if tg_op = 'INSERT' and again is not true then%6$s
    elsif tg_op = 'UPDATE' and again is not true then%10$s
    elsif tg_op = 'DELETE' and again is not true then%12$s
    elsif tg_op = 'TRUNCATE' then
        insert into rowcast.events (watch, topic, kind, key, revokes) values (%1$s, %2$s, 'truncate', '{}', %3$s);
        again := false;
    else%21$s
        again := true;
    end if;
    exit;
    end loop;
    if again then
        if tg_op = 'DELETE' then
            again := exists (select from %19$s as r);  -- most actions of foreign keys find no row
        else
            again := exists (select from %7$s as r);  -- an upsert fires two triggers, and may leave one without rows
        end if;
        if not again then
            null;
        elsif not (%18$s) then
            insert into rowcast.events (watch, topic, kind, key, revokes) values (%1$s, %2$s, 'lost', '{}', %3$s);
        elsif tg_op = 'INSERT' then%8$s
        elsif tg_op = 'UPDATE' then%11$s
        elsif exists (select from %19$s as b cross join lateral %20$s as r) then%13$s
        else%12$s
        end if;
    end if;%17$s
    if found and set_config('rowcast.captured', command, false) is not null
       and rowcast.must_ring()
    then
        perform pg_notify('rowcast', '');
    end if;%15$s
    return null;
end
$body$,
        watched.id,                                                                                 --  1
        quote_literal('*' || watched.pack),             --  2  the topic for changes that concern the whole pack
        rowcast.every_right(watched),                                                               --  3
        name,                                                                                       --  4
        used,                                                                                       --  5
        rowcast.insert_body(watched, facts, each_topic, rights, new_rows || ' as r'),            --  6
        new_rows,                                                                                   --  7
        rowcast.insert_body(watched, facts, each_topic, rights,
                            format('(select r.* from %s as b cross join lateral %s as r) as r', new_rows, current_row)),  --  8
        again,                                                                                      --  9
        update_first,                                                                               -- 10
        update_again,                                                                               -- 11
        delete_first,                                                                               -- 12
        rowcast.update_body(watched, facts, topics, rights,
                            format('%s as o cross join lateral (select o.*) as b left join lateral %s as n on true',
                                   old_rows, current_row)),                                         -- 13
        case watched.on_error when 'lenient' then E'\n    begin' end,                               -- 14
        case watched.on_error when 'lenient' then format($lenient$
    exception when others then
        insert into rowcast.lost (watch, operation, sqlstate, reason) values (%1$s, tg_op, sqlstate, sqlerrm);
        insert into rowcast.events (watch, topic, kind, key, revokes) values (%1$s, %2$L, 'lost', '{}', %3$s);
        perform rowcast.ring();
    end;$lenient$, watched.id, '*' || watched.pack, rowcast.every_right(watched)) end,               -- 15
        case when is_partitioned then format($row$
    moved text;
begin
    if tg_level = 'ROW' then
        moved := set_config(%1$s, (coalesce(nullif(current_setting(%1$s, true), ''), '0')::numeric + %2$s)::text, true);
        return new;
    end if;
    if tg_table_name <> %3$L or tg_table_schema <> %4$L then
        if (select t.oid <> tg_relid and t.oid not in (select a.relid from pg_partition_ancestors(tg_relid) as a)
            from (select to_regclass(%5$L)) as t (oid))
        then
            return null;  -- it was detached: its rows are none of the table any more
        end if;
    end if;$row$, moved, hash_of_old, watched.table_name, watched.schema_name, name) else E'\nbegin' end,  -- 16
        case when is_partitioned then format($moved$
    if tg_op = 'UPDATE' then
        moved := current_setting(%1$s, true);
        if moved <> '' and set_config(%1$s, '', true) is not null then
            if moved::numeric is distinct from (select sum(%2$s) from old_rows as old) then
                if moved::numeric is distinct from (
                    select sum(%2$s) from old_rows as old where not exists (select from new_rows as n where %3$s)
                ) then
                    insert into rowcast.events (watch, topic, kind, key, revokes) values (%4$s, %5$L, 'lost', '{}', %6$s);
                end if;
            end if;
        end if;
    end if;$moved$, moved, hash_of_old, rowcast.same_key(facts, watched.key, 'old', 'n'),
            watched.id, '*' || watched.pack, rowcast.every_right(watched)) end,                      -- 17
        readable,                                                                                   -- 18
        old_rows,                                                                                   -- 19
        current_row,                                                                                -- 20
        case when again <> 'true' then $q$
        if current_setting('rowcast.captured', true) = '' then
            again := rowcast.has_captured();
            continue when not again;
        end if;$q$ end                                                                                   -- 21
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
          and t.tgtype = w.bit + case when per_row and operation <> 'truncate' then 1 else 0 end
          and (t.tgqual is null) = (operation <> 'move') and t.tgattr::text = ''
          and coalesce(t.tgoldtable, '') = case when operation in ('update', 'delete') and not per_row then 'old_rows' else '' end
          and coalesce(t.tgnewtable, '') = case when operation in ('insert', 'update') and not per_row then 'new_rows' else '' end
    ) and not exists (
        select from pg_trigger as t join pg_trigger as clone on clone.tgparentid = t.oid
        where t.tgrelid = target and t.tgname = w.name and clone.tgenabled <> t.tgenabled
    )
    from rowcast.with_partitions(relation) as target
    -- The row trigger before updates fires after all others that are named in ASCII: they may move the row, too.
    cross join (values ('rowcast_insert'::name, 'insert', 4), ('rowcast_update', 'update', 16),
                       ('rowcast_delete', 'delete', 8), ('rowcast_truncate', 'truncate', 32),
                       ('~rowcast_move', 'move', 1 + 2 + 16)) as w (name, operation, bit)
    -- Postgres clones the row triggers of a partitioned table to its partitions.
    where case when operation = 'move'
               then not per_row and target = relation and exists (select from pg_partitioned_table as p where p.partrelid = relation)
               else not per_row or operation = 'truncate' or target = relation end
$$;

-- The condition of a row trigger that an update changes a column by which the table or one of its partitions is partitioned.
-- It names no other column, since Postgres lets nobody change the type of a column that a trigger names.
create or replace function rowcast.may_move(relation regclass) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select string_agg(distinct format(
        case when (rowcast.captured_columns(relation) -> a.attname::text ->> 'same')::boolean
             then 'old.%1$I is distinct from new.%1$I'
             else 'record_image_ne(row(old.%1$I), row(new.%1$I))' end, a.attname), ' or ')
    from rowcast.with_partitions(relation) as t (relid)
    join pg_partitioned_table as p on p.partrelid = t.relid
    join pg_attribute as a on a.attrelid = p.partrelid and a.attnum = any (p.partattrs)
$$;

-- Can the capture functions have the role rowcast_capture for their owner? Since PostgreSQL 16 a member of a role may not
-- always become it: whoever makes a role is such a member.
create or replace function rowcast.has_capture_role() returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_roles as r
        where r.rolname = 'rowcast_capture' and pg_has_role(current_user, r.oid,
            case when current_setting('server_version_num')::integer < 160000 then 'member' else 'set' end))
$$;

-- What rowcast.watched.definition holds of a function's body, to tell when it was changed.
create or replace function rowcast.definition_of(body text, settings text []) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select md5(body || settings::text)  -- as the catalog has them: prosrc and proconfig
$$;

-- Whether a function that watch() made, which captures or reads a table, is still as it was made.
create or replace function rowcast.function_stands(function_name name, volatility "char", definition text) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_proc as p
        where p.pronamespace = 'rowcast'::regnamespace and p.proname = function_name
          and p.prosecdef and p.provolatile = volatility
          and rowcast.definition_of(p.prosrc, p.proconfig) = definition
          and (not rowcast.has_capture_role() or p.proowner = to_regrole('rowcast_capture'))
    )
$$;

-- Lets the capture role read these columns: what it tells it may also read. See rowcast.capture_body.
create or replace function rowcast.let_capture_read(relation regclass, columns name []) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    schema_name constant name := (select n.nspname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
                                  where c.oid = relation);
    missing text;
begin
    if not rowcast.has_capture_role() then
        return;
    end if;
    if not has_schema_privilege('rowcast_capture', schema_name, 'usage') then
        execute format('grant usage on schema %I to rowcast_capture', schema_name);
    end if;
    select string_agg(quote_ident(u.c), ', ') into missing from unnest(columns) as u (c)
    where not has_column_privilege('rowcast_capture', relation, u.c, 'select');
    if missing is not null then
        execute format('grant select (%s) on %s to rowcast_capture', missing, relation);
    end if;
end
$$;

-- The type of an expression over the row `r`, which has these columns. Tried as the role that will evaluate it, and on no
-- row: a mistake or a missing right fails here, and not in an application's insert.
create or replace function rowcast.type_of(relation regclass, columns name [], expression text) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    caller constant text := current_user;
    type_ text;
begin
    if rowcast.has_capture_role() then
        perform set_config('role', 'rowcast_capture', true);
    end if;
    execute format('select pg_typeof(%s) from (values (1)) as one left join (select %s from %s) as r on false', expression,
                   (select string_agg(quote_ident(u.c), ', ') from unnest(columns) as u (c)), relation) into type_;
    perform set_config('role', caller, true);
    return type_;
exception when insufficient_privilege then
    raise exception 'rowcast: %: grant that right to the role rowcast_capture, which evaluates the expression', sqlerrm
        using errcode = 'insufficient_privilege';
end
$$;

-- The columns of a table that capturing it needs: these, and all that a text mentions. Rather too many than too few.
create or replace function rowcast.used_columns(relation regclass, needed text [], expressions text) returns name []
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select array_agg(a.attname order by a.attnum) from pg_attribute as a
    where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
      and (a.attname::text = any (needed)
           or case when a.attname ~ '^[a-zA-Z_][a-zA-Z0-9_]*$' then expressions ~* ('\m' || a.attname || '\M') else true end
           or expressions ~* '\mr\M(?!\s*\.\s*[^*\s])' or expressions ~* 'u&"')
$$;

-- Whether no setting but TimeZone can change what these columns and expressions give: the types are built in and not written
-- as a setting says, and the expressions only put texts and columns together, dates and times not among them.
create or replace function rowcast.is_simple(relation regclass, columns name [], expressions text) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select bool_and((facts -> u.name ->> 'simple')::boolean
                    and not ((facts -> u.name ->> 'is_time')::boolean and u.name = any (f.mentioned)))
       and expressions ~* $q$\A(\s|r\.[a-z_][a-z0-9_]*|'[^'\\]*'|\|\||array\[|\]|,|jsonb_build_object\(|\))*\Z$q$
    from unnest(columns) as u (name) cross join (
        select rowcast.captured_columns(relation) as facts,
               coalesce(rowcast.used_columns(relation, '{}', expressions), '{}') as mentioned offset 0
    ) as f
$$;

-- The captured tables whose columns and keys have changed since they were watched, so that their capture functions do not
-- suit them. Compared are the parts of a function that depend on them, not all of its text: another version of this file
-- may write it otherwise, and a narrower type is told as before. Runs with the rights of its owner, since whoever checks
-- may not call the functions that these parts are made with.
create or replace function rowcast.outdated_captures() returns table (name text, problem text, place text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    with capture as (
        select w.*, c.oid::regclass as relation, p.prosrc as body, p.proconfig as settings, p.proowner as reader,
               rowcast.captured_columns(c.oid) as facts, concat_ws(' ', w.topic, w.revokes) as expressions
        from rowcast.watched as w
        join pg_class as c on c.relname = w.table_name and c.relnamespace = to_regnamespace(quote_ident(w.schema_name))
        join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = w.function_name and p.pronargs = 0
        where rowcast.definition_of(p.prosrc, p.proconfig) = w.definition  -- else it was altered
    ), changed as (
        select c.id, u.column_name from capture as c
        cross join unnest(c.columns || c.key) with ordinality as u (column_name, n)
        cross join lateral (select c.facts -> u.column_name::text as fact) as f
        cross join lateral (select rowcast.published(c.facts, 'r', array[u.column_name]) as item) as p
        where f.fact is not null and (
            not exists (
                select from unnest('{"(select ",", "}'::text []) as before_ cross join unnest('{") as x",", "}'::text []) as after_
                where strpos(c.body, before_ || p.item || after_) > 0
            )
            or u.n <= cardinality(c.columns) and not (f.fact ->> 'same')::boolean
            and strpos(c.body, format('record_image_ne(row(o.%1$I), row(n.%1$I))', u.column_name)) = 0
            or u.n <= cardinality(c.columns)
            and strpos(c.body, format(f.fact ->> 'size', format('r.%I', u.column_name))) = 0
            or u.n > cardinality(c.columns) and strpos(c.body, rowcast.same_key(c.facts, c.key, 'o', 'n')) = 0
        )
        union
        select c.id, u.column_name from capture as c
        cross join unnest(rowcast.used_columns(c.relation, c.columns::text [] || c.key::text [], c.expressions)) as u (column_name)
        where not c.settings @> rowcast.capture_settings(false)
          and not rowcast.is_simple(c.relation, array[u.column_name], c.expressions)
    )
    select format('%I.%I', c.schema_name, c.table_name), 'column_changed', string_agg(quote_ident(d.column_name), ', ' order by a.attnum)
    from capture as c join changed as d on d.id = c.id
    join pg_attribute as a on a.attrelid = c.relation and a.attname = d.column_name
    group by c.id, c.schema_name, c.table_name
    union all
    -- Whoever drops a column and adds it again takes the right to read it, too.
    select format('%I.%I', c.schema_name, c.table_name), 'column_unreadable', string_agg(quote_ident(u.column_name), ', ')
    from capture as c
    cross join unnest(rowcast.used_columns(c.relation, c.columns::text [] || c.key::text [] || c.soft_delete::text,
                                           concat_ws(' ', c.expressions, to_jsonb(c) ->> 'rows'))) as u (column_name)
    where not (has_column_privilege(c.reader, c.relation, u.column_name, 'select')
               and has_schema_privilege(c.reader, c.schema_name, 'usage'))
    group by c.id, c.schema_name, c.table_name
    union all
    select format('%I.%I', c.schema_name, c.table_name), 'key_changed', (select string_agg(quote_ident(k), ', ') from unnest(c.key) as k)
    from capture as c
    where case when rowcast.unique_at_once(c.relation, c.key::text []) is not false
               then not c.per_row and strpos(c.body, 'having count(*) > 1') = 0
                    and exists (select from rowcast.doubtful_foreign_keys(c.relation))
               else strpos(c.body, $q$current_setting('rowcast.captured', true)$q$) > 0 end
$$;

-- Fails for tables some of whose changes would not fire the triggers on them.
create or replace function rowcast.check_inheritance(relation regclass, per_row boolean) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    other regclass;
begin
    select i.inhrelid into other from pg_inherits as i join pg_class as c on c.oid = i.inhrelid
    where i.inhparent = relation and not c.relispartition limit 1;
    if other is not null then
        raise exception 'rowcast: % cannot be watched: % inherits from it, and writes to that fire no trigger here; '
            'watch the tables that inherit, with per_row => true', relation, other using errcode = 'wrong_object_type';
    end if;
    select i.inhparent into other from pg_inherits as i where i.inhrelid = relation limit 1;
    if other is not null and not per_row then
        if (select c.relispartition from pg_class as c where c.oid = relation) then
            raise exception 'rowcast: % cannot be watched: writes to % fire no statement trigger of its partitions; watch %',
                relation, other, other using errcode = 'wrong_object_type';
        end if;
        raise exception 'rowcast: % cannot be watched: it inherits from %, and writes to that fire no statement trigger '
            'here; use per_row => true', relation, other using errcode = 'wrong_object_type';
    end if;
end
$$;

-- The body of a snapshot function: the rows of the topic $1 that are not soft-deleted, as their capture would tell them.
-- Those with the $2 greatest keys, in the order of their keys. `rows` is a condition over `r` and `topic` which an index can
-- answer. Whatever it is, only live rows in the topic are told: that is asked outside. `offset 0`: the planner might walk the
-- whole index of the key otherwise. A record is null if the row is too large to tell. rowcast.filtered_rows puts a condition
-- where the comments stand.
create or replace function rowcast.snapshot_body(
    watched rowcast.watched, relation regclass, topics text, used name []
) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format($body$
    select k.key::text, v.record::text
    from (
        select s.* from (
            select r.* from (select %1$s from %2$I.%3$I as c) as r/*topic*/ where %5$s/*filter*/%4$s offset 0
        ) as s
        where %11$s and $1 collate "C" = any ((select %6$s from (select s.*) as r)::text [])
        order by %7$s limit $2
    ) as r
    cross join lateral %8$s cross join lateral %9$s
    order by %10$s
$body$,
        (select string_agg(format('c.%I', u.name), ', ') from unnest(used) as u (name)),            --  1
        watched.schema_name, watched.table_name,                                                    --  2, 3
        ' and (' || watched.rows || ')',                                                            --  4
        rowcast.live_of('r', watched.soft_delete),                                                  --  5
        topics,                                                                                     --  6
        (select string_agg(format('s.%I desc', u.name), ', ') from unnest(watched.key) as u (name)),  --  7
        rowcast.key_of(facts, 'r', watched.key),                                                    --  8
        rowcast.record_row(facts, 'r', watched.columns, watched.key),                               --  9
        (select string_agg(format('r.%I', u.name), ', ') from unnest(watched.key) as u (name)),     -- 10
        rowcast.live_of('s', watched.soft_delete))                                                  -- 11
    from (select rowcast.captured_columns(relation) as facts) as f
$$;

-- Lets everybody call a function who may serve; see rowcast.let_serve().
create or replace function rowcast.let_daemons_call(function text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    daemon regrole;
begin
    for daemon in select d.daemon from rowcast.daemons() as d (daemon) loop
        execute format('grant execute on function %s to %s', function, daemon);
    end loop;
end
$$;

-- Makes the snapshot function of a watched table. It runs as the role that captures, which may read what it tells, and with
-- the same settings; the daemon's role may do nothing but call it. It is tried once, on no row: a mistake fails here.
create or replace function rowcast.make_snapshot(watched rowcast.watched, body text, settings text []) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
set standard_conforming_strings = on
as $$
begin
    execute format('create or replace function rowcast.%I(topic text, most bigint) returns table (key text, record text) '
                   'language sql stable security definer %s as %L',
                   watched.snapshot_name, rowcast.settings_clause(settings), body);
    execute format('revoke all on function rowcast.%I(text, bigint) from public', watched.snapshot_name);
    if rowcast.has_capture_role() then
        grant create on schema rowcast to rowcast_capture;
        execute format('alter function rowcast.%I(text, bigint) owner to rowcast_capture', watched.snapshot_name);
        revoke create on schema rowcast from rowcast_capture;
    end if;
    execute format('grant execute on function rowcast.%I(text, bigint) to %I', watched.snapshot_name,
                   (select r.rolname from pg_class as c join pg_roles as r on r.oid = c.relowner
                    where c.oid = 'rowcast.watched'::regclass));
    perform rowcast.let_daemons_call(format('rowcast.%I(text, bigint)', watched.snapshot_name));
    execute format('select from rowcast.%I(%L, 0)', watched.snapshot_name, '');
exception
    when insufficient_privilege then
        raise exception 'rowcast: %: grant that right to the role rowcast_capture, which evaluates the expression', sqlerrm
            using errcode = 'insufficient_privilege';
    when syntax_error_or_access_rule_violation then
        raise exception 'rowcast: the rows of a topic in %.% cannot be found by (%): %', quote_ident(watched.schema_name),
            quote_ident(watched.table_name), watched.rows, sqlerrm using errcode = sqlstate;
end
$$;

-- The published columns of a watched table, with the types by which filters compare their values: a domain has the type
-- that it is over. `type_` is null for the types that no filter compares. daemon/core/column_types.py knows the others.
create or replace function rowcast.compared_columns(watched rowcast.watched)
returns table (name text, type_ text, labels text [])
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive column_ as (
        select a.attname::text as name, a.atttypid as type_
        from pg_attribute as a
        join pg_class as c on c.oid = a.attrelid
        join pg_namespace as n on n.oid = c.relnamespace
        where n.nspname = watched.schema_name and c.relname = watched.table_name
          and a.attname = any (watched.columns) and a.attnum > 0 and not a.attisdropped
        union all
        select d.name, t.typbasetype from column_ as d join pg_type as t on t.typtype = 'd' and t.oid = d.type_
    )
    select c.name, k.type_, case when k.type_ = 'enum' then
               (select array_agg(e.enumlabel::text) from pg_enum as e where e.enumtypid = t.oid) end
    from column_ as c
    join pg_type as t on t.oid = c.type_
    cross join lateral (select case
        when t.typtype = 'e' then 'enum'
        when t.oid in ('text'::regtype, 'varchar'::regtype, 'name'::regtype) then 'text'
        when t.oid in ('bool'::regtype, 'int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype,
                       'float4'::regtype, 'float8'::regtype, 'bpchar'::regtype, 'uuid'::regtype, 'date'::regtype)
        then format_type(t.oid, null)
        when t.oid in ('json'::regtype, 'jsonb'::regtype) then 'json'
        when t.oid = 'timestamp'::regtype then 'timestamp'
        when t.oid = 'timestamptz'::regtype then 'timestamptz' end as type_) as k
    where t.typtype <> 'd'
$$;

-- A condition of a filter as an SQL expression over the row `r` of a watched table. The daemon has checked it, and its
-- values; daemon/core/filters.py makes the same test in Python. A type is one of compared_columns.
create or replace function rowcast.filter_condition(node jsonb) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
set standard_conforming_strings = on
as $$
declare
    operation constant text := node ->> 'op';
    value constant text := node ->> 'value';
    type_ constant text := node ->> 'type';
    is_text constant boolean := coalesce(type_ in ('text', 'character', 'enum'), false);
    name text;
    column_ text;
    values_ text;
begin
    if node ?| array['and', 'or'] then
        return (
            select '(' || string_agg(rowcast.filter_condition(n.part), case when node ? 'and' then ' and ' else ' or ' end
                                     order by n.place) || ')'
            from jsonb_array_elements(coalesce(node -> 'and', node -> 'or')) with ordinality as n (part, place)
        );
    elsif node ? 'not' then
        return '(not ' || rowcast.filter_condition(node -> 'not') || ')';
    end if;
    name := format('r.%I', node ->> 'column');
    if operation = 'is_null' then
        -- Composite values with nothing but nulls are not null. A JSON null looks like NULL in a record.
        return format(case when value = 'true' then '(%s)' else '(not (%s))' end, format(
            case when type_ = 'json' then $q$%1$s is null or json_typeof(%1$s::pg_catalog.json) = 'null'$q$
                 else '%s is not distinct from null' end, name));
    end if;
    -- A cast to the type that a domain is over; otherwise it does nothing, and an index can be used. format() calls nothing
    -- but the output function of a type.
    column_ := case type_
        when 'enum' then format($q$(case when %1$s is distinct from null then format('%%s', %1$s) end)$q$, name)
        when 'character' then format($q$rtrim(%s::pg_catalog.bpchar::text, ' ')$q$, name)
        else format('%s::%s', name, type_::regtype) end;
    if operation = 'starts_with' then
        return format('starts_with(%s collate "C", %L)', column_, value);
    elsif operation in ('like', 'ilike') then
        -- What is longer is not looked through; neither it nor its "not" is true.
        return format('(case when length(%1$s) <= 65536 then %1$s collate "C" %2$s %3$L end)', column_, operation, value);
    end if;
    select string_agg(format('%L::%s', case when type_ = 'character' then rtrim(v.value, ' ') else v.value end,
                             case when is_text then 'text'::regtype else type_::regtype end), ', ') into values_
    from (select value where operation <> 'in'
          union all select jsonb_array_elements_text(node -> 'value') where operation = 'in') as v (value);
    return format(
        -- With the column's own collation an index can be used; "C" decides.
        case when operation in ('eq', 'in') and is_text then '(%1$s in (%4$s) and %1$s%2$s in (%4$s))'
             when operation in ('eq', 'in') then '(%1$s in (%4$s))'
             else '(%1$s%2$s %3$s %4$s)' end,
        column_, case when is_text then ' collate "C"' else '' end,
        case operation when 'ne' then '<>' when 'lt' then '<' when 'lte' then '<=' when 'gt' then '>' when 'gte' then '>=' end,
        values_);
end
$$;

-- The statement that reads the rows of the topic $1 for which a condition, if there is one, is true: at most $2 of them,
-- those with the greatest keys.
create or replace function rowcast.snapshot_statement(watched rowcast.watched, condition jsonb) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case when condition is null then format('select s.key, s.record from rowcast.%I($1, $2) as s', watched.snapshot_name)
        else format('select s.key, s.record from rowcast.filtered_rows(%L, $1, $2, %L) as s', watched.snapshot_name, condition) end
$$;

-- The settings of a function, as its definition names them.
create or replace function rowcast.settings_clause(settings text []) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select string_agg(format('set %s = %s', split_part(s, '=', 1),
                             case when split_part(s, '=', 1) in ('search_path', 'DateStyle') then split_part(s, '=', 2)
                                  else quote_literal(split_part(s, '=', 2)) end), ' ' order by n)
    from unnest(settings) with ordinality as u (s, n)
$$;

-- The topics of the row `r` as an array, given the expression for them and its type; null if that is no text. At most 250
-- characters, which is more than a client may name. In "C", two that differ are never equal.
create or replace function rowcast.topics_as_array(topic text, type_ text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when type_ in ('text', 'character varying', 'unknown', 'name')
        then format('array_remove(array[left((%s)::text, 250) collate "C"], null)', topic)
        when type_ in ('text[]', 'character varying[]') then format(
            'array(select distinct left(x::text, 250) collate "C" from unnest(%s) as u (x) where x is not null order by 1)', topic)
    end
$$;

-- Keeps the list of the triggers that capture a table, which rowcast.reset_vanished() compares.
create or replace function rowcast.list_triggers(watch integer) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regclass('rowcast.capturing') is null then
        return;  -- some revisions do not have it
    end if;
    delete from rowcast.capturing as c where c.watch = list_triggers.watch;
    insert into rowcast.capturing (trigger_id, watch, version)
    select t.oid, w.id, t.xmin from rowcast.watched as w
    join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = w.function_name
    join pg_trigger as t on t.tgfoid = p.oid and t.tgname <> '~rowcast_move'  -- which goes when a partition is detached, too
    where w.id = list_triggers.watch;
end
$$;

-- Resets the packs of watched tables whose rows changed while a capture trigger did not stand: rowcast.watch() and
-- rowcast.unwatch() did not drop it, so a partition was dropped or detached, and its rows with it; or it was disabled, and is
-- enabled again; or a partition that has rows was attached. Returns these tables.
create or replace function rowcast.reset_vanished() returns setof text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    w rowcast.watched;
    missed integer [];
begin
    with gone as (
        delete from rowcast.capturing as c
        where not exists (
            select from pg_trigger as t
            where t.oid = c.trigger_id and (t.xmin = coalesce(c.version, t.xmin) or t.tgenabled in ('D', 'R'))
        )
        returning c.watch
    )
    select array_agg(g.watch) into missed from gone as g;
    -- Postgres makes those of partitions itself if rows are captured one by one.
    with new as (
        insert into rowcast.capturing (trigger_id, watch, version)
        select t.oid, k.id, t.xmin from rowcast.watched as k
        join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = k.function_name
        join pg_trigger as t on t.tgfoid = p.oid and t.tgname <> '~rowcast_move'
        on conflict do nothing
        returning trigger_id, watch
    )
    select missed || array_agg(n.watch) into missed
    from new as n join pg_trigger as t on t.oid = n.trigger_id
    where t.tgparentid <> 0 and pg_relation_size(t.tgrelid) > 0
      and exists (select from rowcast.capturing as c where c.watch = n.watch);
    update rowcast.capturing as c set version = t.xmin from pg_trigger as t where t.oid = c.trigger_id and c.version is null;
    for w in select k.* from rowcast.watched as k where k.id = any (missed) and k.function_name is not null loop
        perform rowcast.note_change(w.id, ends_rights => w.revokes is not null);
        return next format('%I.%I', w.schema_name, w.table_name);
    end loop;
end
$$;

-- How the rows of a watched table are read, as far as its capture uses them; null if there is no such table.
--   facts   which column has a name, what an enumeration's label is called, what a composite type consists of, and by which
--           transaction a partition was attached: rows read otherwise if one of these changes. What is written to a partition
--           while it is detached is told to nobody
--   files   the file of each relation, and the versions of its columns: rows are other ones if both change. A new file alone
--           is made by `vacuum full`, a new version alone by `set not null`
-- A text reads as a varchar does.
create or replace function rowcast.layout_of(watched rowcast.watched) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive relation as (
        select c.oid, rowcast.used_columns(c.oid, watched.columns::text [] || watched.key::text [] || watched.soft_delete::text,
                                           concat_ws(' ', watched.topic, watched.revokes)) as used
        from pg_class as c
        where c.relname = watched.table_name and c.relnamespace = to_regnamespace(quote_ident(watched.schema_name))
          and c.relkind in ('r', 'p')
    ), column_ as (
        select a.attname, a.attnum, a.atttypid from relation as r
        join pg_attribute as a on a.attrelid = r.oid and a.attname = any (r.used)
    ), type_ (oid) as (
        select c.atttypid from column_ as c
        union
        select part.oid from type_ as whole join pg_type as t on t.oid = whole.oid
        cross join lateral (
            select t.typelem union all select t.typbasetype
            union all select r.rngsubtype from pg_range as r where t.oid in (r.rngtypid, r.rngmultitypid)
            union all select a.atttypid from pg_attribute as a where a.attrelid = t.typrelid and a.attnum > 0
        ) as part (oid)
        where t.oid >= 16384  -- nobody alters those of Postgres itself
    ), fact (name, value) as (
        select 'column ' || c.attname, jsonb_build_array(c.attnum, case when c.atttypid = 'varchar'::regtype then 'text'::regtype
                                                                        else c.atttypid end) from column_ as c
        union all
        select 'label ' || e.oid, to_jsonb(e.enumlabel) from type_ as t join pg_enum as e on e.enumtypid = t.oid
        union all
        select 'type ' || t.oid, jsonb_agg(array[a.attname::text, a.atttypid::text] order by a.attnum)
        from type_ join pg_type as t on t.oid = type_.oid
        join pg_attribute as a on a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
        group by t.oid
        union all
        select 'partition ' || i.inhrelid, to_jsonb(concat_ws(' ', i.xmin, i.cmin)) from relation as r
        cross join lateral pg_partition_tree(r.oid) as p join pg_inherits as i on i.inhrelid = p.relid
    ), file as (
        select p.relid::oid as oid, case when c.relkind = 'p' then (
                   select string_agg(o.relid::oid::text, ' ' order by o.relid::oid) from pg_partition_tree(p.relid) as o
               ) else c.relfilenode::text end as file, (
                   select string_agg(concat_ws(' ', a.attnum, a.xmin, a.cmin), ' ' order by a.attnum) from pg_attribute as a
                   where a.attrelid = p.relid and a.attname = any (r.used)
               ) as versions
        from relation as r cross join lateral rowcast.with_partitions(r.oid) as p (relid) join pg_class as c on c.oid = p.relid
    )
    select jsonb_build_object('facts', coalesce((select jsonb_object_agg(f.name, f.value) from fact as f), '{}'),
                              'files', (select jsonb_object_agg(f.oid, array[md5(f.file), md5(f.versions)]) from file as f))
    from relation
$$;

-- Keeps how the rows of a watched table are read. Returns whether that was altered so that rows which were written before read
-- otherwise. What is used now and was not before, as another column or a new label, alters nothing.
create or replace function rowcast.note_layout(watched rowcast.watched) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    known jsonb;
    now_ jsonb;
begin
    if to_regclass('rowcast.layouts') is null then
        return false;  -- some revisions do not have it
    end if;
    select l.layout into known from rowcast.layouts as l where l.watch = watched.id;
    now_ := rowcast.layout_of(watched);
    if now_ is null then
        return false;
    elsif known is null then
        insert into rowcast.layouts (watch, layout) values (watched.id, now_) on conflict do nothing;
        return false;
    end if;
    now_ := jsonb_set(now_, '{facts}', (known -> 'facts') || (now_ -> 'facts'));  -- a name that is gone may come back
    if now_ = known then
        return false;
    end if;
    update rowcast.layouts as l set layout = now_
    where l.watch = (select k.watch from rowcast.layouts as k where k.watch = watched.id and k.layout = known for update skip locked);
    return found and (  -- else somebody else notes it, or the next look does
        exists (select from jsonb_each(known -> 'facts') as a join jsonb_each(now_ -> 'facts') as b on b.key = a.key
                where b.value <> a.value)
        or exists (select from jsonb_each(known -> 'files') as a join jsonb_each(now_ -> 'files') as b on b.key = a.key
                   where b.value -> 0 <> a.value -> 0 and b.value -> 1 <> a.value -> 1)
    );
end
$$;

-- Resets the packs of watched tables whose rows read otherwise since the table or a type was altered, as after
-- `alter column ... using` or `alter type ... rename value`. Returns these tables.
create or replace function rowcast.reset_altered() returns setof text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    w rowcast.watched;
begin
    for w in select k.* from rowcast.watched as k where k.function_name is not null order by k.id loop
        if rowcast.note_layout(w) then
            perform rowcast.note_change(w.id, ends_rights => w.revokes is not null);
            return next format('%I.%I', w.schema_name, w.table_name);
        end if;
    end loop;
end
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
--   rows         SQL expression over `r` and the text `topic`, true for the rows of that topic, which an index can answer.
--                It finds the rows of a snapshot; without it, each snapshot reads the whole table. The text is `$1`, too: in
--                a table that has a column "topic" it must be called that
-- Does nothing, and takes no lock, if the table is already captured this way. In a session whose `rowcast.notifications`
-- is off, as when ROWCAST_NOTIFICATIONS is, it stops capturing the table instead. Where a table was not captured for a
-- while, or something else of its rows is told from here on, the topics of its pack are reset. Returns what it did.
create or replace function rowcast.watch(
    relation regclass, topic text, columns text [], key text [] default '{id}', soft_delete name default null,
    revokes text default null, pack text default null, model text default null,
    per_row boolean default false, on_error text default 'strict', rows text default null
) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
set standard_conforming_strings = on
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
    snapshot_body text;
    used name [];
    read_ name [];
    settings text [];
    trigger_ record;
    missed boolean;
    altered boolean;
begin
    select n.nspname, c.relname into w.schema_name, w.table_name
    from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = relation and c.relkind in ('r', 'p') and c.relpersistence <> 't';
    if w.table_name is null or w.schema_name in ('rowcast', 'pg_catalog', 'information_schema') then
        raise exception 'rowcast: % cannot be watched: it is not an ordinary or partitioned table', relation
            using errcode = 'wrong_object_type';
    end if;
    if current_setting('rowcast.notifications', true) = 'off' then
        return rowcast.unwatch(relation);
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
    select string_agg(quote_ident(a.attname), ', ') into missing from pg_attribute as a
    where a.attrelid = relation and a.attname = any (columns || key || soft_delete::text) and a.attgenerated = 'v';
    if missing is not null then
        raise exception 'rowcast: % of % cannot be published: a virtual generated column has no value in a trigger', missing,
            relation using errcode = 'feature_not_supported';
    end if;
    if rowcast.unique_at_once(relation, key) is null or exists (
        select from pg_attribute as a
        where a.attrelid = relation and a.attname = any (watch.key) and not a.attnotnull
    ) then
        raise exception 'rowcast: (%) is no key of %: it must be unique and not null', array_to_string(key, ', '), relation
            using errcode = 'invalid_parameter_value';
    end if;
    perform rowcast.check_inheritance(relation, per_row);
    if rows !~ '\$1' and exists (
        select from pg_attribute as a where a.attrelid = relation and a.attname = 'topic' and not a.attisdropped
    ) then
        raise exception 'rowcast: % has a column "topic": in rows, write $1 for the topic', relation
            using errcode = 'ambiguous_column';
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
    w.rows := rows;

    used := rowcast.used_columns(relation, columns || key || soft_delete::text, concat_ws(' ', topic, revokes));
    read_ := rowcast.used_columns(relation, columns || key || soft_delete::text, concat_ws(' ', topic, rows));
    select k.* into known from rowcast.watched as k where (k.schema_name, k.table_name) = (w.schema_name, w.table_name);
    perform rowcast.let_capture_read(relation, used || read_);
    type_ := rowcast.type_of(relation, used, topic);
    topics := rowcast.topics_as_array(topic, type_);
    if topics is null then
        raise exception 'rowcast: a topic is text or text[], this expression gives %', type_ using errcode = 'datatype_mismatch';
    end if;
    -- A single topic needs no array, unless its expression has a subquery, which should run only once.
    each_topic := case when type_ like '%[]' or topic ~* '\mselect\M' then format('unnest(%s)', topics)
                       else format('left((%s)::text, 250)', topic) end;
    if revokes is not null then
        type_ := rowcast.type_of(relation, used, revokes);
        if type_ <> 'jsonb' then
            raise exception 'rowcast: revokes is jsonb, this expression gives %', type_ using errcode = 'datatype_mismatch';
        end if;
    end if;

    w.id := coalesce(known.id, nextval(pg_get_serial_sequence('rowcast.watched', 'id')));
    w.function_name := left(format('capture_%s_%s', w.id, regexp_replace(lower(w.table_name), '[^a-z0-9_]', '', 'g')), 63);
    body := rowcast.capture_body(w, relation, topics, each_topic, used);
    settings := rowcast.capture_settings(rowcast.is_simple(relation, used, concat_ws(' ', topic, revokes)));
    w.definition := rowcast.definition_of(body, settings);
    w.snapshot_name := left(regexp_replace(w.function_name, '^capture', 'snapshot'), 63);
    snapshot_body := rowcast.snapshot_body(w, relation, topics, read_);
    w.snapshot_definition := rowcast.definition_of(snapshot_body, rowcast.capture_settings(false));

    altered := rowcast.note_layout(w);
    if known.definition = w.definition and rowcast.function_stands(known.function_name, 'v', w.definition)
       and (known.model, known.pack) = (w.model, w.pack)
       and not exists (select from rowcast.capture_triggers(relation, per_row, w.function_name) as c where not c.stands)
    then
        if altered then
            perform rowcast.note_change(w.id, ends_rights => revokes is not null);
        end if;
        if known.snapshot_definition = w.snapshot_definition
           and rowcast.function_stands(known.snapshot_name, 's', w.snapshot_definition)
        then
            return format('%s is watched already', relation);
        end if;
        perform rowcast.make_snapshot(w, snapshot_body, rowcast.capture_settings(false));
        update rowcast.watched as k
        set rows = w.rows, snapshot_name = w.snapshot_name, snapshot_definition = w.snapshot_definition where k.id = w.id;
        return format('%s is watched now', relation);
    end if;

    definition := format('create or replace function rowcast.%I() returns trigger language plpgsql security definer %s as %L',
        w.function_name,
        rowcast.settings_clause(settings),
        body);
    missed := case when known.function_name is null
        then coalesce(rowcast.written_so_far(relation) <> current_setting('rowcast.unwatched_' || known.id, true), true)
        else not rowcast.function_stands(known.function_name, 'v', known.definition)
             or exists (select from rowcast.capture_triggers(relation, known.per_row, known.function_name) as c where not c.stands)
        end;
    perform rowcast.unwatch(relation);
    perform rowcast.make_snapshot(w, snapshot_body, rowcast.capture_settings(false));
    execute definition;
    execute format('revoke all on function rowcast.%I() from public', w.function_name);
    if rowcast.has_capture_role() then
        -- To become a function's owner, a role needs the right to create in its schema.
        grant create on schema rowcast to rowcast_capture;
        execute format('alter function rowcast.%I() owner to rowcast_capture', w.function_name);
        revoke create on schema rowcast from rowcast_capture;
    end if;

    for trigger_ in select * from rowcast.capture_triggers(relation, per_row, w.function_name) loop
        if trigger_.operation = 'move' then
            execute format('create trigger %I before update on %s for each row when (%s) execute function rowcast.%I()',
                trigger_.trigger_name, trigger_.target, rowcast.may_move(relation), w.function_name);
            continue;
        end if;
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
                                 per_row, on_error, function_name, definition, rows, snapshot_name, snapshot_definition)
    overriding system value
    values (w.id, w.schema_name, w.table_name, w.pack, w.model, w.topic, w.columns, w.key, w.soft_delete, w.revokes,
            w.per_row, w.on_error, w.function_name, w.definition, w.rows, w.snapshot_name, w.snapshot_definition)
    on conflict (schema_name, table_name) do update set
        pack = excluded.pack, model = excluded.model, topic = excluded.topic, columns = excluded.columns,
        key = excluded.key, soft_delete = excluded.soft_delete, revokes = excluded.revokes, per_row = excluded.per_row,
        on_error = excluded.on_error, function_name = excluded.function_name, definition = excluded.definition,
        rows = excluded.rows, snapshot_name = excluded.snapshot_name, snapshot_definition = excluded.snapshot_definition;
    perform rowcast.list_triggers(w.id);
    if known.id is not null
       and (missed or altered or (known.topic, known.columns, known.key, known.soft_delete)
                                 is distinct from (w.topic, w.columns, w.key, w.soft_delete))
    then
        perform rowcast.note_change(w.id, ends_rights => (missed or altered) and revokes is not null);
    end if;
    return format('%s is watched now', relation);
end
$$;

-- Says in the log that from here on something else is told in the topics of a watched table's pack, or that something was
-- missed. Daemons look at a table that is served without a pack again when they get there, and reset the topics.
-- `ends_rights`: nobody may read them without being asked again. Once in a transaction is enough.
create or replace function rowcast.note_change(watch integer, ends_rights boolean) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into rowcast.events (watch, topic, kind, key, actor, revokes)
    select w.id, '*' || w.pack, 'lost', '{}', 'watch', case when ends_rights then '{}'::jsonb end
    from rowcast.watched as w
    where w.id = note_change.watch and not exists (
        select from rowcast.events as e
        where e.xid = pg_current_xact_id() and e.watch = w.id and e.kind = 'lost' and e.topic = '*' || w.pack
          and (e.revokes is not null or not ends_rights)
    );
    perform rowcast.ring();
end
$$;

-- Stops serving a watched table: clients can no longer follow its topics.
create or replace function rowcast.stop_serving(watch integer) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regclass('rowcast.own_tables') is null then
        return;  -- some revisions do not have it
    end if;
    delete from rowcast.own_tables as o where o.watch = stop_serving.watch;
    if found then
        execute format('drop function if exists rowcast.%I(text, text)', 'may_read_' || watch);
        perform rowcast.note_change(watch, ends_rights => true);
    end if;
end
$$;

-- Stops capturing a watched table, whatever its name is by now. Its events stay in the log.
create or replace function rowcast.stop_capturing(known rowcast.watched) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    found_ record;
begin
    for found_ in
        select t.tgrelid::regclass as target, t.tgname from pg_trigger as t
        join pg_proc as p on p.oid = t.tgfoid and p.pronamespace = 'rowcast'::regnamespace
        where p.proname = known.function_name and t.tgparentid = 0
    loop
        execute format('drop trigger %I on %s', found_.tgname, found_.target);
    end loop;
    execute format('drop function if exists rowcast.%I()', known.function_name);
    if known.snapshot_name is not null then
        execute format('drop function if exists rowcast.%I(text, bigint)', known.snapshot_name);
    end if;
    perform rowcast.stop_serving(known.id);
    update rowcast.watched as w set function_name = null, snapshot_name = null where w.id = known.id;
    perform rowcast.list_triggers(known.id);
end
$$;

-- What this transaction has written to a table and its partitions, to compare: it grows with each row, and changes with a
-- table that is emptied or rewritten. Null if it cannot be known. Who watches a table again in the transaction that unwatched it
-- missed nothing if it is the same: nobody else can write in between.
create or replace function rowcast.written_so_far(relation regclass) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case when current_setting('track_counts')::boolean then concat_ws(' ', pg_current_xact_id(), (
        select string_agg(concat_ws(' ', t.relid::oid, pg_relation_filenode(t.relid), pg_stat_get_xact_tuples_inserted(t.relid),
                                    pg_stat_get_xact_tuples_updated(t.relid), pg_stat_get_xact_tuples_deleted(t.relid)),
                          ' ' order by t.relid::oid)
        from rowcast.with_partitions(relation) as t (relid)
    )) end
$$;

-- Stops capturing a table.
create or replace function rowcast.unwatch(relation regclass) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    known rowcast.watched;
begin
    select w.* into known from rowcast.watched as w
    join pg_class as c on c.relname = w.table_name and c.relnamespace = to_regnamespace(quote_ident(w.schema_name))
    where c.oid = relation and w.function_name is not null;
    if known.id is null then
        return format('%s was not watched', relation);
    end if;
    perform rowcast.stop_capturing(known);
    perform set_config('rowcast.unwatched_' || known.id, coalesce(rowcast.written_so_far(relation), ''), true);
    return format('%s is no longer watched', relation);
end
$$;

-- Drops the capture functions of tables that were dropped. Their triggers were dropped with the tables; where there are
-- some, the table was only renamed.
create or replace function rowcast.unwatch_dropped() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform rowcast.stop_capturing(w)
    from rowcast.watched as w
    where w.function_name is not null and to_regclass(format('%I.%I', w.schema_name, w.table_name)) is null
      and not exists (
          select from pg_trigger as t join pg_proc as p on p.oid = t.tgfoid
          where p.pronamespace = 'rowcast'::regnamespace and p.proname = w.function_name
      );
end
$$;

-- Whether one of the patterns covers a topic: a topic itself, or the beginning of topics and an asterisk.
create or replace function rowcast.is_covered(topic text, patterns text []) returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(bool_or(case when p.pattern like '%*' then starts_with(topic, left(p.pattern, -1))
                                 else topic collate "C" = p.pattern end), false)
    from unnest(patterns) as p (pattern)
$$;

-- The pattern of the topics that an expression gives, if it is a text in quotes that something may be appended to; else null.
create or replace function rowcast.pattern_of(topic text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select replace(m.part[1], '''''', '''') || case when m.part[2] = '' then '' else '*' end
    from regexp_match(topic, $q$\A\s*'((?:[^'\\]|'')+)'\s*(\|\||\Z)$q$) as m (part)
    where left(m.part[1], 1) <> '*'
$$;

-- How to find the rows of a topic: the condition over the row `r` and the topic $1, and the column that it compares. Null
-- where the expression for the topic is more than a text in quotes and a column of a plain type.
create or replace function rowcast.rows_of(relation regclass, topic text, out condition text, out column_name name)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case when m.part[2] is null then '$1 = ' || quote_literal(p.prefix)
        else case f.type_
            when 'text' then format('r.%I = %s', a.attname, f.rest)
            when 'character varying' then format('r.%I = %s', a.attname, f.rest)
            when 'uuid' then format($q$r.%I = case when %s ~ '\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z' then %2$s::uuid end$q$,
                                    a.attname, f.rest)
            -- What is no number, or too large for one, is no topic of a row.
            else format($q$r.%I = case when %s ~ '\A-?[0-9]{1,19}\Z' then case when %2$s::numeric between '-9223372036854775808' and '9223372036854775807' then %2$s::bigint end end$q$,
                        a.attname, f.rest)
        end end,
        a.attname
    from regexp_match(topic, $q$\A\s*'((?:[^'\\]|'')+)'(?:\s*\|\|\s*(?:r\.)?([a-z_][a-z0-9_]*)(?:::text)?)?\s*\Z$q$) as m (part)
    cross join lateral (select replace(m.part[1], '''''', '''') as prefix) as p
    left join pg_attribute as a
        on a.attrelid = relation and a.attname::text = m.part[2] and a.attnum > 0 and not a.attisdropped
    cross join lateral (select format_type(a.atttypid, null) as type_, format('substr($1, %s)', length(p.prefix) + 1) as rest) as f
    where m.part[2] is null
       or f.type_ in ('text', 'character varying', 'uuid', 'smallint', 'integer', 'bigint')
$$;

-- Whether an index begins with this column, so that it finds rows by it.
create or replace function rowcast.is_indexed(relation regclass, column_name name) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_index as i join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
        where i.indrelid = relation and a.attname = column_name and i.indisvalid and i.indpred is null
    )
$$;

-- What a value of this type is in a frame: `text`, `text[]`, or the name of the type of Postgres that it looks like.
create or replace function rowcast.shape_of(facts jsonb, type_ oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive base as (
        select t.oid, t.typtype, t.typbasetype from pg_type as t where t.oid = type_
        union all
        select t.oid, t.typtype, t.typbasetype from base as b join pg_type as t on b.typtype = 'd' and t.oid = b.typbasetype
    )
    select case when (facts ->> 'array_form')::boolean then 'text[]' when (facts ->> 'text_form')::boolean then 'text'
                else format_type(b.oid, null) end
    from base as b where b.typtype <> 'd'
$$;

-- Makes the function of a served table that says who may read a topic. It runs as the role that captures; the daemon's role
-- may do nothing but call it. `over_rows`: the expression needs a row; then it must be true for one of the topic's rows.
-- In it, `user_id` and `topic` are these two even where the table has columns of that name.
create or replace function rowcast.make_right(
    watched rowcast.watched, relation regclass, readable text, over_rows boolean
) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
set standard_conforming_strings = on
as $$
declare
    name constant text := format('rowcast.%I', 'may_read_' || watched.id);
    used constant name [] := rowcast.used_columns(relation, watched.key::text [] || watched.soft_delete::text,
                                                  concat_ws(' ', readable, watched.topic, watched.rows));
    settings constant text [] := rowcast.capture_settings(false);
    body text;
begin
    if over_rows then
        perform rowcast.let_capture_read(relation, used);
    end if;
    body := case when over_rows then format($body$
    select exists (
        select from (select %1$s from %2$I.%3$I as c) as r
        cross join lateral (select (%4$s) as may from (select $2 as user_id, $1 as topic) as given) as e
        where %5$s%6$s and $1 collate "C" = any ((%7$s)::text []) and e.may
    )
$body$,
        (select string_agg(format('c.%I', u.name), ', ') from unnest(used) as u (name)),
        watched.schema_name, watched.table_name, readable, rowcast.live_of('r', watched.soft_delete),
        ' and (' || watched.rows || ')',
        rowcast.topics_as_array(watched.topic, rowcast.type_of(relation, used, watched.topic)))
    else format($body$
    select (%s) from (select $2 as user_id, $1 as topic) as given
$body$, readable) end;
    execute format('create or replace function %s(topic text, user_id text) returns boolean '
                   'language sql stable security definer %s as %L', name, rowcast.settings_clause(settings), body);
    execute format('revoke all on function %s(text, text) from public', name);
    if rowcast.has_capture_role() then
        grant create on schema rowcast to rowcast_capture;
        execute format('alter function %s(text, text) owner to rowcast_capture', name);
        revoke create on schema rowcast from rowcast_capture;
    end if;
    execute format('grant execute on function %s(text, text) to %I', name,
                   (select r.rolname from pg_class as c join pg_roles as r on r.oid = c.relowner
                    where c.oid = 'rowcast.watched'::regclass));
    perform rowcast.let_daemons_call(name || '(text, text)');
    begin
        execute format('select %s(%L, %2$L)', name, '');
    exception when data_exception or cardinality_violation or plpgsql_error then
        null;  -- the expression refuses these texts, which are nobody's
    end;
    return rowcast.definition_of(body, settings);
end
$$;

-- Captures a table, as rowcast.watch() does, and serves it without a pack.
--   readable     SQL expression, boolean: who may read a topic. Either over the texts `user_id` and `topic` alone, or also
--                over the row `r`: then whoever it is true for in one of the topic's rows
--   columns      by default, all that can be published
--   key          by default, the primary key
--   topics       what the topics are: topics themselves, or beginnings of topics and an asterisk. By default, that is read off
--                the expression for the topic. A row whose topic is none of these is told to nobody
--   rows         by default, that is read off, too
-- The others are those of rowcast.watch(). Tables may share topics if `readable` is the same for them. Returns what was
-- chosen, as JSON.
create or replace function rowcast.serve(
    relation regclass, topic text, readable text, columns text [] default null, key text [] default null,
    soft_delete name default null, revokes text default null, rows text default null, topics text [] default null
) returns jsonb
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    derived record;
    other record;
    own rowcast.watched;
    old rowcast.own_tables;
    did text;
    right_definition text;
    without_row text;
    virtual name [];
begin
    -- One at a time: tables may not share topics with different rights, whoever else watches one at this moment.
    lock table rowcast.own_tables in share row exclusive mode;
    select array_agg(a.attname order by a.attnum) into virtual from pg_attribute as a
    where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attgenerated = 'v';
    columns := coalesce(columns, array(
        select a.attname::text from pg_attribute as a
        where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v' order by a.attnum));
    key := coalesce(key, (
        select array_agg(a.attname::text order by k.n) from pg_index as i
        cross join unnest(i.indkey::smallint []) with ordinality as k (attnum, n)
        join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
        where i.indrelid = relation and i.indisprimary and k.n <= i.indnkeyatts));
    if key is null and (select c.relkind in ('r', 'p') from pg_class as c where c.oid = relation) then
        raise exception 'rowcast: % has no primary key: name columns that are unique and not null (--key)', relation
            using errcode = 'invalid_parameter_value';
    end if;
    if exists (select from pg_attribute as a
               where a.attrelid = relation and a.attname = soft_delete and a.attnotnull) then
        raise exception 'rowcast: % of % is never null, so every row would count as deleted', quote_ident(soft_delete), relation
            using errcode = 'invalid_parameter_value';
    end if;
    topics := coalesce(topics, array_remove(array[rowcast.pattern_of(topic)], null));
    if exists (select from unnest(topics) as t (pattern) where t.pattern is null or t.pattern ~ '^(\*|$)') then
        raise exception 'rowcast: a topic begins with at least one character other than *'
            using errcode = 'invalid_parameter_value';
    end if;
    -- daemon/core/change.py says what can be named.
    if exists (select from unnest(topics) as t (pattern) where t.pattern ~ $q$[\x01-\x20\x7f]$q$ or length(t.pattern) > 128) then
        raise exception 'rowcast: no client can name these topics (%): they have blanks, control characters or more than '
            '128 characters', array_to_string(topics, ', ') using errcode = 'invalid_parameter_value';
    end if;
    select format('%I.%I', w.schema_name, w.table_name) as name, o.readable into other from rowcast.own_tables as o
    join rowcast.watched as w on w.id = o.watch and w.function_name is not null
    join pg_class as c on c.oid = relation join pg_namespace as n on n.oid = c.relnamespace
    where (w.schema_name, w.table_name) <> (n.nspname, c.relname)
      and (o.readable <> serve.readable or w.table_name = c.relname) and exists (
          select from unnest(o.topics) as a (pattern) cross join unnest(serve.topics) as b (pattern)
          where rowcast.is_covered(rtrim(a.pattern, '*'), array[b.pattern])
             or rowcast.is_covered(rtrim(b.pattern, '*'), array[a.pattern]))
    limit 1;
    if other.name is not null then
        raise exception 'rowcast: topics of % are those of %, too, %', relation, other.name,
            case when other.readable = serve.readable then 'and clients could not tell two tables of one name apart'
                 else format('where another right decides who may read them (%s)', other.readable) end
            using errcode = 'invalid_parameter_value';
    end if;
    begin
        execute format(E'select (%s\n) from %s as r where false', topic, relation);
    exception
        when insufficient_privilege then
            null;  -- it is evaluated by another role, and that one's right is looked at below
        when syntax_error_or_access_rule_violation then
            raise exception 'rowcast: the topic cannot be worked out (%): %', topic, sqlerrm ||
                case when topic !~ '''' then ': a text needs quotes of its own, as in ''orders:'' || r.customer_id' else '' end
                using errcode = sqlstate;
    end;
    select * into derived from rowcast.rows_of(relation, topic);
    rows := coalesce(rows, derived.condition);

    -- Not told as the end of what was before: what is told from here on is said below.
    delete from rowcast.own_tables as o using rowcast.watched as w
    where o.watch = w.id and (w.schema_name, w.table_name) = (
        select n.nspname, c.relname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace where c.oid = relation)
    returning o.* into old;
    did := rowcast.watch(relation, topic, columns, key, soft_delete, revokes, rows => rows, pack => (
        select format('%I.%I', n.nspname, c.relname) from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
        where c.oid = relation));
    if topic !~ $q$\A\s*'([^'\\]|'')*'\s*\Z$q$ then
        begin
            execute format('select pg_typeof(%s)', topic) into without_row;
        exception when others then
            null;  -- it needs the row, as it should
        end;
        if without_row is not null then
            raise exception 'rowcast: the topic (%) names no column of %: use one, or write a text in quotes', topic, relation
                using errcode = 'invalid_parameter_value';
        end if;
    end if;
    if topics = '{}' then
        raise exception 'rowcast: it does not show how the topics (%) begin: say what they are (--topics)', topic
            using errcode = 'invalid_parameter_value';
    end if;
    select w.* into own from rowcast.watched as w
    join pg_class as c on c.relname = w.table_name and c.relnamespace = to_regnamespace(quote_ident(w.schema_name))
    where c.oid = relation;
    begin
        begin
            right_definition := rowcast.make_right(own, relation, readable, over_rows => false);
        exception when undefined_column or undefined_table then
            right_definition := rowcast.make_right(own, relation, readable, over_rows => true);
        end;
    exception
        when insufficient_privilege then
            raise exception 'rowcast: %: grant that right to the role rowcast_capture, which evaluates the expression', sqlerrm
                using errcode = 'insufficient_privilege';
        when syntax_error_or_access_rule_violation or invalid_function_definition then
            raise exception 'rowcast: who may read a topic cannot be worked out (%): %', readable, sqlerrm || case
                when sqlstate = '42883' and sqlerrm !~ '\('  -- no such operator; a function would have parentheses
                then ': user_id and topic are text, so cast what you compare with them, as in r.id::text' else '' end
                using errcode = sqlstate;
    end;
    insert into rowcast.own_tables (watch, topics, readable, definition, since)
    values (own.id, serve.topics, serve.readable, right_definition, coalesce(old.since, now()));
    if old.watch is null or did not like '% already' or (old.topics, old.definition) <> (serve.topics, right_definition) then
        perform rowcast.note_change(own.id, ends_rights => (old.topics, old.definition) <> (serve.topics, right_definition));
    end if;
    return jsonb_build_object('columns', columns, 'key', key, 'topics', topics, 'left_out', (
        select coalesce(jsonb_agg(a.attname order by a.attnum), '[]') from pg_attribute as a
        where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attname::text <> all (columns)
    ), 'virtual', coalesce(to_jsonb(virtual), '[]'), 'rows', rows, 'unindexed', case
        when derived.condition is null or derived.column_name is null then null
        when not rowcast.is_indexed(relation, derived.column_name) then derived.column_name end);
end
$$;

-- Watches each table that belongs to no pack once more, so that what this file says holds for them, too, and what somebody
-- altered is mended.
create or replace function rowcast.serve_again() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    own record;
begin
    if current_setting('rowcast.notifications', true) = 'off' then
        return;  -- that is about the tables of packs
    end if;
    for own in
        select w.*, o.readable, o.topics, c.oid::regclass as relation
        from rowcast.watched as w left join rowcast.own_tables as o on o.watch = w.id
        join pg_class as c on c.relname = w.table_name and c.relnamespace = to_regnamespace(quote_ident(w.schema_name))
        where w.function_name is not null
          and (o.watch is not null or to_regclass(format('%I.alembic_version', w.schema_name)) is null)
        order by w.id
    loop
        begin
            if own.readable is null then
                perform rowcast.watch(own.relation, own.topic, own.columns::text [], own.key::text [], own.soft_delete,
                                      own.revokes, own.pack, own.model, own.per_row, own.on_error, own.rows);
            else
                perform rowcast.serve(own.relation, own.topic, own.readable, own.columns::text [], own.key::text [],
                                      own.soft_delete, own.revokes, own.rows, own.topics);
            end if;
        exception when syntax_error_or_access_rule_violation or data_exception or object_not_in_prerequisite_state then
            raise warning '%', sqlerrm;
        end;
    end loop;
end
$$;
-- May this user follow this topic of a table that is served without a pack? An expression that fails for these texts, such
-- as a cast, or a function that raises an exception, says no.
create or replace function rowcast.may_read(user_id text, topic text) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    own integer;
    may boolean;
begin
    for own in
        select o.watch from rowcast.own_tables as o join rowcast.watched as w on w.id = o.watch
        where w.function_name is not null and rowcast.is_covered(may_read.topic, o.topics) order by o.watch
    loop
        begin
            execute format('select rowcast.%I($1, $2)', 'may_read_' || own) into may using topic, user_id;
        exception when data_exception or cardinality_violation or plpgsql_error then
            may := false;
        end;
        if may then
            return true;
        end if;
    end loop;
    return false;
end
$$;
revoke all on function rowcast.may_read(text, text) from public;

-- Refuses a row that becomes soft-deleted. The argument is the column that says so.
create or replace function rowcast.refuse_soft_delete() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'UPDATE' and to_jsonb(old) ->> tg_argv[0] is not null then
        return new;  -- it was deleted before
    end if;
    raise exception 'rowcast: soft deletes are off (ROWCAST_SOFT_DELETES): delete the row instead of setting %.%',
        tg_table_name, tg_argv[0]
        using errcode = 'check_violation', schema = tg_table_schema, table = tg_table_name, column = tg_argv[0],
              constraint = 'rowcast_soft_deletes_off';
end
$$;

-- Lets rows of a table be deleted softly, by setting this column; or refuses that, in a session whose
-- `rowcast.soft_deletes` is off, as when ROWCAST_SOFT_DELETES is. Rows that are deleted already stay so, and can be
-- restored. Takes no lock if nothing changes. Returns what it did.
create or replace function rowcast.soft_deletes(relation regclass, column_name name) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    wanted constant boolean := coalesce(current_setting('rowcast.soft_deletes', true), 'on') <> 'off';
    refused constant boolean := exists (
        select from pg_trigger as t where t.tgrelid = relation and t.tgname = 'rowcast_soft_deletes'
    );
begin
    if not wanted and not refused then
        execute format('create trigger rowcast_soft_deletes before insert or update on %s for each row '
            'when (new.%I is not null) execute function rowcast.refuse_soft_delete(%L)', relation, column_name, column_name);
    elsif wanted and refused then
        execute format('drop trigger rowcast_soft_deletes on %s', relation);
    end if;
    return format('soft deletes of %s are %s', relation, case when wanted then 'on' else 'off' end);
end
$$;

-- The capture role sees every row of what it reads: a topic that is looked up in a table with row security would be null
-- otherwise, and the change would be told to nobody. Only a superuser may give it that; without it, such a write fails.
do $$
begin
    if exists (select from pg_catalog.pg_roles where rolname = 'rowcast_capture' and not rolbypassrls) then
        alter role rowcast_capture bypassrls;
    end if;
exception when insufficient_privilege then
    null;
end
$$;

-- Capture functions run with the rights of their owner, and evaluate what a table's owner may have defined. That owner
-- must not be the one who installs this, who may own the whole database, unless somebody has decided so.
do $$
begin
    if not rowcast.has_capture_role()
       and exists (select from pg_catalog.pg_roles as r where r.rolname operator(pg_catalog.=) 'rowcast_capture'
                   and pg_catalog.pg_has_role(current_user, r.oid, 'member with admin option'))
    then
        execute pg_catalog.format('grant rowcast_capture to %I', current_user);
    end if;
    if not rowcast.has_capture_role()
       and coalesce(pg_catalog.current_setting('rowcast.capture_as_owner', true), 'off') operator(pg_catalog.<>) 'on'
    then
        raise exception 'rowcast: capture functions run with the rights of the role rowcast_capture, which % may not use: '
            'as a superuser, run "%grant rowcast_capture to %", or let them '
            'run with the rights of % ("alter role % set rowcast.capture_as_owner = on")',
            current_user,
            case when exists (select from pg_catalog.pg_roles as r where r.rolname operator(pg_catalog.=) 'rowcast_capture')
                 then '' else 'create role rowcast_capture nologin bypassrls; ' end,
            pg_catalog.quote_ident(current_user), current_user, pg_catalog.quote_ident(current_user)
            using errcode = 'object_not_in_prerequisite_state';
    end if;
end
$$;

-- The rows of a topic that a snapshot function would read, as far as a condition is true. It runs the text of that function
-- with the condition in it, so it has to have its owner and its settings: what it executes belongs to its owner, too.
do $$
begin
    execute pg_catalog.format(
        'create or replace function rowcast.filtered_rows(snapshot name, topic text, most bigint, condition jsonb) '
        'returns table (key text, record text) language plpgsql stable security definer %s as %L',
        rowcast.settings_clause(rowcast.capture_settings(false)), $body$
begin
    return query execute (
        select replace(replace(p.prosrc, '/*topic*/', ' cross join (select $1 as topic) as t'),
                       '/*filter*/', ' and ' || rowcast.filter_condition(condition))
        from pg_proc as p
        where p.pronamespace = 'rowcast'::regnamespace and p.proname = snapshot and p.proname ~ '^snapshot_[0-9]'
          and p.pronargs = 2 and p.proowner = current_user::regrole and p.prosrc like '%/*filter*/%'
    ) using topic, most;
end
$body$);
    if rowcast.has_capture_role() then
        grant create on schema rowcast to rowcast_capture;
        alter function rowcast.filtered_rows(name, text, bigint, jsonb) owner to rowcast_capture;
        revoke create on schema rowcast from rowcast_capture;
    end if;
end
$$;

revoke all on all functions in schema rowcast from public;
grant execute on function rowcast.ulid() to public;
-- Since PostgreSQL 16 a member of rowcast_capture may not always do what that role may.
do $$
declare
    function constant text := 'rowcast.filtered_rows(name, text, bigint, jsonb)';
    owner_ constant pg_catalog.name := (
        select r.rolname from pg_catalog.pg_class as c join pg_catalog.pg_roles as r on r.oid operator(pg_catalog.=) c.relowner
        where c.oid operator(pg_catalog.=) 'rowcast.watched'::pg_catalog.regclass);
begin
    if not pg_catalog.has_function_privilege(owner_, function, 'execute') then
        execute pg_catalog.format('grant execute on function %s to %I', function, owner_);
    end if;
end
$$;
do $$
begin
    grant usage on schema rowcast to rowcast_capture;
    grant insert on rowcast.events, rowcast.lost to rowcast_capture;
    grant usage on sequence rowcast.event_ids to rowcast_capture;
    grant execute on function rowcast.ring(), rowcast.must_ring(), rowcast.has_captured(), rowcast.short_right(jsonb), rowcast.filter_condition(jsonb)
    to rowcast_capture;
exception when undefined_object then
    null;  -- the role could not be created; a warning was raised then
end
$$;

-- What a daemon does in this schema: the rights that its role needs, and no others. A function that it calls runs with the
-- rights of its owner where more is needed.
create or replace function rowcast.rights_of_daemons() returns table (kind text, name text, rights text [])
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select 'table', c.oid::regclass::text, t.rights
    from (values
        ('{alembic_version, compatibility, segments, terms, watched, own_tables, changes, contents}'::name [], '{select}'::text []),
        ('{log, tombstones, grants, events}', '{select, insert}'),
        ('{batches}', '{select, insert, delete}'),
        ('{set_aside}', '{select, delete}'),
        ('{lease}', '{select, update}'),
        ('{canary, jobs}', '{select, insert, update}'),
        ('{dead_letters, presence_leases, people, users_present, acks}', '{select, insert, update, delete}')
    ) as t (names, rights)
    join pg_class as c on c.relnamespace = 'rowcast'::regnamespace and c.relname = any (t.names) and c.relkind in ('r', 'p', 'v')
    union all
    select 'sequence', 'rowcast.event_ids', '{usage}'
    union all
    select 'function', p.oid::regprocedure::text, '{execute}'
    from pg_proc as p
    where p.pronamespace = 'rowcast'::regnamespace and (p.proname = any ('{lease_holder, on_record, log_floor, segment_due,
        leave_segment, open_term, set_aside, reset_emptied, reset_vanished, reset_altered, purge, retire_segments, make_next_segment, drop_retired,
        is_readable, must_ring, ring, is_covered, may_read, snapshot_statement, filtered_rows, compared_columns,
        captured_columns, shape_of, definition_of, with_partitions, capture_triggers, outdated_captures, rights_of_daemons}'::name [])
        or p.proname ~ '^(snapshot|may_read)_[0-9]' and p.prosecdef)
$$;

-- The roles that rowcast.let_serve() was called for.
create or replace function rowcast.daemons() returns setof regrole
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select distinct a.grantee::regrole from pg_proc as p cross join lateral aclexplode(p.proacl) as a
    where p.oid = 'rowcast.rights_of_daemons()'::regprocedure and a.grantee not in (0, p.proowner)
$$;

-- Lets a role run daemons, which serve the packs in these schemas; `functions` are what they call there. It needs nothing
-- else: neither the tables of applications, nor the right to create anything.
create or replace function rowcast.let_serve(daemon regrole, schemas text [], functions text []) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    right_ record;
begin
    execute format('grant usage on schema rowcast to %s', daemon);
    for right_ in select * from rowcast.rights_of_daemons() loop
        execute format('grant %s on %s %s to %s', array_to_string(right_.rights, ', '), right_.kind, right_.name, daemon);
    end loop;
    for right_ in
        select format('schema %I', n.nspname) as name, 'usage' as rights from pg_namespace as n where n.nspname = any (schemas)
        union all
        select c.oid::regclass::text, 'select' from pg_class as c
        where c.oid = any (select to_regclass(format('%I.alembic_version', s.name)) from unnest(schemas) as s (name))
        union all
        select 'function ' || p.oid::regprocedure, 'execute' from pg_proc as p
        where p.oid::regproc::text = any (functions)
    loop
        execute format('grant %s on %s to %s', right_.rights, right_.name, daemon);
    end loop;
end
$$;

revoke all on function rowcast.rights_of_daemons(), rowcast.daemons(), rowcast.let_daemons_call(text),
    rowcast.let_serve(regrole, text [], text [])
from public;

-- An upgrade may have changed what daemons need, and how tables are captured and read.
select rowcast.let_serve(d.daemon, '{}', '{}') from rowcast.daemons() as d (daemon);
select rowcast.serve_again();
