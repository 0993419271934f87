"""`daemon reset`: makes clients read a topic, or all topics of a table's pack, anew."""

from collections.abc import Callable
from typing import ClassVar

from daemon.core.change import Topic
from daemon.core.errors import OperatorFault
from daemon.delivery.pack_router import OWN_TABLES, PackRouter
from daemon.packs import by_schema
from daemon.postgres.connect import SESSION, connect
from daemon.postgres.errors import DRIVER_ERRORS, address_of, explain
from daemon.schema.resets import reset_table, reset_topic
from daemon.settings import Settings


class NothingToReset(OperatorFault):
    """{target} is neither a captured table (write SCHEMA.TABLE) nor a topic of {packs} or of a table of yours."""

    exit_code: ClassVar[int] = 64

    def __init__(self, target: str, packs: str) -> None:
        self.target, self.packs = ascii(target), packs


async def reset(settings: Settings, target: str, report: Callable[[str], None]) -> None:
    """Reset a captured table's pack, or one topic. Raises an OperatorFault."""
    dsn = settings.require_dsn()
    router = PackRouter(by_schema(settings.schemas))
    connection = await connect(
        dsn, application_name="rowcast reset", server_settings=SESSION, attempts=settings.connect_attempts
    )
    try:
        if pack := await reset_table(connection, target):
            report(f"every topic of {pack} is reset")
            return
        schema = router.schema_of(Topic(target)) or OWN_TABLES
        if await reset_topic(connection, schema, target) is None:
            raise NothingToReset(target, ", ".join(settings.packs) or "a pack")
        report(f"{target} is reset")
    except DRIVER_ERRORS as error:
        raise explain(error, address=address_of(dsn)) from None
    finally:
        connection.terminate()
