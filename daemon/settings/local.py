"""The database and the secret of a local `daemon up`, for other commands on the same machine."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from daemon.core.errors import OperatorFault
from daemon.files import write_private
from daemon.settings.model import Settings
from daemon.settings.parameters import parameters_of
from daemon.settings.values import Address


class DataDirUnusable(OperatorFault):
    """{path} cannot be used ({reason}): choose another directory with --data-dir."""

    exit_code: ClassVar[int] = 34

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


def connection_file(data_dir: Path) -> Path:
    """The file to which `up` writes its URLs, and the sample users with their tokens."""
    return data_dir / "connection.json"


def service_file(data_dir: Path) -> Path:
    """The file to which `up` writes the database for psql and other programs that use libpq: the service rowcast."""
    return data_dir / "pg_service.conf"


class Node(NamedTuple):
    """One of the nodes of a `daemon up`: what it is called, and where its pages for operators are."""

    name: str
    address: Address
    has_tls: bool = False

    @property
    def url(self) -> str:
        """The URL of its pages."""
        return f"{'https' if self.has_tls else 'http'}://{self.address}/"


@contextmanager
def remembered_nodes(data_dir: Path, nodes: Sequence[Node]) -> Iterator[None]:
    """Let `nodes_of` find these nodes until the block ends."""
    if nodes:
        write_private(
            _nodes_file(data_dir),
            json.dumps(
                {"pid": os.getpid(), "nodes": [[name, str(address), has_tls] for name, address, has_tls in nodes]}
            ),
        )
    try:
        yield
    finally:
        _nodes_file(data_dir).unlink(missing_ok=True)


def nodes_of(data_dir: Path) -> list[Node]:
    """The nodes of a `daemon up --nodes` that runs with this data directory, if one does. Raises DataDirUnusable."""
    found = json.loads(_read(_nodes_file(data_dir)) or "{}")
    try:
        os.kill(found["pid"], 0)
    except (KeyError, ProcessLookupError):
        return []  # it was killed, and could not remove the file
    except PermissionError:
        pass
    return [Node(name, Address.parse(address), has_tls) for name, address, has_tls in found["nodes"]]


def _nodes_file(data_dir: Path) -> Path:
    return data_dir / "nodes.json"


def as_service(dsn: str) -> str:
    """The text of a service file for the database of this URL."""
    url = urlsplit(dsn)
    places = [
        place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "")
        for place in url.netloc.rpartition("@")[2].split(",")
        if place
    ]
    found = {
        "host": ",".join(unquote(host).strip("[]") for host, _, _ in places),
        "port": ",".join(port for _, _, port in places).strip(","),
        "user": unquote(url.username or ""),
        "password": unquote(url.password or ""),
        "dbname": unquote(url.path.removeprefix("/")),
    }
    parameters = {name: value for name, value in found.items() if value}
    lines = (f"{name}={value}" for name, value in {**parameters_of(dsn), **parameters}.items())
    return "\n".join(["[rowcast]", *lines, ""])


def with_local_instance(settings: Settings) -> Settings:
    """The settings, completed with the database and the secret of a `daemon up` in the same data directory.

    Raises DataDirUnusable.
    """
    if settings.dsn is None and (found := _read(connection_file(settings.data_dir))):
        url = json.loads(found)["database_url"]
        settings = settings.model_copy(update={"database_url": SecretStr(url)})
    if settings.secret is None and (found := _read(settings.data_dir / "secret")):
        settings = settings.model_copy(update={"secret": SecretStr(found)})
    return settings


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataDirUnusable(path, error.strerror or str(error)) from None
