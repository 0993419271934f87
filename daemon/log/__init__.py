"""The log as Postgres keeps it: sequencing, reading, rights, dead letters, retention."""
