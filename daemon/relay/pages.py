"""The question with which a gateway has a member answer a request of HTTP: what only a database can tell, or do."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from daemon.relay.codec import Message
from daemon.relay.port_questions import Question


class PageCall(NamedTuple):
    """A request that a gateway has let in. `is_local`: its peer is on the machine of the gateway."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    is_local: bool
    body: bytes


class PageAnswer(NamedTuple):
    """The response of the member."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    body: bytes


PAGE: Final = Question(
    "page",
    Message[PageCall](
        tuple[str, str, str, dict[str, str], bool],
        lambda call: (call[:-1], [call.body]),
        lambda head, body: PageCall._make([*head, body]),
    ),
    Message[PageAnswer](
        tuple[int, str, dict[str, str]],
        lambda page: (page[:-1], [page.body]),
        lambda head, body: PageAnswer._make([*head, body]),
    ),
)
