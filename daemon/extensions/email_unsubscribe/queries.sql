-- The statements of store.py, by name. Where the pack lives in another schema, `email_unsubscribe` is replaced by that
-- schema's name.

-- name: excessive_privileges
-- What this session's role can do beyond its work in the schema: up to five of them, one a row. Whatever was granted to the
-- role itself counts; of what PUBLIC has, only what reaches the data of others or lets the role put something in their
-- way.
-- $1 schema text
with me as (
    select r.oid, r.rolname, r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolreplication, r.rolbypassrls
    from pg_catalog.pg_roles as r where r.rolname = current_user
), pack_schema as (
    select n.oid from pg_catalog.pg_namespace as n where n.nspname = $1
), dependencies as (
    select d.deptype, d.classid, d.objid, d.objsubid, coalesce(
        case d.classid
            when 'pg_catalog.pg_namespace'::regclass then d.objid
            when 'pg_catalog.pg_class'::regclass then (select c.relnamespace from pg_catalog.pg_class as c where c.oid = d.objid)
            when 'pg_catalog.pg_proc'::regclass then (select p.pronamespace from pg_catalog.pg_proc as p where p.oid = d.objid)
        end = (select pack_schema.oid from pack_schema), false) as in_schema
    from pg_catalog.pg_shdepend as d join me on me.oid = d.refobjid
    where d.refclassid = 'pg_catalog.pg_authid'::regclass and d.deptype in ('o', 'a') and not me.rolsuper
      and d.dbid in (0, (select b.oid from pg_catalog.pg_database as b where b.datname = current_database()))
), others as (
    select n.oid, n.nspname, pg_catalog.has_schema_privilege(me.oid, n.oid, 'usage') as usable
    from pg_catalog.pg_namespace as n cross join me
    where n.nspname <> $1 and n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and not me.rolsuper
)
select what
from me
cross join lateral (values
    (me.rolsuper, 'it is a superuser'), (me.rolcreaterole, 'it may create roles'),
    (me.rolcreatedb, 'it may create databases'), (me.rolreplication, 'it may replicate'),
    (me.rolbypassrls, 'it bypasses row security')
) as attribute (holds, what)
where attribute.holds
union all
select 'it is a member of ' || quote_ident(g.rolname)
from pg_catalog.pg_auth_members as m join me on me.oid = m.member join pg_catalog.pg_roles as g on g.oid = m.roleid
union all
select 'it may create objects in the schema'
from me cross join pack_schema
where not me.rolsuper and pg_catalog.has_schema_privilege(me.oid, pack_schema.oid, 'create')
union all
select 'it may create objects in schema ' || quote_ident(o.nspname)
from me cross join others as o where pg_catalog.has_schema_privilege(me.oid, o.oid, 'create')
union all
select 'PUBLIC has rights on ' || c.oid::regclass
from me cross join others as o join pg_catalog.pg_class as c on c.relnamespace = o.oid
where o.usable and not exists (select from dependencies as d where d.objid = c.oid) and case
    when c.relkind in ('r', 'p', 'v', 'm', 'f')
    then pg_catalog.has_any_column_privilege(me.oid, c.oid, 'select, insert, update, references')
         or pg_catalog.has_table_privilege(me.oid, c.oid, 'delete, truncate, trigger')
    when c.relkind = 'S' then pg_catalog.has_sequence_privilege(me.oid, c.oid, 'usage, select, update')
end
union all
select format('PUBLIC may execute %s with the rights of %s', p.oid::regprocedure, p.proowner::regrole)
from me cross join others as o join pg_catalog.pg_proc as p on p.pronamespace = o.oid
where o.usable and p.prosecdef and pg_catalog.has_function_privilege(me.oid, p.oid, 'execute')
  and not exists (select from dependencies as d where d.objid = p.oid)
union all
select 'PUBLIC has rights on foreign server ' || quote_ident(s.srvname)
from me cross join pg_catalog.pg_foreign_server as s
where not me.rolsuper and pg_catalog.has_server_privilege(me.oid, s.oid, 'usage')
  and not exists (select from dependencies as d where d.objid = s.oid)
union all
select 'PUBLIC has rights on large objects'
from me
where not me.rolsuper and exists (
    select from pg_catalog.pg_largeobject_metadata as l cross join lateral pg_catalog.aclexplode(l.lomacl) as x
    where x.grantee = 0
)
union all
select case d.deptype when 'o' then 'it owns ' else 'it has rights on ' end
       || pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)
from dependencies as d
where d.deptype = 'o'
   or not d.in_schema and not (
       d.classid = 'pg_catalog.pg_database'::regclass
       and d.objid = (select b.oid from pg_catalog.pg_database as b where b.datname = current_database())
   )
limit 5;

-- name: add_user
-- $1 subject
insert into email_unsubscribe.users (subject) values ($1) on conflict do nothing;

-- name: user_of
-- $1 subject
select u.id from email_unsubscribe.users as u where u.subject = $1;

-- name: begin_session
-- $1 id   $2 user's id
insert into email_unsubscribe.sessions (id, user_id, started_at) values ($1, $2, clock_timestamp()) on conflict do nothing;

-- name: session
-- $1 id
select s.id, s.user_id, s.started_at, s.ended_at, s.end_reason from email_unsubscribe.sessions as s where s.id = $1;

-- name: end_session
-- $1 id   $2 reason
update email_unsubscribe.sessions as s set ended_at = greatest(clock_timestamp(), s.started_at), end_reason = $2
where s.id = $1 and s.ended_at is null;

-- name: save_tokens
-- A provider sends a new refresh token only now and then; without one, the stored one is kept.
-- $1 account   $2 access token, encrypted   $3 refresh token, encrypted, or null   $4 expiry
insert into email_unsubscribe.oauth_tokens as t (account, access_token, refresh_token, expiry, encrypted_at)
values ($1, $2, $3, $4, clock_timestamp())
on conflict (account) do update
set access_token = excluded.access_token, refresh_token = coalesce(excluded.refresh_token, t.refresh_token),
    expiry = excluded.expiry, encrypted_at = excluded.encrypted_at;

-- name: tokens
-- $1 account
select t.access_token, t.refresh_token, t.expiry, t.encrypted_at
from email_unsubscribe.oauth_tokens as t where t.account = $1;

-- name: forget_tokens
-- $1 account
delete from email_unsubscribe.oauth_tokens as t where t.account = $1;

-- name: next_tokens
-- The rows are locked, so that the rotation does not overwrite tokens that are saved meanwhile.
-- $1 last account of the previous batch   $2 limit
select t.account, t.access_token, t.refresh_token
from email_unsubscribe.oauth_tokens as t where t.account > $1 order by t.account limit $2 for update;

-- name: replace_tokens
-- $1 account   $2 access token, encrypted   $3 refresh token, encrypted, or null
update email_unsubscribe.oauth_tokens as t
set access_token = $2, refresh_token = $3, encrypted_at = clock_timestamp()
where t.account = $1;

-- name: allow
-- $1 type   $2 value
insert into email_unsubscribe.allow_list (entry_type, value) values ($1, $2) on conflict do nothing;

-- name: allowed
-- $1 type   $2 value
select a.id, a.entry_type, a.value, a.created_at
from email_unsubscribe.allow_list as a
where a.entry_type = $1 and a.value = email_unsubscribe.normalised_entry($1, $2);

-- name: disallow
-- $1 type   $2 value
with deleted as (
    delete from email_unsubscribe.allow_list as a
    where a.entry_type = $1 and a.value = email_unsubscribe.normalised_entry($1, $2)
    returning 1
)
select count(*) from deleted;

-- name: allow_list
select a.id, a.entry_type, a.value, a.created_at
from email_unsubscribe.allow_list as a order by a.entry_type, a.value;

-- name: record_emails
-- $1 message ids   $2 senders   $3 when they were received
with inserted as (
    insert into email_unsubscribe.sender_emails (message_id, sender, received_at)
    select e.message_id, e.sender, e.received_at
    from unnest($1::text [], $2::text [], $3::timestamptz []) as e (message_id, sender, received_at)
    order by e.message_id
    on conflict do nothing
    returning 1
)
select count(*) from inserted;

-- name: sender
-- $1 address
select s.id, s.sender, s.first_seen, s.last_seen, s.unsubscribed_at, s.emails_after_unsubscribe
from email_unsubscribe.senders as s where s.sender = email_unsubscribe.normalised_address($1);

-- name: senders
-- $1 limit
select s.id, s.sender, s.first_seen, s.last_seen, s.unsubscribed_at, s.emails_after_unsubscribe
from email_unsubscribe.senders as s order by s.last_seen desc, s.id desc limit $1;

-- name: begin_attempt
-- $1 id   $2 sender   $3 URL   $4 method
insert into email_unsubscribe.unsubscribe_history (id, sender, unsubscribe_url, method, attempted_at)
values ($1, $2, $3, $4, clock_timestamp())
on conflict do nothing;

-- name: settle_attempt
-- $1 id   $2 status   $3 reason of the failure, or null
update email_unsubscribe.unsubscribe_history as h set status = $2, failure_reason = $3
where h.id = $1 and (h.status, h.failure_reason) is distinct from ($2, $3);

-- name: attempt
-- $1 id
select h.id, h.sender, h.unsubscribe_url, h.method, h.attempted_at, h.status, h.failure_reason
from email_unsubscribe.unsubscribe_history as h where h.id = $1;

-- name: history
-- $1 limit
select h.id, h.sender, h.unsubscribe_url, h.method, h.attempted_at, h.status, h.failure_reason
from email_unsubscribe.unsubscribe_history as h order by h.attempted_at desc, h.id desc limit $1;

-- name: audit
-- $1 limit
select a.id, a.occurred_at, a.action, a.db_role, a.sender, a.unsubscribe_url, a.method, a.outcome, a.entry_type,
       a.entry_value, a.user_id, a.session_id
from email_unsubscribe.audit_log as a order by a.occurred_at desc, a.id desc limit $1;
