-- What a schema contains, for the comparison of a live schema with one that was just built from the files.

-- name: describe
-- One row for each property of each object. `property` is empty in the row that stands for the object itself. `mend` is
-- the statement that gives an object this property, or makes the object; `undo` removes an object that should not be
-- there, and is null where additions are nobody's business. Partitions come and go, captures have their own check, and
-- extensions' objects are not ours: none of these are described. The order is that in which the objects were made, so
-- that statements can be run in it.
-- $1 schema, text   $2 who owns what the owner of the schema's history owns, text, quoted
with space as (
    select n.oid, n.nspname as name,
           (select c.relowner from pg_class as c where c.relnamespace = n.oid and c.relname = 'alembic_version') as owner
    from pg_namespace as n where n.nspname = $1
), foreign_object as (
    select d.classid, d.objid from pg_depend as d where d.deptype = 'e'
), capture as (
    select p.oid from pg_proc as p
    where p.proname ~ '^(capture|snapshot)_[0-9]+_'
      and exists (select from pg_class as c where c.relnamespace = p.pronamespace and c.relname = 'watched')
), relation as (
    select format('%I.%I', s.name, c.relname) as name, c.*,
           case c.relkind when 'v' then 'view ' when 'm' then 'materialized view ' else 'table ' end
           || format('%I.%I', s.name, c.relname) as object
    from pg_class as c join space as s on s.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'f', 'v', 'm') and not c.relispartition
      and not exists (select from foreign_object as e where (e.classid, e.objid) = ('pg_class'::regclass, c.oid))
), attribute as (
    select r.name as relation, r.object as part_of, format('column %s.%I', r.name, a.attname) as object, a.*,
           quote_ident(a.attname) as name, r.relkind,
           format_type(a.atttypid, a.atttypmod)
           || case when a.attcollation <> t.typcollation then ' collate ' || a.attcollation::regcollation else '' end as type,
           case when a.attgenerated = '' then pg_get_expr(d.adbin, d.adrelid) end as default_value,
           case when a.attgenerated <> '' then pg_get_expr(d.adbin, d.adrelid) end as expression,
           case a.attidentity when 'a' then 'always' when 'd' then 'by default' else 'none' end as identity
    from relation as r
    join pg_attribute as a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
    join pg_type as t on t.oid = a.atttypid
    left join pg_attrdef as d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    where r.relkind in ('r', 'p', 'f')
), definition as (
    select a.*,
           a.name || ' ' || a.type || coalesce(' default ' || a.default_value, '')
           || coalesce(' generated always as (' || a.expression || ') stored', '')
           || case when a.identity <> 'none' then format(' generated %s as identity', a.identity) else '' end
           || case when a.attnotnull then ' not null' else '' end as text
    from attribute as a
), type as (
    select 'type ' || format('%I.%I', s.name, t.typname) as object, format('%I.%I', s.name, t.typname) as name, t.*
    from pg_type as t join space as s on s.oid = t.typnamespace
    where (t.typtype in ('e', 'd') or (t.typtype = 'c' and exists (
            select from pg_class as c where c.oid = t.typrelid and c.relkind = 'c'
        )))
      and not exists (select from foreign_object as e where (e.classid, e.objid) = ('pg_type'::regclass, t.oid))
), constrained as (
    select coalesce(r.object, t.object) as part_of,
           format('constraint %s on %s', quote_ident(c.conname), coalesce(r.name, t.name)) as object,
           format('alter %s %s', case when r.oid is null then 'domain' else 'table' end, coalesce(r.name, t.name)) as alter_it,
           quote_ident(c.conname) as name, c.*,
           regexp_replace(pg_get_constraintdef(c.oid), ' NOT VALID$', '') as definition
    from pg_constraint as c
    left join relation as r on r.oid = c.conrelid left join type as t on t.oid = c.contypid
    where coalesce(r.oid, t.oid) is not null and c.contype in ('c', 'f', 'p', 'u', 'x') and c.conparentid = 0
), indexed as (
    select r.object as part_of, format('index %I.%I', s.name, c.relname) as object, format('%I.%I', s.name, c.relname) as name,
           i.indexrelid, i.indisunique, i.indisvalid and i.indisready as valid,
           -- Without its own index, each partition would keep the one of a partitioned table invalid.
           replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON ') as definition
    from pg_index as i join relation as r on r.oid = i.indrelid
    join pg_class as c on c.oid = i.indexrelid cross join space as s
    where not exists (select from pg_constraint as k where k.conindid = i.indexrelid and k.contype in ('p', 'u', 'x'))
), numbered as (
    select 'sequence ' || format('%I.%I', s.name, c.relname) as object, format('%I.%I', s.name, c.relname) as name,
           c.oid, d.deptype is not distinct from 'i' as is_identity,
           case when d.deptype = 'a' then format('%s.%I', d.refobjid::regclass, a.attname) else 'none' end as owned_by,
           format('as %s increment by %s minvalue %s maxvalue %s start with %s cache %s %scycle', q.seqtypid::regtype,
                  q.seqincrement, q.seqmin, q.seqmax, q.seqstart, q.seqcache, case when q.seqcycle then '' else 'no ' end)
               as definition
    from pg_sequence as q join pg_class as c on c.oid = q.seqrelid join space as s on s.oid = c.relnamespace
    left join pg_depend as d on d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype in ('a', 'i')
         and d.refclassid = 'pg_class'::regclass
    left join pg_attribute as a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
), routine as (
    select format('%s %I.%I(%s)', case p.prokind when 'p' then 'procedure' else 'function' end, s.name, p.proname,
                  pg_get_function_identity_arguments(p.oid)) as object, p.*,
           case when p.prokind in ('f', 'p') then pg_get_functiondef(p.oid) end as definition,
           case when p.proowner = s.owner then $2 else quote_ident(p.proowner::regrole::text) end as owner
    from pg_proc as p join space as s on s.oid = p.pronamespace
    where not exists (select from capture as c where c.oid = p.oid)
      and not exists (select from foreign_object as e where (e.classid, e.objid) = ('pg_proc'::regclass, p.oid))
), described (made, object, part_of, property, value, mend, undo) as (
    select t.oid, t.object, null, f.property, f.value, f.mend, null
    from type as t
    cross join lateral (values
        ('', '', case t.typtype
            when 'e' then format('create type %s as enum (%s)', t.name,
                                 (select string_agg(quote_literal(e.enumlabel), ', ' order by e.enumsortorder)
                                  from pg_enum as e where e.enumtypid = t.oid))
            when 'd' then format('create domain %s as %s', t.name, format_type(t.typbasetype, t.typtypmod))
            else format('create type %s as (%s)', t.name,
                        (select string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', '
                                           order by a.attnum)
                         from pg_attribute as a where a.attrelid = t.typrelid and not a.attisdropped)) end),
        ('labels', case when t.typtype = 'e' then
            (select json_agg(e.enumlabel order by e.enumsortorder)::text from pg_enum as e where e.enumtypid = t.oid) end,
            (select string_agg(format('alter type %s add value if not exists %L%s', t.name, l.label,
                                      ' after ' || quote_literal(l.previous)), '; ' order by l.place)
             from (select e.enumlabel as label, e.enumsortorder as place,
                          lag(e.enumlabel) over (order by e.enumsortorder) as previous
                   from pg_enum as e where e.enumtypid = t.oid) as l)),
        ('attributes', case when t.typtype = 'c' then
            (select string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' order by a.attnum)
             from pg_attribute as a where a.attrelid = t.typrelid and not a.attisdropped) end, null),
        ('base type', case when t.typtype = 'd' then format_type(t.typbasetype, t.typtypmod) end, null),
        ('default', case when t.typtype = 'd' then coalesce(t.typdefault, 'none') end,
            format('alter domain %s %s', t.name, coalesce('set default ' || t.typdefault, 'drop default'))),
        ('not null', case when t.typtype = 'd' then t.typnotnull::text end,
            format('alter domain %s %s not null', t.name, case when t.typnotnull then 'set' else 'drop' end))
    ) as f (property, value, mend)
    union all
    select q.oid, q.object, null, f.property, f.value, f.mend, null
    from numbered as q
    cross join lateral (values
        ('', case when not q.is_identity then '' end, format('create sequence %s %s', q.name, q.definition)),
        ('definition', q.definition, format('alter sequence %s %s', q.name, q.definition)),
        ('owner column', case when not q.is_identity then q.owned_by end, format('alter sequence %s owned by %s', q.name, q.owned_by))
    ) as f (property, value, mend)
    union all
    select r.oid, r.object, null, f.property, f.value, f.mend, null
    from relation as r
    cross join lateral (values
        ('', '', case r.relkind
            when 'v' then format('create view %s%s as %s', r.name, ' with (' || array_to_string(r.reloptions, ', ') || ')',
                                 pg_get_viewdef(r.oid))
            when 'm' then format('create materialized view %s as %s', r.name, pg_get_viewdef(r.oid))
            else format('create %stable %s (%s)%s', case when r.relpersistence = 'u' then 'unlogged ' else '' end, r.name,
                        (select string_agg(d.text, ', ' order by d.attnum) from definition as d where d.attrelid = r.oid),
                        coalesce(' partition by ' || pg_get_partkeydef(r.oid), '')) end),
        ('definition', case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end,
            case when r.relkind = 'v' then format('create or replace view %s%s as %s', r.name,
                                                  ' with (' || array_to_string(r.reloptions, ', ') || ')',
                                                  pg_get_viewdef(r.oid)) end),
        ('options', case when r.relkind = 'v' then coalesce(array_to_string(r.reloptions, ', '), 'none') end,
            format('alter view %s %s', r.name,
                   coalesce('set (' || array_to_string(r.reloptions, ', ') || ')',
                            'reset (security_barrier, check_option)'))),
        ('owner', case when r.relkind in ('v', 'm') then
            case when r.relowner = (select s.owner from space as s) then $2 else quote_ident(r.relowner::regrole::text) end end,
            format('alter %s owner to %s', r.object, $2)),
        ('row security', case when r.relkind in ('r', 'p') then case when r.relrowsecurity then 'on' else 'off' end end,
            format('alter table %s %s row level security', r.name, case when r.relrowsecurity then 'enable' else 'disable' end)),
        ('forced row security',
            case when r.relkind in ('r', 'p') then case when r.relforcerowsecurity then 'on' else 'off' end end,
            format('alter table %s %s row level security', r.name, case when r.relforcerowsecurity then 'force' else 'no force' end)),
        ('persistence', case when r.relkind in ('r', 'm') then
            case r.relpersistence when 'u' then 'unlogged' else 'logged' end end,
            format('alter table %s set %s', r.name, case r.relpersistence when 'u' then 'unlogged' else 'logged' end)),
        ('replica identity', case when r.relkind in ('r', 'p') then
            case r.relreplident when 'f' then 'full' when 'n' then 'nothing' else 'default' end end,
            format('alter table %s replica identity %s', r.name,
                   case r.relreplident when 'f' then 'full' when 'n' then 'nothing' else 'default' end)),
        ('partition key', pg_get_partkeydef(r.oid), null)
    ) as f (property, value, mend)
    union all
    select d.attrelid, d.object, d.part_of, f.property, f.value, f.mend,
           case when d.attnotnull and d.default_value is null and d.expression is null and d.identity = 'none'
                then format('alter table %s alter column %s drop not null', d.relation, d.name) end
    from definition as d
    cross join lateral (values
        ('', '', format('alter table %s add column %s', d.relation, d.text)),
        ('type', d.type, format('alter table %s alter column %s type %s using %s::%s', d.relation, d.name, d.type, d.name,
                                format_type(d.atttypid, d.atttypmod))),
        ('not null', case when d.attnotnull then 'not null' else 'nullable' end,
            format('alter table %s alter column %s %s not null', d.relation, d.name,
                   case when d.attnotnull then 'set' else 'drop' end)),
        ('default', coalesce(d.default_value, 'none'),
            format('alter table %s alter column %s %s', d.relation, d.name,
                   coalesce('set default ' || d.default_value, 'drop default'))),
        ('expression', coalesce(d.expression, 'none'),
            format('alter table %s drop column %s, add column %s', d.relation, d.name, d.text)),
        ('identity', d.identity,
            format('alter table %s alter column %s ', d.relation, d.name)
            || case when d.identity = 'none' then 'drop identity'
                    else format('drop identity if exists, alter column %s add generated %s as identity', d.name, d.identity) end)
    ) as f (property, value, mend)
    union all
    select c.oid, c.object, c.part_of, f.property, f.value, f.mend,
           format('%s drop constraint %s', c.alter_it, c.name)
    from constrained as c
    cross join lateral (values
        ('', '', format('%s add constraint %s %s', c.alter_it, c.name, c.definition)),
        ('definition', c.definition,
            case when c.conrelid <> 0
                 then format('%s drop constraint %s, add constraint %s %s', c.alter_it, c.name, c.name, c.definition)
                 else format('%s drop constraint %s; %s add constraint %s %s', c.alter_it, c.name, c.alter_it, c.name, c.definition)
                 end),
        ('validity', case when c.convalidated then 'valid' else 'not valid' end,
            format('%s validate constraint %s', c.alter_it, c.name)),
        ('triggers', case when c.contype = 'f' then
            case when exists (select from pg_trigger as g where g.tgconstraint = c.oid and g.tgenabled <> 'O')
                 then 'disabled' else 'enabled' end end,
            format('alter table %s enable trigger all; alter table %s enable trigger all', c.conrelid::regclass,
                   nullif(c.confrelid, 0)::regclass))
    ) as f (property, value, mend)
    union all
    select i.indexrelid, i.object, i.part_of, f.property, f.value, f.mend, case when i.indisunique then 'drop index ' || i.name end
    from indexed as i
    cross join lateral (values
        ('', '', i.definition),
        ('definition', i.definition, format('drop index %s; %s', i.name, i.definition)),
        ('validity', case when i.valid then 'valid' else 'invalid' end, 'reindex index ' || i.name)
    ) as f (property, value, mend)
    union all
    select p.oid, p.object, null, f.property, f.value, coalesce(f.mend, p.definition), null
    from routine as p join pg_language as l on l.oid = p.prolang
    cross join lateral (values
        ('', '', null),
        ('result', coalesce(pg_get_function_result(p.oid), 'none'), 'drop ' || p.object || '; ' || p.definition),
        ('arguments', pg_get_function_arguments(p.oid), null),
        ('language', l.lanname::text, null),
        ('volatility', case p.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end, null),
        ('parallel safety', p.proparallel::text, null),
        ('strictness', case when p.proisstrict then 'strict' else 'called on null input' end, null),
        ('leakproofness', case when p.proleakproof then 'leakproof' else 'not leakproof' end, null),
        ('security', case when p.prosecdef then 'definer' else 'invoker' end, null),
        ('settings', coalesce(array_to_string(p.proconfig, ', '), 'none'), null),
        ('body', coalesce(pg_get_function_sqlbody(p.oid), p.prosrc), null),
        ('owner', p.owner, format('alter %s owner to %s', p.object, p.owner))
    ) as f (property, value, mend)
    union all
    select g.oid, format('trigger %I on %s', g.tgname, r.name), r.object, f.property, f.value, f.mend,
           case when g.tgname = 'rowcast_soft_deletes'
                     or exists (select from pg_class as w where w.relnamespace = r.relnamespace and w.relname = 'watched')
                then format('drop trigger %I on %s', g.tgname, r.name) end
    from pg_trigger as g join relation as r on r.oid = g.tgrelid
    cross join lateral (values
        ('', '', pg_get_triggerdef(g.oid)),
        ('definition', pg_get_triggerdef(g.oid), format('drop trigger %I on %s; %s', g.tgname, r.name, pg_get_triggerdef(g.oid))),
        ('state', case g.tgenabled when 'O' then 'enabled' when 'D' then 'disabled' when 'R' then 'enabled for replicas only'
                       else 'always enabled' end,
            format('alter table %s %s trigger %I', r.name,
                   case g.tgenabled when 'O' then 'enable' when 'D' then 'disable' when 'R' then 'enable replica'
                        else 'enable always' end, g.tgname))
    ) as f (property, value, mend)
    where not g.tgisinternal and g.tgparentid = 0 and not exists (select from capture as c where c.oid = g.tgfoid)
    union all
    select w.oid, format('rule %I on %s', w.rulename, r.name), r.object, f.property, f.value, f.mend,
           format('drop rule %I on %s', w.rulename, r.name)
    from pg_rewrite as w join relation as r on r.oid = w.ev_class
    cross join lateral (values
        ('', '', pg_get_ruledef(w.oid)),
        ('definition', pg_get_ruledef(w.oid), replace(pg_get_ruledef(w.oid), 'CREATE RULE', 'CREATE OR REPLACE RULE')),
        ('state', case w.ev_enabled when 'O' then 'enabled' when 'D' then 'disabled' else 'enabled differently' end,
            format('alter table %s enable rule %I', r.name, w.rulename))
    ) as f (property, value, mend)
    where w.rulename <> '_RETURN'
    union all
    select p.oid, format('policy %I on %s', p.polname, r.name), r.object, f.property, f.value, f.mend, null
    from pg_policy as p join relation as r on r.oid = p.polrelid
    cross join lateral (
        select format('create policy %I on %s as %s for %s to %s', p.polname, r.name,
                      case when p.polpermissive then 'permissive' else 'restrictive' end,
                      case p.polcmd when 'r' then 'select' when 'a' then 'insert' when 'w' then 'update'
                                    when 'd' then 'delete' else 'all' end,
                      (select string_agg(case when u = 0 then 'public' else u::regrole::text end, ', ' order by u)
                       from unnest(p.polroles) as u))
               || coalesce(' using (' || pg_get_expr(p.polqual, p.polrelid) || ')', '')
               || coalesce(' with check (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', '') as definition
    ) as d
    cross join lateral (values
        ('', '', d.definition),
        ('definition', d.definition, format('drop policy %I on %s; %s', p.polname, r.name, d.definition))
    ) as f (property, value, mend)
    union all
    select x.oid, format('statistics %I.%I', s.name, x.stxname), null, f.property, f.value, f.mend, null
    from pg_statistic_ext as x join space as s on s.oid = x.stxnamespace
    cross join lateral (values
        ('', '', pg_get_statisticsobjdef(x.oid)),
        ('definition', pg_get_statisticsobjdef(x.oid),
            format('drop statistics %I.%I; %s', s.name, x.stxname, pg_get_statisticsobjdef(x.oid)))
    ) as f (property, value, mend)
)
select d.object, d.part_of, d.property, d.value, d.mend, d.undo
from described as d where d.value is not null
order by d.made, d.object, d.property;

-- name: grants
-- One row for each object, or column of one, and each role other than its owner that has privileges on it.
-- $1 schema, text
with space as (
    select n.* from pg_namespace as n where n.nspname = $1
), acl (object, target, column_name, owner, items) as (
    select 'schema ' || quote_ident(s.nspname), 'schema ' || quote_ident(s.nspname), null, s.nspowner,
           coalesce(s.nspacl, acldefault('n', s.nspowner))
    from space as s
    union all
    select case c.relkind when 'v' then 'view ' when 'm' then 'materialized view ' when 'S' then 'sequence ' else 'table ' end
           || format('%I.%I', s.nspname, c.relname),
           case c.relkind when 'S' then 'sequence ' else 'table ' end || format('%I.%I', s.nspname, c.relname), null, c.relowner,
           coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's'::"char" else 'r' end, c.relowner))
    from pg_class as c join space as s on s.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'f', 'v', 'm', 'S') and not c.relispartition
    union all
    select format('column %I.%I.%I', s.nspname, c.relname, a.attname), format('table %I.%I', s.nspname, c.relname),
           quote_ident(a.attname), c.relowner, a.attacl
    from pg_class as c join space as s on s.oid = c.relnamespace
    join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attacl is not null
    where not c.relispartition
    union all
    select format('%s %I.%I(%s)', case p.prokind when 'p' then 'procedure' else 'function' end, s.nspname, p.proname,
                  pg_get_function_identity_arguments(p.oid)),
           format('%s %I.%I(%s)', case p.prokind when 'p' then 'procedure' else 'function' end, s.nspname, p.proname,
                  pg_get_function_identity_arguments(p.oid)),
           null, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner))
    from pg_proc as p join space as s on s.oid = p.pronamespace
    where not (p.proname ~ '^(capture|snapshot)_[0-9]+_'
               and exists (select from pg_class as c where c.relnamespace = s.oid and c.relname = 'watched'))
)
select a.object, a.target, a.column_name,
       case when x.grantee = 0 then 'public' else quote_ident(x.grantee::regrole::text) end as grantee,
       array_agg(distinct lower(x.privilege_type)) as privileges
from acl as a cross join lateral aclexplode(a.items) as x
where x.grantee <> a.owner
group by a.object, a.target, a.column_name, x.grantee
order by a.object, 4;

-- name: watches
-- The tables of a schema that are watched, and how. `the_rowcast` is the schema with the table `watched`.
-- $1 schema, text
select format('%I.%I', w.schema_name, w.table_name) as name, w.topic, w.columns::text as columns, w.key::text as key,
       coalesce(w.soft_delete, 'none') as soft_delete, coalesce(w.revokes, 'none') as revokes,
       coalesce(to_jsonb(w) ->> 'rows', 'none') as rows, w.pack, w.model
from the_rowcast.watched as w
where w.schema_name = $1 and w.function_name is not null
order by w.table_name;

-- name: wanted_extensions
-- $1 schema, text
select x.name::text as name from the_rowcast.extensions as x where x.wanted_by = $1 order by x.name;

-- name: extensions
select e.extname::text as name from pg_extension as e;

-- name: roles
-- The roles, and those to which this session's role grants privileges on everything that it creates.
select quote_ident(r.rolname) as name, exists (
    select from pg_default_acl as d cross join lateral aclexplode(d.defaclacl) as x
    where d.defaclnamespace = 0 and d.defaclrole = current_user::regrole and x.grantee = r.oid
) as by_default
from pg_roles as r;

-- name: history_owner
-- $1 the version table
select quote_ident(pg_get_userbyid(c.relowner)) as owner from pg_class as c where c.oid = $1::text::regclass;

-- name: may_create_schema
select has_database_privilege(current_database(), 'CREATE');

-- name: instead_of
-- Says for which schema the files are run in another. A file that names a role after its schema needs to know.
-- $1 schema, text
select set_config('the_rowcast.instead_of', $1, true);

-- name: version_table
-- As Alembic creates it.
create table the_schema.alembic_version (
    version_num character varying(32) not null, constraint alembic_version_pkc primary key (version_num)
);

-- name: captures
-- The watched tables, and the bodies and settings of the functions that capture and read them, without the table's own oid.
-- Columns that some revisions lack are looked up by name.
select w.id, format('%I.%I', w.schema_name, w.table_name) as name, quote_ident(w.schema_name) as schema_name,
       quote_ident(w.table_name) as table_name, w.topic, w.columns::text [] as columns, w.key::text [] as key, w.soft_delete,
       w.revokes, w.pack, w.model, w.per_row, w.on_error, to_jsonb(w) ->> 'rows' as rows,
       concat(replace(p.prosrc, quote_literal(to_regclass(format('%I.%I', w.schema_name, w.table_name))::oid::text), 'own'),
              p.proconfig, s.prosrc, s.proconfig) as body
from rowcast.watched as w
join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = w.function_name and p.pronargs = 0
left join pg_proc as s on s.pronamespace = 'rowcast'::regnamespace and s.proname = to_jsonb(w) ->> 'snapshot_name'
where to_regclass(format('%I.%I', w.schema_name, w.table_name)) is not null
order by 2;

-- name: copy_table
-- Statements that make an empty copy of a table. Its foreign keys refer to copies of the tables that they refer to, since
-- a new reference would lock those out.
-- $1 table   $2 the schema for the copies
select format('create table %s.%I (like %s including all)%s', $2::text, c.relname, c.oid::regclass,
              ' partition by ' || pg_get_partkeydef(c.oid)) as statement
from pg_class as c where c.oid = $1::text::regclass
union all
select format('create table %1$s.%2$I (like %3$s, unique (%4$s)); alter table %1$s.%5$I add %6$s', $2::text,
              'referenced_' || row_number() over (order by f.conname), f.confrelid::regclass,
              (select string_agg(quote_ident(a.attname), ', ' order by k.n)
               from unnest(f.confkey) with ordinality as k (attnum, n)
               join pg_attribute as a on a.attrelid = f.confrelid and a.attnum = k.attnum),
              c.relname,
              replace(pg_get_constraintdef(f.oid), format(' REFERENCES %s(', f.confrelid::regclass),
                      format(' REFERENCES %s.%I(', $2::text, 'referenced_' || row_number() over (order by f.conname))))
from pg_constraint as f join pg_class as c on c.oid = f.conrelid
where f.conrelid = $1::text::regclass and f.contype = 'f' and f.conparentid = 0;

-- name: forget_watched
delete from the_rowcast.watched;

-- name: next_watch
-- Gives the next watched table this id, which is part of its function.
-- $1 id
select setval(pg_get_serial_sequence('the_rowcast.watched', 'id'), $1, false);

-- name: watch
-- $1 table
select the_rowcast.watch(
    $1::text::regclass, $2, $3::text [], $4::text [], $5, $6, pack => $7, model => $8, per_row => $9, on_error => $10,
    rows => $11
);

-- name: captured_body
-- $1 id
select concat(replace(p.prosrc, quote_literal(to_regclass(format('%I.%I', w.schema_name, w.table_name))::oid::text), 'own'),
              p.proconfig, s.prosrc, s.proconfig) from the_rowcast.watched as w
join pg_proc as p on p.pronamespace = 'the_rowcast'::regnamespace and p.proname = w.function_name
join pg_proc as s on s.pronamespace = 'the_rowcast'::regnamespace and s.proname = w.snapshot_name
where w.id = $1;
