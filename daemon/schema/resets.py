"""Asks for resets: clients read the state of topics anew."""

from daemon.postgres.connect import Connection
from daemon.schema.queries import query


async def reset_table(connection: Connection, table: str) -> str | None:
    """Reset the pack of a captured table, qualified and quoted as SQL requires it. Returns the pack; None if unknown.

    The rights that the table's rows give end with it. Raises one of DRIVER_ERRORS.
    """
    pack: str | None = await connection.fetchval(query("reset_table"), table)
    return pack


async def reset_topic(connection: Connection, schema: str, topic: str) -> str | None:
    """Reset one topic of the pack in this schema. Returns the pack; None if it captures nothing.

    Raises one of DRIVER_ERRORS.
    """
    pack: str | None = await connection.fetchval(query("reset_topic"), schema, topic)
    return pack
