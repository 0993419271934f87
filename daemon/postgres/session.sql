-- The statements that begin a session. Until set_session has run, the search_path is that of the role or the database:
-- every name here is qualified, and there is no operator.

-- name: set_session
-- $1 names text[]   $2 values text[]
select pg_catalog.set_config(s.name, s.value, false)
from rows from (pg_catalog.unnest($1::pg_catalog.text []), pg_catalog.unnest($2::pg_catalog.text [])) as s (name, value);
