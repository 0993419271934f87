"""Rows of topics, for tests that ask for none."""

from daemon.core.change import Topic
from daemon.core.errors import LogUnavailable
from daemon.core.filters import Tables
from daemon.core.snapshot import Rows, Wanted


class NoColumns:
    """A ColumnReader without tables."""

    async def columns(self, topic: Topic) -> Tables:
        raise LogUnavailable(f"no columns of {topic}")


class NoRows:
    """A RowReader without tables."""

    async def read(self, wanted: Wanted) -> Rows:
        raise LogUnavailable(f"no rows of {wanted.topic}")
