"""The driver, asyncpg: connections, pools, errors, named statements. Nothing here knows what Rowcast stores."""
