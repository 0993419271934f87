from typing import ClassVar

from pydantic import Field, create_model

from daemon.contracts.schema import definitions, frames, json_schema, tables_of
from daemon.core.wire import Subscribe
from daemon.packs import BigInt, Numeric, Pack, Row


class Line(Row):
    """A line of an order."""

    key: ClassVar[tuple[str, ...]] = ("order_id", "number")

    order_id: BigInt
    number: int
    price: Numeric | None


SHOP = Pack("shop", {"lines": Line}, ("lines",))


def test_exact_numbers_are_numbers_or_strings() -> None:
    columns = definitions([SHOP], "#/")["shop.lines"]["properties"]
    assert ["integer", "string"] == [part["type"] for part in columns["order_id"]["anyOf"]]
    assert ["number", "string", "null"] == [part["type"] for part in columns["price"]["anyOf"]]
    assert {"type": "integer"} == columns["number"]


def test_a_change_has_the_key_and_the_record_of_its_table() -> None:
    found = definitions([SHOP], "#/$defs/")
    base, tables = found["server.changes"]["properties"]["changes"]["items"]["allOf"]
    assert {"$ref": "#/$defs/server.RowChange"} == base
    [change] = tables["anyOf"]
    row, columns = change["properties"]["record"]["anyOf"]
    assert ("lines", {"$ref": "#/$defs/shop.lines"}) == (change["properties"]["table"]["const"], row)
    assert {"$ref": "#/$defs/shop.lines/properties/price"} == columns["properties"]["price"]
    assert "required" not in columns
    assert ["number", "order_id"] == change["properties"]["key"]["required"]


def test_without_tables_a_change_is_of_any_table() -> None:
    found = definitions([], "#/$defs/")
    assert {"$ref": "#/$defs/server.RowChange"} == found["server.changes"]["properties"]["changes"]["items"]


def test_each_member_of_a_frame_has_one_type_and_no_null() -> None:
    subscribe = definitions([], "#/$defs/")["client.subscribe"]
    assert set(Subscribe.model_fields) == set(subscribe["properties"])
    assert ["op", "topic"] == subscribe["required"]
    assert "null" not in str(subscribe)


def test_names_of_tables_are_those_that_components_may_have() -> None:
    odd = create_model("odd", __base__=Row, id=(str, Field(alias="ä/~")))
    odd.key = ("ä/~",)
    pack = Pack("public", {"my orders": odd, "my_orders": odd}, ())
    assert ["public.my_orders", "public.my_orders_"] == [table.name for table in tables_of([pack])]
    key = definitions([pack], "#/")["server.snapshot"]["anyOf"][0]["properties"]["rows"]["items"]["properties"]["key"]
    assert {"ä/~": {"$ref": "#/public.my_orders/properties/%C3%A4~1~0"}} == key["properties"]


def test_one_schema_covers_the_frames_of_both_sides() -> None:
    schema = json_schema([SHOP])
    names = {part["$ref"].removeprefix("#/$defs/") for part in schema["anyOf"]}
    assert {*frames("client"), *frames("server")} == names
    assert names <= schema["$defs"].keys()
