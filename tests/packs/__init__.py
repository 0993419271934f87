"""The bundled schemas, each in a real Postgres."""
