"""Access to Postgres through asyncpg: connections, pools, errors, named statements. Knows nothing of the log."""
