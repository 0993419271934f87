"""The log in Postgres: sequencing, reading, rights, dead letters, retention."""
