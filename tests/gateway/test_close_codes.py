from websockets.frames import Close

from daemon.core.close_codes import CLOSE_CODES, ComeBack


def test_every_code_is_valid_in_a_close_frame_and_has_one_name() -> None:
    for name, closing in CLOSE_CODES.items():
        assert closing.name == name
        Close(closing.code, closing.name).check()
    assert len({closing.code for closing in CLOSE_CODES.values()}) == len(CLOSE_CODES)


def test_the_codes_are_those_of_the_protocol() -> None:
    again = {closing.code: closing.come_back for closing in CLOSE_CODES.values()}
    assert sorted(again) == [1001, 1002, 1003, 1007, 1009, 1011, 1012, 1013, 4400, 4401, 4403, 4408, 4409, 4410, 4429]
    assert again[1001] == again[1012] == again[4408] == ComeBack.AT_ONCE
    assert again[1013] == again[4409] == again[4429] == ComeBack.LATER
    assert again[4401] == ComeBack.FRESH_TOKEN
    assert again[4400] == again[4403] == ComeBack.NEVER
