-- The statements that begin a session. Until set_session has run, the search_path is that of the role or the database:
-- every name here is qualified, and there is no operator.

-- name: identify
select pg_catalog.pg_backend_pid() as pid, pg_catalog.pg_is_in_recovery() as in_recovery,
       pg_catalog.current_setting('transaction_read_only') as read_only,
       pg_catalog.current_setting('server_encoding') as encoding,
       pg_catalog.current_setting('is_superuser') as superuser;

-- name: set_session
-- $1 names text[]   $2 values text[]
select pg_catalog.set_config(s.name, s.value, false)
from rows from (pg_catalog.unnest($1::pg_catalog.text []), pg_catalog.unnest($2::pg_catalog.text [])) as s (name, value);
