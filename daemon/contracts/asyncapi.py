"""The protocol as an AsyncAPI document, version 3.0."""

from collections.abc import Iterable
from typing import Any, Final

from daemon import __version__
from daemon.contracts.schema import Schema, definitions, frames
from daemon.core.event_stream import MEMBERS_OF_HELLO, MEMBERS_OF_SUBSCRIBE
from daemon.packs import Pack, contract_hash

_SCHEMAS: Final = "#/components/schemas/"


def asyncapi(packs: Iterable[Pack]) -> Schema:
    """The document. Rows are those of the packs."""
    packs = list(packs)
    schemas = definitions(packs, _SCHEMAS)
    client, server = list(frames("client")), list(frames("server"))
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Rowcast",
            "version": __version__,
            "description": "The protocol rowcast.v1: committed changes in Postgres, and the rows that they lead to.",
            "x-rowcast-schema": contract_hash(packs),
        },
        "defaultContentType": "application/json",
        "channels": {
            "websocket": _channel("/v1", "A websocket with the subprotocol rowcast.v1.", [*client, *server]),
            "events": _channel("/v1/stream", "The same frames as server-sent events.", server),
        },
        "operations": {
            "receive": _operation("receive", "websocket", client, "What clients send."),
            "send": _operation("send", "websocket", server, "What the server sends."),
            "stream": _operation("send", "events", server, "What the server sends as events.")
            | {
                "security": [{"$ref": "#/components/securitySchemes/token"}],
                "bindings": {"http": {"method": "GET", "query": _query(schemas), "bindingVersion": "0.3.0"}},
            },
        },
        "components": {
            "messages": {name: _message(name, schemas[name]) for name in (*client, *server)},
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _channel(address: str, description: str, names: list[str]) -> Schema:
    messages = {name: {"$ref": f"#/components/messages/{name}"} for name in names}
    return {"address": address, "description": description, "messages": messages}


def _operation(action: str, channel: str, names: list[str], summary: str) -> Schema:
    return {
        "action": action,
        "summary": summary,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names],
    }


def _message(name: str, schema: Schema) -> dict[str, Any]:
    return {
        "name": name.partition(".")[2],
        "summary": schema["description"].partition("\n\n")[0].replace("\n", " "),
        "payload": {"$ref": _SCHEMAS + name},
    }


def _query(schemas: dict[str, Schema]) -> Schema:
    """What the request of an event stream may contain."""
    hello, subscribe = schemas["client.hello"]["properties"], schemas["client.subscribe"]["properties"]
    members = {name: hello[name] for name in sorted(MEMBERS_OF_HELLO)}
    members |= {name: subscribe[name] for name in sorted(MEMBERS_OF_SUBSCRIBE)}
    topics = {"type": "array", "items": subscribe["topic"], "minItems": 1}
    return {"type": "object", "properties": {"topic": topics, **members}, "required": ["topic"]}
