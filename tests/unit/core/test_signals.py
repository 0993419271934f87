import json
from typing import Any

import pytest

from daemon.core import wire
from daemon.core.errors import ClientFault
from daemon.core.signals import MAX_MESSAGE, Assembler, Message, Signal, pieces

LONG = Message(
    signals=[
        Signal(
            topic="t",
            name="n",
            user="ada",
            data=json.dumps({"text": "é😀" * 4000}, ensure_ascii=False, separators=(",", ":")),
        ),
        Signal(topic="t", name="m", user=""),
    ],
    present=["a", "b"],
)
PIECES = pieces("one", 7, LONG)
NAMED: dict[str, Any] = {"topic": "t", "name": "n", "user": "ada"}


def _parsed(data: str) -> object:
    """The data of a signal with this text; None if no client may send it."""
    try:
        frame = wire.parse(f'{{"op":"signal","topic":"t","name":"n","data":{data}}}'.encode())
    except ClientFault:
        return None
    assert isinstance(frame, wire.Signal)
    return frame.data


def a_piece(**members: object) -> str:
    return json.dumps({"process": "one", "number": 1, "place": 0, "count": 1, "text": "e30="} | members)


def test_a_message_arrives_whole_in_pieces_that_a_notification_can_carry() -> None:
    assert len(PIECES) > 2
    assert all(piece.isascii() and len(piece) < 8000 for piece in PIECES)
    assembler = Assembler("two")
    assert [*[None] * (len(PIECES) - 1), LONG] == [assembler.add(piece) for piece in PIECES]


def test_the_largest_message_fits_into_its_pieces() -> None:
    message = Message(signals=[Signal(topic="t", name="n", user="ada", data=f'"{"x" * (MAX_MESSAGE - 200)}"')])
    assembler = Assembler("two")
    assert message == [assembler.add(piece) for piece in pieces("one", 1, message)][-1]


def test_the_data_of_any_signal_that_a_client_may_send_arrive_with_those_of_others() -> None:
    deepest = max(depth for depth in range(150, 250) if _parsed("[" * depth + "]" * depth) is not None)
    message = Message(signals=[Signal(**NAMED, data=data) for data in ("[" * deepest + "]" * deepest, "1")])
    assert [message] == [Assembler("two").add(piece) for piece in pieces("one", 1, message)]


def test_data_from_another_process_have_no_line_breaks() -> None:
    assert '{"a":[1,null]}' == Signal(**NAMED, data='{"a":\r\n[1,\n1e999]}').data


def test_a_process_ignores_its_own_pieces() -> None:
    assembler = Assembler("one")
    assert {None} == {assembler.add(piece) for piece in PIECES}


def test_an_incomplete_message_is_forgotten_and_the_next_one_arrives() -> None:
    assembler = Assembler("two")
    for cut in ((0, 2), (1,)):
        for place in cut[:-1]:
            assembler.add(PIECES[place])
        with pytest.raises(ValueError, match="missing"):
            assembler.add(PIECES[cut[-1]])
    assembler.add(PIECES[0])
    assert Message() == assembler.add(a_piece())
    with pytest.raises(ValueError, match="missing"):
        assembler.add(PIECES[1])
    assert LONG == [assembler.add(piece) for piece in PIECES][-1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        a_piece(count=0),
        a_piece(count=10**9),
        a_piece(place=-1),
        a_piece(place=1),
        a_piece(number="1"),
        a_piece(process=""),
        a_piece(text="é"),
        a_piece(text="!"),
        a_piece(text="AAAA"),
        a_piece(text="A" * 8000),
        a_piece(more=1),
        a_piece(text="eyJhIjoxfQ=="),
        *pieces("one", 1, Message.model_construct(signals=[Signal.model_construct(**NAMED, data="1,2")])),
        *pieces("one", 1, Message.model_construct(signals=[Signal.model_construct(**NAMED, data="[NaN]")])),
    ],
)
def test_what_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Assembler("two").add(text)
