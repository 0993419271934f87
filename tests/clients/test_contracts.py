"""The contracts that a daemon serves and the command line prints: valid, and what the daemon keeps to."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from daemon.contracts.typescript import type_of
from daemon.core.frames import RowChange
from daemon.packs import bundled
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, Frame, command, get, token
from tests.support.node import installed, typescript

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/clients"


def problems(asyncapi: Any, schema: Any, frames: list[Frame]) -> list[str]:
    """What the official parser of AsyncAPI finds, and the frames that are not valid under the schema."""
    contracts = json.dumps({"asyncapi": asyncapi, "schema": schema, "frames": frames})
    script = installed(HERE, "@asyncapi/parser", HERE / "contracts.mjs")
    done = subprocess.run(script, input=contracts, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


async def conversation(daemon: Daemon, chat: Chat) -> list[Frame]:
    """At least one frame of each kind that a daemon sends to a client, but for `bye`."""
    since = None
    frames: list[Frame] = []
    for numbers in ("json", "string"):
        async with daemon.client(chat.ada, since, id=1, numbers=numbers) as client:
            frames.append(client.welcome)
            frames.append(await client.subscribe("channel:none", id=2))
            frames.append(await client.subscribe(chat.topic))
            since = since or client.welcome["pos"]
            message = await chat.say("hello")
            await chat.sql.execute(
                "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', 2^40, 'u')",
                message,
            )
            await chat.sql.execute("update chatgenius.messages set deleted_at = now() where id = $1", message)
            frames += await client.until("changes")
            await client.say(op="ping")
            frames += await client.until("pong")
            await client.say(op="token", token=token(chat.ada))
            frames += await client.until("renewed")
            await client.say(op="unsubscribe", topic=chat.topic)
            frames += await client.until("unsubscribed")
            await client.say(op="subscribe", topic=chat.topic, snapshot=True)
            frames += await client.until("resumed")
            frames.append({"op": "head", "pos": client.welcome["pos"]})
    async with daemon.client(chat.ada) as client, daemon.client(chat.ada, device="other") as other:
        for each in (client, other):
            await each.subscribe(chat.topic, presence={"data": {"n": 1}})
            frames += await each.until("presence")
        await other.say(op="presence", topic=chat.topic, data={"n": 2})
        await other.say(op="signal", topic=chat.topic, name="typing", data={"on": True})
        frames += await client.until("signal")
        while "updated" not in frames[-1]:
            frames += await client.until("presence")
        await other.say(op="unsubscribe", topic=chat.topic)
        frames += await client.until("presence")
    async with daemon.client(chat.ada, "0:1") as client:
        await client.subscribe(chat.topic)
        frames += await client.until("reset")
        await chat.sql.execute("delete from chatgenius.channel_members where user_id = $1", chat.ada)
        frames += await client.until("revoked")
    return frames


async def test_the_served_contracts_are_valid_and_hold_for_what_is_sent(daemon: Daemon, chat: Chat) -> None:
    asyncapi, schema = [json.loads((await get(f"{daemon.http}/{name}.json"))[1]) for name in ("asyncapi", "schema")]
    frames = await conversation(daemon, chat)
    sent = {name.partition(".")[2] for name in asyncapi["components"]["messages"] if name.startswith("server.")}
    assert sent - {"bye"} == {frame["op"] for frame in frames}
    assert frames[0]["schema"] == schema["x-rowcast-schema"] == asyncapi["info"]["x-rowcast-schema"]
    with_rows = [frame for frame in frames if frame.get("changes") or frame.get("rows")]
    wrong = json.loads(json.dumps(with_rows).replace('"key": {', '"key": {"it": 7, '))
    assert len(wrong) == len(problems(asyncapi, schema, [*frames, *wrong]))


async def test_the_contracts_of_all_packs_together_are_valid() -> None:
    asyncapi, schema = [
        json.loads((await command("--pack", "all", "types", form))[1]) for form in ("--asyncapi", "--json-schema")
    ]
    assert [] == problems(asyncapi, schema, [{"op": "ping"}])
    rows = {f"{pack.name}.{table}" for pack in bundled().values() for table in pack.tables}
    assert rows <= schema["$defs"].keys()


@pytest.fixture
async def types() -> str:
    """What `daemon types --typescript` prints."""
    return (await command("types", "--typescript"))[1]


def test_the_compiler_accepts_a_client_with_the_types_that_are_printed(types: str, tmp_path: Path) -> None:
    options = "--noEmit --strict --target es2022 --module nodenext --lib es2022,dom,dom.iterable"
    compiler = typescript(ROOT / "clients/javascript")
    tests = tmp_path / "tests/clients"
    tests.mkdir(parents=True)
    (tmp_path / "clients").symlink_to(ROOT / "clients")
    (tests / "package.json").write_text('{"type": "module"}')
    (tests / "typed.ts").write_text((HERE / "typed.ts").read_text(encoding="utf-8"))
    (tests / "rowcast-types.ts").write_text(types)
    change = TypeAdapter(RowChange).json_schema()
    change["properties"]["meta"] = change["$defs"]["Meta"]
    (tests / "frames.ts").write_text(f"export type RowChange = {type_of(change)};\n")
    arguments = [*compiler, *options.split(), str(tests / "typed.ts")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert "" == done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["types"], 2, "choose --typescript"),
        (["types", "--typescript", "--numbers", "roman"], 2, "roman"),
        (["--pack", "nowhere", "types", "--typescript"], 64, 'There is no pack "nowhere"'),
    ],
)
async def test_the_command_says_in_one_line_what_is_wrong(arguments: list[str], code: int, expected: str) -> None:
    ended, output, errors = await command(*arguments)
    assert (code, "") == (ended, output)
    assert expected in errors.splitlines()[-1]
