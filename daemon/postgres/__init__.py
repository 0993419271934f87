"""Everything that speaks to Postgres: one driver, asyncpg, and the only floor that knows it."""
