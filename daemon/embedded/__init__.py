"""The embedded Postgres: a server that runs as a child process."""
