"""A Postgres server of our own, as a child process."""
