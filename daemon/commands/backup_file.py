"""The file of a backup: SQL for psql, between a first line that describes it and a last one that proves it whole."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Final

from daemon.core.errors import OperatorFault

FORMAT: Final = 1
_FIRST: Final = b"-- Rowcast backup "
_LAST: Final = b"-- End of Rowcast backup, SHA-256 of all lines above: "
_LAST_LENGTH: Final = len(_LAST) + 64 + 1
_MAX_FIRST: Final = 64 * 1024  # bytes


class BackupUnusable(OperatorFault):
    """{path} cannot be restored ({reason}). Nothing was changed."""

    exit_code: ClassVar[int] = 65

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


@dataclass(frozen=True, slots=True)
class Description:
    """What a backup says about itself. `revisions` are those of the schemas in it."""

    postgres: int
    revisions: Mapping[str, str]
    format: int = FORMAT

    def line(self) -> bytes:
        """The first line of the file."""
        return _FIRST + json.dumps(asdict(self), sort_keys=True).encode() + b"\n"


def last_line(digest: str) -> bytes:
    """The last line of a file whose other lines have this SHA-256."""
    return _LAST + digest.encode() + b"\n"


def inspect(path: Path, progress: Callable[[int], None], chunk: int) -> tuple[Description, int]:
    """Read the whole file; its description, and the number of bytes before its last line. Raises BackupUnusable."""
    try:
        with path.open("rb") as file:
            description = _description(path, file.readline(_MAX_FIRST))
            length = path.stat().st_size - _LAST_LENGTH
            file.seek(max(0, length))
            last = file.read()
            if length <= 0 or not last.startswith(_LAST):
                raise BackupUnusable(path, "its end is missing")
            digest = hashlib.sha256()
            for part in parts(path, length, chunk):
                digest.update(part)
                progress(len(part))
    except OSError as error:
        raise BackupUnusable(path, error.strerror or str(error)) from None
    if last != last_line(digest.hexdigest()):
        raise BackupUnusable(path, "it is damaged: its checksum is wrong")
    return description, length


def parts(path: Path, length: int, chunk: int) -> Iterator[bytes]:
    """The first `length` bytes of a file, a chunk at a time. Raises OSError."""
    with path.open("rb") as file:
        while length > 0 and (part := file.read(min(chunk, length))):
            length -= len(part)
            yield part


def _description(path: Path, line: bytes) -> Description:
    if not line.startswith(_FIRST):
        raise BackupUnusable(path, "it was not written by this or a newer `daemon backup`")
    try:
        found = json.loads(line[len(_FIRST) :])
        if int(found["format"]) > FORMAT:
            raise BackupUnusable(path, "a newer version of Rowcast wrote it: upgrade Rowcast")
        return Description(int(found["postgres"]), dict(found["revisions"]), int(found["format"]))
    except (ValueError, KeyError, TypeError):
        raise BackupUnusable(path, "it is damaged: its first line") from None
