from typing import Any, ClassVar

import pytest
from pydantic import Field, create_model

from daemon.contracts.typescript import type_of, typescript
from daemon.core.change import Numbers
from daemon.packs import NUMBER, ULID, UUID, BigInt, JsonObject, Numeric, Pack, Row


class Rows(Row):
    """Rows with
    every kind of column */."""

    key: ClassVar[tuple[str, ...]] = ("id",)

    id: BigInt
    price: Numeric | None
    prices: list[Numeric]
    ids: list[BigInt] | None
    flags: list[bool | None]
    document: JsonObject
    added: str | None = None


def printed(*packs: Pack, numbers: Numbers = Numbers.JSON) -> list[str]:
    return typescript(packs, numbers).splitlines()


def test_a_column_has_the_type_of_its_values_in_the_form_that_the_client_asks_for() -> None:
    pack = Pack("shop", {"rows": Rows}, ("rows",))
    unusual = 'number | "NaN" | "Infinity" | "-Infinity"'
    assert {
        "  id: number;",
        f"  price: {unusual} | null;",
        f"  prices: ({unusual})[];",
        "  ids: number[] | null;",
        "  flags: (boolean | null)[];",
        "  document: Record<string, unknown>;",
        "  added?: string | null;",
    } <= set(printed(pack))
    assert {"  id: string;", "  price: string | null;", "  prices: string[];", "  ids: string[] | null;"} <= set(
        printed(pack, numbers=Numbers.STRING)
    )


def test_a_name_that_typescript_does_not_allow_is_quoted_or_changed() -> None:
    odd = create_model("odd", __base__=Row, column_0=(str, Field(alias='a"b')))
    lines = printed(Pack("public", {"my orders": odd, "2 lines": odd, "tables": odd, "order_lines": odd}, ()))
    assert '  "a\\"b": string;' in lines
    assert {
        '  "my orders": MyOrders;',
        '  "2 lines": _2Lines;',
        "  tables: PublicTables;",
        "  order_lines: OrderLines;",
    } <= set(lines)
    assert "export type Topic = never;" == lines[-1]


def test_equal_tables_of_two_packs_have_two_types() -> None:
    lines = printed(Pack("one", {"users": Rows}, ("users",)), Pack("two", {"users": Rows}, ("users", "all")))
    assert "  users: OneUsers | TwoUsers;" in lines
    assert ["export type Topic =", '  | "users"', '  | "all";'] == lines[-3:]


@pytest.mark.parametrize(
    ("pattern", "template"),
    [
        ("users", '"users"'),
        (f"channel:{ULID}", "`channel:${string}`"),
        (f"post:{UUID}", "`post:${string}`"),
        (f"owner:{NUMBER}:secret:{NUMBER}", "`owner:${string}:secret:${string}`"),
        (r"(?s:orders\-.*)", "`orders-${string}`"),
        (r"\$\{a\}`", '"\\\\${a}\\\\`"'),
        (r"a`.*", "`a\\`${string}`"),
        ("(?:a|b):c", "`${string}:c`"),
    ],
)
def test_the_topics_of_a_pattern_are_a_template(pattern: str, template: str) -> None:
    assert f"  | {template};" == printed(Pack("shop", {}, (pattern,)))[-1]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, "unknown"),
        ({"type": "array"}, "unknown[]"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "Record<string, string>"),
        ({"type": "object", "properties": {"a": {"const": True}}}, "{ a?: true }"),
    ],
)
def test_a_schema_that_allows_more_is_a_wider_type(schema: dict[str, Any], expected: str) -> None:
    assert expected == type_of(schema)
