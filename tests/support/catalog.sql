-- Every object of the given schemas, and the database's objects outside of schemas: one row per object, with its
-- name and definition. Positions and object ids are left out: they change when an object is created again.
-- $1 schemas text[]
with schemas as (
    select n.oid, n.nspname from pg_namespace as n where n.nspname = any ($1::text [])
), relations as (
    select format('%I.%I', s.nspname, c.relname) as name, c.*
    from pg_class as c join schemas as s on s.oid = c.relnamespace
), types as (
    select format('%I.%I', s.nspname, t.typname) as name, t.*
    from pg_type as t join schemas as s on s.oid = t.typnamespace
), described (what, facts) as (
    select 'schema ' || n.nspname,
           case when n.oid in (select s.oid from schemas as s)
                then jsonb_build_object('owner', n.nspowner::regrole, 'acl', n.nspacl,
                                        'comment', obj_description(n.oid, 'pg_namespace')) end
    from pg_namespace as n
    where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
    union all
    select 'extension ' || e.extname, jsonb_build_object('version', e.extversion, 'schema', e.extnamespace::regnamespace)
    from pg_extension as e
    union all
    select 'event trigger ' || e.evtname, to_jsonb(e) - 'oid' from pg_event_trigger as e
    union all
    select 'publication ' || p.pubname, to_jsonb(p) - 'oid' from pg_publication as p
    union all
    select format('default privileges %s %s %s', d.defaclrole::regrole, d.defaclnamespace::regnamespace, d.defaclobjtype),
           jsonb_build_object('acl', d.defaclacl)
    from pg_default_acl as d
    union all  -- all other objects in the schemas: operators, collations, text search, ...
    select 'object ' || pg_describe_object(d.classid, d.objid, d.objsubid), null
    from pg_depend as d join schemas as s on s.oid = d.refobjid
    where d.refclassid = 'pg_namespace'::regclass
    union all
    select 'relation ' || r.name,
           jsonb_build_object('kind', r.relkind, 'owner', r.relowner::regrole, 'acl', r.relacl, 'options', r.reloptions,
                              'persistence', r.relpersistence, 'row security', r.relrowsecurity,
                              'forced', r.relforcerowsecurity, 'identity', r.relreplident,
                              'partition', pg_get_expr(r.relpartbound, r.oid), 'partitioned by', pg_get_partkeydef(r.oid),
                              'parents', (select array_agg(i.inhparent::regclass::text order by i.inhseqno)
                                          from pg_inherits as i where i.inhrelid = r.oid),
                              'comment', obj_description(r.oid, 'pg_class'),
                              'view', case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end)
    from relations as r
    union all
    select format('column %s.%I', r.name, a.attname),
           jsonb_build_object('place', row_number() over (partition by r.oid order by a.attnum),
                              'type', format_type(a.atttypid, a.atttypmod), 'not null', a.attnotnull,
                              'default', pg_get_expr(d.adbin, d.adrelid),
                              'collation', nullif(a.attcollation, 0)::regcollation,
                              'identity', a.attidentity, 'generated', a.attgenerated, 'storage', a.attstorage,
                              'acl', a.attacl, 'options', a.attoptions, 'comment', col_description(r.oid, a.attnum))
    from relations as r join pg_attribute as a on a.attrelid = r.oid
    left join pg_attrdef as d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    where a.attnum > 0 and not a.attisdropped
    union all
    select format('constraint %s on %s', quote_ident(c.conname), coalesce(r.name, t.name)),
           jsonb_build_object('definition', pg_get_constraintdef(c.oid), 'valid', c.convalidated,
                              'comment', obj_description(c.oid, 'pg_constraint'))
    from pg_constraint as c left join relations as r on r.oid = c.conrelid left join types as t on t.oid = c.contypid
    where coalesce(r.oid, t.oid) is not null
    union all
    select 'index ' || r.name,
           jsonb_build_object('definition', pg_get_indexdef(i.indexrelid), 'valid', i.indisvalid, 'ready', i.indisready,
                              'clustered', i.indisclustered, 'replica identity', i.indisreplident)
    from pg_index as i join relations as r on r.oid = i.indexrelid
    union all
    select 'sequence ' || r.name, to_jsonb(s) - 'seqrelid' - 'seqtypid' || jsonb_build_object('type', s.seqtypid::regtype)
    from pg_sequence as s join relations as r on r.oid = s.seqrelid
    union all
    select format('trigger %I on %s', t.tgname, r.name),
           jsonb_build_object('definition', pg_get_triggerdef(t.oid), 'enabled', t.tgenabled)
    from pg_trigger as t join relations as r on r.oid = t.tgrelid
    where not t.tgisinternal
    union all
    select format('rule %I on %s', w.rulename, r.name), jsonb_build_object('definition', pg_get_ruledef(w.oid))
    from pg_rewrite as w join relations as r on r.oid = w.ev_class
    where w.rulename <> '_RETURN'
    union all
    select format('policy %I on %s', p.polname, r.name),
           jsonb_build_object('command', p.polcmd, 'permissive', p.polpermissive, 'roles', p.polroles::regrole [],
                              'using', pg_get_expr(p.polqual, p.polrelid), 'check', pg_get_expr(p.polwithcheck, p.polrelid))
    from pg_policy as p join relations as r on r.oid = p.polrelid
    union all
    select format('function %I.%I(%s)', s.nspname, p.proname, pg_get_function_identity_arguments(p.oid)),
           jsonb_build_object('definition', case when p.prokind in ('f', 'p') then pg_get_functiondef(p.oid) end,
                              'result', pg_get_function_result(p.oid), 'owner', p.proowner::regrole, 'acl', p.proacl,
                              'comment', obj_description(p.oid, 'pg_proc'))
    from pg_proc as p join schemas as s on s.oid = p.pronamespace
    union all
    select 'type ' || t.name,
           jsonb_build_object('kind', t.typtype, 'owner', t.typowner::regrole, 'acl', t.typacl,
                              'base', nullif(t.typbasetype, 0)::regtype, 'not null', t.typnotnull, 'default', t.typdefault,
                              'labels', (select array_agg(e.enumlabel order by e.enumsortorder)
                                         from pg_enum as e where e.enumtypid = t.oid),
                              'comment', obj_description(t.oid, 'pg_type'))
    from types as t
    union all
    select 'statistics ' || format('%I.%I', s.nspname, x.stxname),
           jsonb_build_object('definition', pg_get_statisticsobjdef(x.oid))
    from pg_statistic_ext as x join schemas as s on s.oid = x.stxnamespace
)
select d.what, coalesce(d.facts, '{}')::text as facts from described as d order by d.what;
