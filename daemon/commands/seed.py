"""`daemon seed`: loads the packs' sample data, for development; never in production."""

from typing import ClassVar

from daemon.core.errors import OperatorFault
from daemon.files import folder
from daemon.postgres.connect import Connection, connect
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.postgres.queries import named, split_statements
from daemon.schema import sql_files
from daemon.settings import Settings


class SeedRefused(OperatorFault):
    """Sample data is not allowed in production: use --no-demo, or correct ROWCAST_ENVIRONMENT."""

    exit_code: ClassVar[int] = 35


def statements(settings: Settings, name: str) -> list[str]:
    """The SQL in the file `name` of each configured pack that has one, for the pack's schema."""
    return [
        sql_files.read(path, pack=pack, schema=schema).text
        for pack, schema in settings.schemas.items()
        if (path := folder("ddl") / pack / name).is_file()
    ]


def demo_actions(settings: Settings) -> dict[str, str]:
    """What the sample users can do on the live page: SQL by name, of the configured packs."""
    found = (split_statements(text) for text in statements(settings, "demo_actions.sql"))
    return {name: named(text, f"demo_{name}") for actions in found for name, text in actions.items()}


async def seed(settings: Settings) -> list[dict[str, str]]:
    """Load the sample data, in one transaction.

    Returns the sample users, each with `id` and `name`. Raises SeedRefused and a DatabaseFault.
    """
    if settings.environment == "production":
        raise SeedRefused
    connection: Connection = await connect(
        settings.require_dsn(), application_name="rowcast seed", attempts=settings.connect_attempts
    )
    try:
        async with connection.transaction():
            for statement in statements(settings, "demo.sql"):
                await connection.execute(statement)
        rows = [row for text in statements(settings, "demo_users.sql") for row in await connection.fetch(text)]
    except DRIVER_ERRORS as error:
        raise explain(error, place=" in the sample data") from None
    finally:
        await connection.close()
    return [{"id": row["id"], "name": row["name"]} for row in rows]
