from collections.abc import AsyncIterator

import pytest

from tests.support.sshd import Sshd, running_sshd


@pytest.fixture(scope="module")
async def sshd() -> AsyncIterator[Sshd]:
    """A server that the tests of a module share. A test that stops it starts it again."""
    async with running_sshd() as server:
        yield server
