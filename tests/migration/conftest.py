"""Fixtures for the tests of schemas and their histories."""

from pathlib import Path

import pytest

from tests.support.folders import Folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Empty but for Rowcast's own history, which is one table here."""
    return Folders(tmp_path)
