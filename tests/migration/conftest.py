"""Fixtures for the tests of migrations."""

from pathlib import Path

import pytest

from tests.support.folders import Folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Folders with nothing but Rowcast's own history, which is one table here."""
    return Folders(tmp_path)
