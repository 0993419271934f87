"""Revisions that were applied somewhere stay as they are."""

import hashlib
from pathlib import Path

from daemon import files

HASHES = Path(__file__).with_name("revisions.sha256")
NEWEST = "sha256sum ddl/PACK/NNNN_*.{py,sql} >> tests/migration/revisions.sha256"


def recorded() -> dict[str, str]:
    lines = HASHES.read_text(encoding="utf-8").splitlines()
    return {path: digest for digest, path in (line.split("  ") for line in lines)}


def revision_files() -> dict[str, str]:
    """The hash of each file of a revision, by its path."""
    ddl = files.folder("ddl")
    return {
        f"ddl/{path.relative_to(ddl)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ddl.glob("*/[0-9]*")
        if path.is_file()
    }


def test_no_revision_is_edited_after_it_was_recorded() -> None:
    found = revision_files()
    changed = sorted(path for path, digest in recorded().items() if found.get(path) != digest)
    assert not changed, (
        f"{', '.join(changed)}: databases have been built from this file. Put it back, and write a new revision."
    )


def test_every_revision_is_recorded() -> None:
    missing = sorted(revision_files().keys() - recorded().keys())
    assert not missing, f"{', '.join(missing)}: once it is as it should stay, record it: {NEWEST}"
