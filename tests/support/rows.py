"""Rows of topics, for tests that ask for none."""

from daemon.core.errors import LogUnavailable
from daemon.core.snapshot import Rows, Wanted


class NoRows:
    """A RowReader without tables."""

    async def read(self, wanted: Wanted) -> Rows:
        raise LogUnavailable(f"no rows of {wanted.topic}")
