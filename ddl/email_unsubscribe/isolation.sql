-- Revokes from PUBLIC what Postgres gives to every role of a database, so that the pack's login role has only its
-- schema. Not part of any revision, because other applications in the database may need it. Read it, then run it once
-- as a superuser: psql -X -v ON_ERROR_STOP=1 -f isolation.sql Afterwards, grant temporary tables and large objects to
-- the roles that need them.
do $$
begin
    execute format('revoke temporary on database %I from public', current_database());
    revoke create on schema public from public;  -- the default from PostgreSQL 15 on
    revoke execute on function pg_catalog.lo_creat(integer) from public;
    revoke execute on function pg_catalog.lo_create(oid) from public;
    revoke execute on function pg_catalog.lo_from_bytea(oid, bytea) from public;
end
$$;
