"""Which changes a pack accepts, and that its reasons reveal nothing of the changes it refuses."""

import json
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, create_model

from daemon.commands.up import example_topic
from daemon.core.change import Change, Kind, Seq, Topic
from daemon.core.json_text import replace_values
from daemon.packs import (
    BigInt,
    Date,
    JsonObject,
    Numeric,
    Pack,
    Row,
    Serial,
    Timestamp,
    Ulid,
    bundled,
    contract_hash,
)

ID = "01JH000000MSG0000000000001"
OTHER_ID = "01JH000000CHAN00000GENERA1"


class Note(Row):
    id: Ulid
    text: str
    colour: Literal["red", "blue"] | None
    weight: float
    count: int
    extra: JsonObject | None
    written_at: Timestamp


class Link(Row):
    key: ClassVar[tuple[str, ...]] = ("left", "right")

    left: Ulid
    right: Ulid
    since: Timestamp


PACK = Pack(name="sample", tables={"notes": Note, "links": Link}, topics=("notes",))

NOTE: dict[str, Any] = {
    "id": ID,
    "text": "hello",
    "colour": "red",
    "weight": 1.5,
    "count": 3,
    "extra": {"any": ["thing", 1, None]},
    "written_at": "2026-01-10T12:00:00.123456+00:00",
}
LINK = {"left": ID, "right": OTHER_ID, "since": "2026-01-10T12:00:00+00:00"}


def change(
    kind: Kind, *, table: str = "notes", key: object, record: object = None, model: str | None = None
) -> Change:
    """A change; its key and record are JSON texts, or values to encode."""
    return Change(
        seq=Seq(1),
        tx="1",
        at="2026-01-10T12:00:00.000000Z",
        schema="sample",
        table=table,
        topic=Topic("notes"),
        kind=kind,
        key=key if isinstance(key, str) else json.dumps(key),
        record=record if record is None or isinstance(record, str) else json.dumps(record),
        model=model,
    )


def problem_of_a_note(**members: object) -> str | None:
    return PACK.problem(change(Kind.INSERT, key={"id": ID}, record=NOTE | members))


@pytest.mark.parametrize("kind", [Kind.INSERT, Kind.UPDATE, Kind.RESTORE])
def test_a_change_with_a_complete_valid_record_is_accepted(kind: Kind) -> None:
    assert PACK.problem(change(kind, key={"id": ID}, record=NOTE)) is None
    assert PACK.problem(change(kind, table="links", key={"left": ID, "right": OTHER_ID}, record=LINK)) is None


@pytest.mark.parametrize("kind", [Kind.DELETE, Kind.LEAVE])
def test_a_change_that_removes_a_row_needs_only_its_key(kind: Kind) -> None:
    assert PACK.problem(change(kind, key={"id": ID})) is None


@pytest.mark.parametrize("kind", [Kind.TRUNCATE, Kind.LOST])
def test_a_change_of_the_whole_table_has_neither_key_nor_record(kind: Kind) -> None:
    assert PACK.problem(change(kind, key={})) is None
    assert "key: not_expected" == PACK.problem(change(kind, key={"id": ID}))
    assert "record: not_expected" == PACK.problem(change(kind, key={}, record=NOTE))


@pytest.mark.parametrize("kind", [Kind.INSERT, Kind.UPDATE, Kind.RESTORE])
def test_a_change_that_shows_a_row_needs_a_record(kind: Kind) -> None:
    assert "record: missing" == PACK.problem(change(kind, key={"id": ID}))


@pytest.mark.parametrize("kind", [Kind.DELETE, Kind.LEAVE])
def test_a_change_that_removes_a_row_must_not_show_its_content(kind: Kind) -> None:
    assert "record: not_expected" == PACK.problem(change(kind, key={"id": ID}, record=NOTE))


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_of_change_is_validated(kind: Kind) -> None:
    assert PACK.problem(change(kind, key="[]", record="[]")) is not None


def test_a_table_without_a_model_is_refused() -> None:
    assert "table: no_row_model" == PACK.problem(change(Kind.DELETE, table="secrets", key={"id": ID}))


def test_a_table_may_be_checked_by_the_model_of_another() -> None:
    assert PACK.problem(change(Kind.DELETE, table="notes_2026", key={"id": ID}, model="notes")) is None
    assert "table: no_row_model" == PACK.problem(change(Kind.DELETE, key={"id": ID}, model="secrets"))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ({}, "key: missing left"),
        ({"left": ID}, "key: missing right"),
        ({"left": ID, "right": ID, "since": "2026-01-10T12:00:00+00:00"}, "key: extra_forbidden"),
        ({"left": ID, "right": "01jh000000msg0000000000001"}, "key: string_pattern_mismatch right"),
        ({"left": None, "right": ID}, "key: string_type left"),
        ("", "key: json_invalid"),
        ("null", "key: model_type"),
        ([ID, ID], "key: model_type"),
    ],
)
def test_a_key_holds_exactly_the_key_columns(key: object, reason: str) -> None:
    assert reason == PACK.problem(change(Kind.DELETE, table="links", key=key))
    assert reason == PACK.problem(change(Kind.INSERT, table="links", key=key, record=LINK))


class Named(Row):
    key: ClassVar[tuple[str, ...]] = ("name", "number")

    name: str
    number: int
    size: int


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        ('{"name":"ada","number":5}', "ada", None),
        ('{"number": 5, "name": "ada"}', "ada", None),
        ('{"name":"a\\"d\\\\a","number":5}', 'a"d\\a', None),
        ('{"name":"a\\\\","number":5}', "a\\", None),
        ('{"name":"bob","number":6}', "ada", None),  # of another row, but one that may be a key
        ('{"name":"a","size":"b","number":5}', 'a","size":"b', "key: extra_forbidden"),
        ('{"name":"a","number":5,"size":1}', "a", "key: extra_forbidden"),
        ('{"name":"ada","number":"5"}', "ada", "key: int_type number"),
        ('{"name":"ada"}', "ada", "key: missing number"),
    ],
)
def test_a_key_is_valid_whether_or_not_it_looks_like_that_of_its_record(
    key: str, name: str, reason: str | None
) -> None:
    pack = Pack(name="sample", tables={"named": Named}, topics=("named",))
    written = change(Kind.INSERT, table="named", key=key, record={"name": name, "number": 5, "size": 1})
    assert reason == pack.problem(written)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"id": ID + "\n"}, "record: string_pattern_mismatch id"),
        ({"id": "8" + ID[1:]}, "record: string_pattern_mismatch id"),
        ({"id": ID[:-1] + "U"}, "record: string_pattern_mismatch id"),
        ({"text": None}, "record: string_type text"),
        ({"colour": "green"}, "record: literal_error colour"),
        ({"count": "3"}, "record: int_type count"),
        ({"count": 3.0}, "record: int_type count"),
        ({"count": True}, "record: int_type count"),
        ({"extra": ["a"]}, "record: dict_type extra"),
        ({"written_at": "Infinity"}, "record: string_pattern_mismatch written_at"),
        ({"written_at": "2026-01-10T12:00:00"}, "record: string_pattern_mismatch written_at"),
        ({"written_at": "2026-01-10 12:00:00+00"}, "record: string_pattern_mismatch written_at"),
        ({"written_at": "2026-01-10T12:00:00+00:00 AD"}, "record: string_pattern_mismatch written_at"),
        ({"written_at": "infinity\n"}, "record: string_pattern_mismatch written_at"),
        ({"written_at": 1768046400}, "record: string_type written_at"),
        ({"password": "hunter2"}, "record: extra_forbidden"),
    ],
)
def test_a_record_holds_valid_values_of_exactly_the_published_columns(
    members: dict[str, object], reason: str
) -> None:
    assert reason == problem_of_a_note(**members)


@pytest.mark.parametrize("column", NOTE)
def test_a_record_without_one_of_the_published_columns_is_refused(column: str) -> None:
    record = {name: value for name, value in NOTE.items() if name != column}
    assert f"record: missing {column}" == PACK.problem(change(Kind.INSERT, key={"id": ID}, record=record))


class Day(Row):
    key: ClassVar[tuple[str, ...]] = ("number",)

    number: Serial
    day: Date


DAY: dict[str, Any] = {"number": 1, "day": "2026-01-10"}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, None),
        ({"number": 2**31 - 1}, None),
        ({"number": 0}, None),
        ({"number": -(2**31)}, None),
        ({"number": 2**31}, "key: less_than_equal number"),
        ({"number": "1"}, "key: int_type number"),
        ({"number": True}, "key: int_type number"),
        ({"day": "infinity"}, None),
        ({"day": "-infinity"}, None),
        ({"day": "0044-03-15 BC"}, None),
        ({"day": "12026-01-10"}, None),
        ({"day": "5874897-12-31"}, None),
        ({"day": "26-01-10"}, "record: string_pattern_mismatch day"),
        ({"day": "2026-01-10T12:00:00+00:00"}, "record: string_pattern_mismatch day"),
        ({"day": "2026-01-10\n"}, "record: string_pattern_mismatch day"),
        ({"day": None}, "record: string_type day"),
    ],
)
def test_serial_ids_and_dates_have_the_format_of_postgres(members: dict[str, Any], reason: str | None) -> None:
    pack = Pack(name="sample", tables={"days": Day}, topics=("days",))
    day = DAY | members
    assert reason == pack.problem(change(Kind.INSERT, table="days", key={"number": day["number"]}, record=day))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_everywhere(number: float) -> None:
    assert "record: finite_number weight" == problem_of_a_note(weight=number)
    assert "record: json_invalid" == problem_of_a_note(extra={"deep": [number]})
    assert "record: json_invalid" == problem_of_a_note(extra={"deep": [number, '"']}, text="NaN")


class Lists(Row):
    id: Ulid
    text: str
    parts: list[Any] | None
    sums: list[Numeric]
    weight: float


@pytest.mark.parametrize("member", ["parts", "sums", "weight"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_nan_and_infinity_are_refused_wherever_a_value_may_hold_them(member: str, number: float) -> None:
    pack = Pack(name="sample", tables={"lists": Lists}, topics=("lists",))
    row: dict[str, Any] = {"id": ID, "text": "x", "parts": None, "sums": [], "weight": 1.5}
    row[member] = number if member == "weight" else [number]
    unsendable = change(Kind.INSERT, table="lists", key={"id": ID}, record=row)
    valid = pack.validator(unsendable)
    assert valid is not None
    assert not valid(json.dumps({"id": ID}), json.dumps(row))
    assert "record: json_invalid" == problem_of_a_note(extra={"deep": [number]})


def test_a_record_may_have_nan_and_infinity_as_text() -> None:
    for text in ("NaN and -Infinity", "NaN and -Infinity" * 100_000):
        for extra in (None, {}, {"NaN": "Infinity"}):
            assert problem_of_a_note(text=text, extra=extra) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{'id': 1}",
        "\x00",
        '"text"',
        pytest.param('{"text": "\ud800"}', id="lone surrogate"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("9" * 10_000, id="long number"),
    ],
)
def test_invalid_json_is_refused_and_raises_nothing(text: str) -> None:
    for reason in (
        PACK.problem(change(Kind.INSERT, key={"id": ID}, record=text)),
        PACK.problem(change(Kind.DELETE, key=text)),
    ):
        assert reason is not None
        assert reason.endswith(("json_invalid", "model_type", "string_unicode"))


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(f'{{"deep": {DEEP}}}', id="5,000 levels"),
        pytest.param('{"a":' * 300 + "1" + "}" * 300, id="300 objects"),
        pytest.param(f'{{"long": {"9" * 5000}}}', id="a number of 5,000 digits"),
        pytest.param(f'{{"long": [0.{"9" * 5000}, 1e-{"9" * 20}]}}', id="a fraction of 5,000 digits"),
        pytest.param(r'{"half": "\ud800", "\udfff": 1}', id="half a surrogate pair"),
        pytest.param(f'{{"]}}": ["[{{\\"", {{"NaN": "Infinity"}}, {DEEP}]}}', id="brackets in texts"),
        pytest.param(f' {{ "white"\n:\t[ {DEEP} , 1 ] }} ', id="white space"),
    ],
)
def test_what_json_allows_in_a_json_column_is_accepted_however_deep_and_long(extra: str) -> None:
    record = json.dumps(NOTE | {"extra": 0}).replace('"extra": 0', f'"extra": {extra}')
    assert PACK.problem(change(Kind.INSERT, key={"id": ID}, record=record)) is None
    wrong = record.replace('"red"', '"green"')
    assert "record: literal_error colour" == PACK.problem(change(Kind.INSERT, key={"id": ID}, record=wrong))


@pytest.mark.parametrize("extra", [f'["deep", {DEEP}]', '"\\ud800"', "9" * 5000, f"[{'9' * 5000}]", "true"])
def test_a_json_column_that_must_be_an_object_is_refused_if_it_is_not(extra: str) -> None:
    record = json.dumps(NOTE | {"extra": 0}).replace('"extra": 0', f'"extra": {extra}')
    assert "record: dict_type extra" == PACK.problem(change(Kind.INSERT, key={"id": ID}, record=record))


class Account(Row):
    key: ClassVar[tuple[str, ...]] = ("number",)

    number: BigInt
    balance: Numeric | None
    past: list[BigInt | None]
    parts: list[list[Numeric]]
    extra: JsonObject
    text: str


ACCOUNTS = Pack(name="sample", tables={"accounts": Account}, topics=("notes",))
ACCOUNT = (
    '{"number":9223372036854775807,"balance":1.50,"past":[-9007199254740993,null],"parts":[[0.1,"NaN"],[]],'
    '"extra":{"number": 1, "balance": [2]},"text":"[1,2] \\"3\\""}'
)


def account(**members: str) -> str:
    """ACCOUNT with other values, as JSON texts."""
    return replace_values(ACCOUNT, {name: lambda _, value=value: value for name, value in members.items()})  # type: ignore[misc]


@pytest.mark.parametrize("digits", ["9" * 5000, f"-0.{'0' * 5000}1", "NaN", "Infinity", "-Infinity"])
def test_a_numeric_has_any_number_of_digits(digits: str) -> None:
    for balance in (digits if digits[-1].isdigit() else f'"{digits}"', "null"):
        record = account(balance=balance, parts=f"[[{balance}]]" if balance != "null" else "[]")
        assert ACCOUNTS.problem(change(Kind.INSERT, table="accounts", key={"number": 1}, record=record)) is None


def test_a_numeric_is_a_number() -> None:
    record = account(balance='"many"')
    problem = ACCOUNTS.problem(change(Kind.INSERT, table="accounts", key={"number": 1}, record=record))
    assert "record: decimal_parsing balance" == problem


def test_exact_numbers_are_strings_with_the_digits_that_postgres_wrote() -> None:
    plain = change(Kind.INSERT, table="accounts", key='{"number":9223372036854775807}', record=ACCOUNT)
    exact = ACCOUNTS.with_exact_numbers(plain)
    assert '{"number":"9223372036854775807"}' == exact.key
    assert (
        '{"number":"9223372036854775807","balance":"1.50","past":["-9007199254740993",null],'
        '"parts":[["0.1","NaN"],[]],"extra":{"number": 1, "balance": [2]},"text":"[1,2] \\"3\\""}'
    ) == exact.record
    assert plain._replace(key=exact.key, record=exact.record) == exact


def test_a_null_and_a_missing_record_have_no_exact_numbers() -> None:
    gone = ACCOUNTS.with_exact_numbers(change(Kind.DELETE, table="accounts", key='{"number":-1}'))
    assert ('{"number":"-1"}', None) == (gone.key, gone.record)
    record = account(balance="null", past="[]")
    assert ACCOUNTS.with_exact_numbers(
        change(Kind.INSERT, table="accounts", key='{"number":1}', record=record)
    ).record == replace_values(
        record, {"number": lambda value: f'"{value}"', "parts": lambda _: '[["0.1","NaN"],[]]'}
    )


def test_a_change_without_such_columns_is_the_same_in_both_forms() -> None:
    plain = change(Kind.INSERT, key={"id": ID}, record=NOTE)
    assert PACK.with_exact_numbers(plain) is plain
    unknown = change(Kind.DELETE, table="unknown", key={"id": 1})
    assert PACK.with_exact_numbers(unknown) is unknown


def test_a_reason_reveals_nothing_of_the_refused_change() -> None:
    secret = "xyzzy"
    for key, record in [
        ({"id": secret}, NOTE),
        ({"id": ID}, NOTE | {"id": secret}),
        ({"id": ID}, NOTE | {secret: secret}),
        ({"id": ID}, NOTE | {"colour": secret}),
        ({"id": ID}, NOTE | {"count": secret}),
        ({"id": ID}, NOTE | {"extra": secret}),
        ({"id": ID}, f'{{"{secret}": {secret}}}'),
        ({"id": ID}, f"{secret}"),
    ]:
        reason = PACK.problem(change(Kind.INSERT, key=key, record=record))
        assert reason is not None
        assert secret not in reason
        assert len(reason) < 80


def test_a_text_of_a_megabyte_is_accepted() -> None:
    assert problem_of_a_note(text="ä" * 1_000_000) is None


def test_a_row_is_immutable_and_its_errors_hide_the_input() -> None:
    note = Note.model_validate_json(json.dumps(NOTE))
    with pytest.raises(ValidationError, match="frozen"):
        note.text = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError) as caught:
        Note.model_validate_json(json.dumps(NOTE | {"count": "xyzzy"}))
    assert "xyzzy" not in str(caught.value)


@pytest.mark.parametrize("topic", [f"channel:{ID}", f"user:{ID}", "users"])
def test_a_pack_serves_topics_of_its_shapes(topic: str) -> None:
    assert bundled()["chatgenius"].serves(topic)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "user",
        "users ",
        "users\n",
        "*chatgenius",
        f"channel:{ID}\n",
        f"channel:{ID.lower()}",
        "channel:",
        ID,
    ],
)
def test_a_pack_serves_no_other_topics(topic: str) -> None:
    assert not bundled()["chatgenius"].serves(topic)


def test_packs_are_found_by_their_modules_under_their_own_names() -> None:
    assert "chatgenius" in bundled()
    assert all(name == pack.name for name, pack in bundled().items())
    assert bundled() is bundled()


@pytest.mark.parametrize("pack", bundled().values(), ids=bundled())
def test_the_example_topic_is_one_of_the_pack(pack: Pack) -> None:
    assert pack.serves(example_topic(pack, [{"id": "01JH000000VSER000000000001"}]))


def test_the_example_topic_needs_no_id_if_the_pack_has_such_a_topic() -> None:
    assert "users" == example_topic(bundled()["chatgenius"], [])
    assert "owner:..." == example_topic(bundled()["disclosure"], [])


def sample(**columns: Any) -> Pack:
    return Pack("sample", {"notes": create_model("Note", __base__=Row, **columns)}, ("notes",))


def test_the_contract_hash_changes_with_a_row_model_but_not_with_its_docstring() -> None:
    plain = sample(id=(int, ...), description=(str, ...))
    documented = sample(id=(int, Field(description="a number")), description=(str, Field(description="a text")))
    documented.tables["notes"].__doc__ = "Documented."
    assert contract_hash([plain]) == contract_hash([documented])
    other = (
        sample(id=(str, ...), description=(str, ...)),
        sample(id=(int, ...)),
        sample(id=(int, ...), name=(str, ...)),
    )
    assert 4 == len({contract_hash([pack]) for pack in (plain, *other)})
