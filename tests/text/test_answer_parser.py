"""What a model writes as pieces: the worked answers, and laws that hold for any ids."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_mlx.text import answer_parser, call_scanner, json_ends
from apertus_mlx.text.answer_parser import AnswerParser, new_call_id
from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE
from apertus_mlx.text.messages import read_messages
from apertus_mlx.text.pieces import Piece, ToolCall
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import load_tokenizer

_TOKENIZER: list[Tokenizer] = []
_IDS: dict[int, int] = {}


@pytest.fixture(autouse=True, scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))
    _TOKENIZER[:] = [tokenizer]
    for byte in range(256):
        token_id = tokenizer.token_to_id(CHARACTER_OF_BYTE[byte])
        assert token_id is not None
        _IDS[byte] = token_id


@dataclass
class Read:
    """What a reader of pieces has at the end."""

    text: str = ""
    thought: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    malformed: int = 0
    ended_with_calls: bool = False

    @property
    def named(self) -> list[tuple[str, str]]:
        return [(name, arguments) for _, name, arguments in self.calls.values()]

    def finish(self, cut: bool) -> str:
        """The finish reason of an answer that was cut or not."""
        asks = bool(self.calls) and (not cut or self.ended_with_calls)
        return "tool_calls" if asks else "length" if cut else "stop"


def ids_of(text: str) -> list[int]:
    """Ids of a text in which `⟨71⟩` is an id; its bytes come one by one."""
    ids: list[int] = []
    for index, part in enumerate(text.replace("⟩", "⟨").split("⟨")):
        ids += [int(part)] if index % 2 else [_IDS[byte] for byte in part.encode()]
    return ids


def merged(ids: Sequence[int]) -> list[int]:
    """The same text in the tokenizer's own, longer tokens."""
    tokenizer = _TOKENIZER[0]
    result: list[int] = []
    for special, group in itertools.groupby(ids, lambda i: i in tokenizer.special_ids):
        if special:
            result += group
        else:
            data = b"".join(map(tokenizer.token_bytes, group))
            result += tokenizer.encode(data.decode("utf-8", "surrogateescape"))
    return result


def read(ids: Iterable[int], cut: bool = False, **options: Any) -> Read:
    numbers = itertools.count()
    parser = AnswerParser(_TOKENIZER[0], new_id=lambda: f"call_{next(numbers)}", **options)
    found = Read()
    for token_id in ids:
        if token_id in (2, 68, 72):  # as a run ends
            break
        found.pieces += parser.push(token_id)
    found.pieces += parser.finish(cut)
    indices: set[int] = set()
    found.malformed, found.ended_with_calls = parser.malformed, parser.ended_with_calls
    for piece in found.pieces:
        call = piece.call
        assert piece.kind == ("call" if call else "thought" if piece.is_thought else "text")
        assert (piece.text == "") == (call is not None)
        if call is None:
            found.thought += piece.text if piece.is_thought else ""
            found.text += "" if piece.is_thought else piece.text
        elif call.withdrawn:
            with pytest.raises(ValueError):  # noqa: PT011 (whatever says that it does not parse)
                json.loads(found.calls.pop(call.index)[2])
        elif call.index in found.calls:
            assert call.id is None and call.name is None and call.arguments
            found.calls[call.index][2] += call.arguments
        else:
            assert call.id and call.name and not call.arguments
            assert call.index == len(indices)
            indices.add(call.index)
            found.calls[call.index] = [call.id, call.name, ""]
    return found


# Written, whether the limit cuts it there; answer, thought, calls, finish reason, malformed ones.
Row = tuple[str, bool, str, str, list[tuple[str, str]], str, int]
ROWS: list[Row] = [
    ("Bern.⟨68⟩", False, "Bern.", "", [], "stop", 0),
    (
        '⟨71⟩[{"f": {"a": 1}}, {"g": {}}]⟨72⟩',
        False, "", "", [("f", '{"a": 1}'), ("g", "{}")], "tool_calls", 0,
    ),
    ('Let me see. ⟨71⟩[{"f": {}}]⟨72⟩', False, "Let me see. ", "", [("f", "{}")], "tool_calls", 0),
    ("⟨69⟩Think.⟨70⟩Yes.⟨68⟩", False, "Yes.", "Think.", [], "stop", 0),
    ('⟨69⟩Need it.⟨71⟩[{"f": {}}]⟨72⟩', False, "", "Need it.", [("f", "{}")], "tool_calls", 0),
    ("⟨69⟩Think", True, "", "Think", [], "length", 0),
    ('⟨71⟩[{"f": {"a": 1', True, "", "", [("f", '{"a": 1')], "length", 0),
    ('⟨71⟩[{"f": {"a": 1}}]', False, "", "", [("f", '{"a": 1}')], "tool_calls", 0),
    ('⟨71⟩[{"f": {"a": 1}}]⟨68⟩', False, "", "", [("f", '{"a": 1}')], "tool_calls", 0),
    ('⟨71⟩[{"f": {"a": 1}}]', True, "", "", [("f", '{"a": 1}')], "tool_calls", 0),
    ("⟨71⟩[]⟨72⟩", False, "", "", [], "stop", 0),
    ("⟨71⟩⟨72⟩", False, "", "", [], "stop", 0),
    ('⟨71⟩[{"f": ]⟨72⟩', False, '[{"f": ]', "", [], "stop", 1),
    ('⟨71⟩[{}, {"f": null}]⟨72⟩', False, "", "", [("f", "{}")], "tool_calls", 0),
    ('⟨71⟩[{"f": {}, "g": {}}]⟨72⟩', False, '[{"f": {}, "g": {}}]', "", [], "stop", 1),
    ('⟨71⟩{"f": {}}⟨72⟩', False, "", "", [("f", "{}")], "tool_calls", 0),
    ('⟨71⟩[{"f": "{\\"a\\": 1}"}]⟨72⟩', False, "", "", [("f", '{"a": 1}')], "tool_calls", 0),
    ('⟨71⟩[{"unknown": {}}]⟨72⟩', False, "", "", [("unknown", "{}")], "tool_calls", 0),
    ('[{"f": {}}]⟨68⟩', False, "", "", [("f", "{}")], "tool_calls", 0),
    ('f(a="x")⟨68⟩', False, 'f(a="x")', "", [], "stop", 0),
    ("⟨69⟩Hm.⟨70⟩⟨68⟩", False, "", "Hm.", [], "stop", 0),
    ('<|tools_prefix|>[{"f": {}}]⟨68⟩', False, '<|tools_prefix|>[{"f": {}}]', "", [], "stop", 0),
    (
        '⟨71⟩[{"f": {"a": "<|tools_suffix|>"}}]⟨72⟩',
        False, "", "", [("f", '{"a": "<|tools_suffix|>"}')], "tool_calls", 0,
    ),
    # White space between all tokens, and a second start of the turn.
    ('⟨67⟩⟨71⟩\n [ { "f" : {} } ] \n⟨72⟩', False, "", "", [("f", "{}")], "tool_calls", 0),
    ("⟨67⟩Bern.⟨68⟩", False, "Bern.", "", [], "stop", 0),
    ("⟨32⟩Think.⟨33⟩Yes.⟨68⟩", False, "Yes.", "Think.", [], "stop", 0),
    # Cut in other places: of an argument as far as written, of a name nothing.
    ('⟨71⟩[{"f', True, "", "", [], "length", 0),
    ('⟨71⟩[{"f":', True, "", "", [("f", "")], "length", 0),
    ('⟨71⟩[{"f": nu', True, "", "", [("f", "")], "length", 0),
    ('⟨71⟩[{"f": {}}, {"g": {"b": [', True, "", "", [("f", "{}"), ("g", '{"b": [')], "length", 0),
    ('⟨71⟩[{"f": {}', True, "", "", [("f", "{}")], "length", 0),
    ('⟨71⟩[{"f": "{\\"a\\": \\"\\u00', True, "", "", [("f", '{"a": "')], "length", 0),
    ('⟨71⟩[{"f": "{\\"a\\": \\"\\\\', True, "", "", [("f", '{"a": "\\')], "length", 0),
    ('⟨71⟩[{"f": "{\\"a\\": \\"\\\\u12', True, "", "", [("f", '{"a": "\\u12')], "length", 0),
    ('⟨71⟩[{"f": "{\\"a\\": \\', True, "", "", [("f", '{"a": ')], "length", 0),
    ('⟨71⟩[{"f": "{\\"a\\": \\"\\ud83d', True, "", "", [("f", '{"a": "')], "length", 0),
    ('⟨71⟩[{"f": "no object', True, '[{"f": "no object', "", [], "length", 1),
    # A line break after it: the escape is no longer at the end.
    (
        '⟨71⟩[{"f": "{\\"a\\": \\"\\\\\n',
        True, '[{"f": "{\\"a\\": \\"\\\\\n', "", [], "length", 1,
    ),
    (
        '⟨71⟩[{"f": "{\\"a\\": \\"\\ud83d\\n',
        True, '[{"f": "{\\"a\\": \\"\\ud83d\\n', "", [], "length", 1,
    ),
    # Malformed in other ways; a whole call before stands.
    ('⟨71⟩[{"f": {}}, {"g": 1}]⟨72⟩', False, ', {"g": 1}]', "", [("f", "{}")], "tool_calls", 1),
    ('⟨71⟩[{"f": {"a": 1, "a": 2}}]⟨72⟩', False, '[{"f": {"a": 1, "a": 2}}]', "", [], "stop", 1),
    ('⟨71⟩[{"f": {"a": NaN}}]⟨72⟩', False, '[{"f": {"a": NaN}}]', "", [], "stop", 1),
    ('⟨71⟩[{"f": {"a": [1}}]⟨72⟩', False, '[{"f": {"a": [1}}]', "", [], "stop", 1),
    ('⟨71⟩[{"f": {}}⟨72⟩', False, "", "", [("f", "{}")], "tool_calls", 1),
    ('⟨71⟩[{"f": "[1]"}]⟨72⟩', False, '[{"f": "[1]"}]', "", [], "stop", 1),
    ('⟨71⟩[{"": {}}]⟨72⟩', False, '[{"": {}}]', "", [], "stop", 1),
    ('⟨71⟩[{"\\ud800": {}}]⟨72⟩', False, '[{"\\ud800": {}}]', "", [], "stop", 1),
    ("⟨69⟩Hm⟨71⟩[f()]⟨70⟩So.⟨68⟩", False, "So.", "Hm[f()]", [], "stop", 1),
    (
        '⟨71⟩[{"f": {"a": 1]⟨71⟩[{"g": {}}]',
        False, '[{"f": {"a": 1]', "", [("g", "{}")], "tool_calls", 1,
    ),
    # Two blocks, and a thought that begins within one.
    ('⟨71⟩[{"f": {}}]⟨71⟩{"g": {}}', False, "", "", [("f", "{}"), ("g", "{}")], "tool_calls", 0),
    ('⟨71⟩[{"f": {}}]⟨69⟩T⟨70⟩.', False, ".", "T", [("f", "{}")], "tool_calls", 0),
    # Without a control token: only a list, of declared names, with nothing before or after.
    (' [{"f": {}}, {"g": null}]\n', False, "", "", [("f", "{}"), ("g", "{}")], "tool_calls", 0),
    ('⟨69⟩T⟨70⟩[{"f": {}}]⟨68⟩', False, "", "T", [("f", "{}")], "tool_calls", 0),
    ('{"f": {}}⟨68⟩', False, '{"f": {}}', "", [], "stop", 0),
    ('[{"h": {}}]⟨68⟩', False, '[{"h": {}}]', "", [], "stop", 0),
    ('[{"f": {}}] is it⟨68⟩', False, '[{"f": {}}] is it', "", [], "stop", 0),
    ('I say [{"f": {}}]⟨68⟩', False, 'I say [{"f": {}}]', "", [], "stop", 0),
    ('[{"f": {"a": 1', True, '[{"f": {"a": 1', "", [], "length", 0),
    ('[{"f": {}}]⟨69⟩T⟨70⟩', False, '[{"f": {}}]', "T", [], "stop", 0),
    ("[]⟨68⟩", False, "[]", "", [], "stop", 0),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].replace("\n", " "))
@pytest.mark.parametrize("tokens", ["bytes", "words"])
def test_worked_answers(row: Row, tokens: str) -> None:
    written, cut, text, thought, calls, finish, malformed = row
    ids = ids_of(written)
    found = read(merged(ids) if tokens == "words" else ids, cut, tool_names={"f", "g"})
    assert (found.text, found.thought, found.named) == (text, thought, calls)
    assert (found.finish(cut), found.malformed) == (finish, malformed)


def test_a_character_whose_bytes_are_cut_is_not_there_yet() -> None:
    for start, shown in (("Zü", "Z"), ('⟨71⟩[{"f": {"a": "ü', '{"a": "'), ("⟨69⟩Zü", "Z")):
        found = read(ids_of(start)[:-1], cut=True)
        assert [found.text or found.thought or found.calls[0][2]] == [shown]
    # At an end that is none of the limit's, the byte is no text.
    assert read(ids_of("Zü")[:-1]).text == "Z\ufffd"


def test_calls_without_control_token_are_text_where_no_tool_is_declared() -> None:
    found = read(ids_of('[{"f": {}}]⟨68⟩'))
    assert (found.text, found.named) == ('[{"f": {}}]', [])
    assert [piece.text for piece in found.pieces] == list('[{"f": {}}]')


def test_text_is_held_back_only_while_it_can_still_become_calls() -> None:
    parser = AnswerParser(_TOKENIZER[0], tool_names={"f"})
    texts = ["".join(p.text for p in parser.push(i)) for i in ids_of(' [{"fa": 1')]
    assert texts == ["", "", "", "", "", "", ' [{"fa"', ":", " ", "1"] or texts == [
        "", "", "", "", "", "", "", ' [{"fa":', " ", "1",
    ]  # fmt: skip
    assert (
        "".join(p.text for p in AnswerParser(_TOKENIZER[0], tool_names={"f"}).push(_IDS[97])) == "a"
    )


def test_arguments_come_as_they_are_written_and_the_last_brace_when_the_call_is_whole() -> None:
    parser = AnswerParser(_TOKENIZER[0], new_id=lambda: "call_x")
    shown: list[str] = []
    for token_id in ids_of('⟨71⟩[{"f": {"a": "é}"}}'):
        for piece in parser.push(token_id):
            assert piece.call is not None and piece.call.index == 0
            shown.append(piece.call.name or piece.call.arguments)
    assert shown == ["f", *'{"a": "é}"', "}"]


def test_stop_strings_end_the_answer_and_not_a_thought_or_a_call() -> None:
    found = read(ids_of('⟨69⟩stop⟨70⟩⟨71⟩[{"f": {"a": "stop"}}]'), stop_strings=["stop"])
    assert (found.thought, found.named) == ("stop", [("f", '{"a": "stop"}')])
    found = read(ids_of("⟨69⟩stop⟨70⟩Do stop here"), stop_strings=["stop"])
    assert (found.thought, found.text) == ("stop", "Do ")
    # What is held back for a call is searched when it turns out to be text.
    found = read(ids_of('[{"f": {}}] no'), stop_strings=["{}"], tool_names={"f"})
    assert found.text == '[{"f": '


def test_a_deliberation_that_the_prompt_opened_goes_on() -> None:
    roles = _TOKENIZER[0].roles
    assert roles.leaves_thought_open(ids_of("⟨65⟩U⟨66⟩⟨67⟩⟨69⟩T⟨71⟩[]⟨72⟩[7]"))
    # With the answer a template writes 70 before its text; see test_template.py.
    assert roles.leaves_thought_open(ids_of("⟨67⟩⟨69⟩T⟨71⟩[]⟨72⟩[7]⟨68⟩⟨67⟩"))
    assert not roles.leaves_thought_open(ids_of("⟨67⟩⟨69⟩T⟨68⟩⟨65⟩U⟨66⟩⟨67⟩"))
    assert not roles.leaves_thought_open(ids_of("⟨67⟩⟨69⟩T⟨70⟩A"))
    assert not roles.leaves_thought_open([])
    found = read(ids_of("more⟨70⟩A"), thinking=True)
    assert (found.thought, found.text) == ("more", "A")


def test_limits_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(depth: int) -> str:
        return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)

    deep, deeper = nested(json_ends.MAX_DEPTH), nested(json_ends.MAX_DEPTH + 1)
    for value, quoted in ((deep, False), (deep, True)):
        shown = json.dumps(value) if quoted else value
        assert read(ids_of(f'⟨71⟩[{{"f": {shown}}}]')).named == [("f", value)]
    for value in (deeper, json.dumps(deeper)):
        block = f'[{{"f": {value}}}]'
        found = read(ids_of(f"⟨71⟩{block}"))
        assert (found.named, found.text, found.malformed) == ([], block, 1)
    assert call_scanner.MAX_BLOCK_BYTES == 2**20
    monkeypatch.setattr(call_scanner, "MAX_BLOCK_BYTES", 1000)
    arguments = '{"a": "' + "é" * 491 + '"}'
    assert read(ids_of(f'⟨71⟩[{{"f": {arguments}}}]')).named == [("f", arguments)]
    block = f'[{{"f":    {arguments}}}]'
    found = read(ids_of(f"⟨71⟩{block}⟨72⟩"))
    assert (found.named, found.text, found.malformed) == ([], block, 1)


def test_an_id_is_new_each_time() -> None:
    ids = {new_call_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(len(one) == 29 and one[:5] == "call_" and one[5:].isalnum() for one in ids)


_FRAGMENTS = [
    *(f"⟨{token_id}⟩" for token_id in (67, 69, 70, 71, 71, 3, 32, 33)),
    "[", "]", "{", "}", '"', ":", ",", "\\", "null", '"f"', '{"f": {}}', '[{"g": {"é": 1}}]', " ",
    "é", "🏔", "\\u00e9", "\\ud83d", "1e5", '{"f": "{}"}', '{"f": {"a": ', "}}]", "stop", "Hello",
]  # fmt: skip
_WRITTEN = st.lists(st.sampled_from(_FRAGMENTS), max_size=14).map("".join)


def whole(found: Read) -> tuple[str, str, list[list[str]], int]:
    return found.text, found.thought, [call[1:] for call in found.calls.values()], found.malformed


@pytest.mark.nightly
def test_many_answers_in_any_split() -> None:
    rng = random.Random(0)
    for _ in range(5_000):
        written = "".join(rng.choices(_FRAGMENTS, k=rng.randrange(1, 16)))
        options: dict[str, Any] = {"tool_names": {"f"}} if rng.random() < 0.5 else {}
        options["stop_strings"] = rng.choice([[], ["stop", "}]"]])
        ids, cut = ids_of(written), rng.random() < 0.5
        one, other = (read(which, cut, **options) for which in (ids, merged(ids)))
        assert whole(one) == whole(other), written
        assert one.finish(cut) == other.finish(cut), written


@settings(max_examples=60, deadline=None)
@given(written=_WRITTEN, cut=st.booleans(), declared=st.booleans(), stop=st.booleans())
def test_any_split_into_tokens_gives_the_same_answer(
    written: str, cut: bool, declared: bool, stop: bool
) -> None:
    options: dict[str, Any] = {"tool_names": {"f"} if declared else None}
    options["stop_strings"] = ["stop", "}]"] if stop else []
    ids = ids_of(written)
    assert whole(read(ids, cut, **options)) == whole(read(merged(ids), cut, **options))


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 400)), cut=st.booleans(), declared=st.booleans())
def test_any_ids_are_read(ids: list[int], cut: bool, declared: bool) -> None:
    ids = [i for i in ids if i < _TOKENIZER[0].vocab_size]
    read(ids, cut, tool_names={"f"} if declared else None)


@settings(deadline=None)
@given(
    parts=st.lists(
        st.integers(0, 73) | st.sampled_from(["Hello", '[{"f": {}}', "]", "{", " ", '"', "é"]),
    )
)
def test_no_control_token_is_text(parts: list[int | str]) -> None:
    """Only control tokens have a `<` here."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else ids_of(part)
    found = read(ids, tool_names={"f"})
    assert "<" not in found.text + found.thought + "".join(map(str, found.named))


@settings(deadline=None)
@given(
    text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="⟨⟩")),
    thought=st.text("aé🏔 "),
)
def test_text_without_calls_is_the_text_of_the_ids(text: str, thought: str) -> None:
    found = read(ids_of(f"⟨69⟩{thought}⟨70⟩{text}"))
    assert (found.thought, found.text) == (thought, text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**60), 10**60)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
_ARGUMENTS = st.dictionaries(st.text(), _JSON, max_size=4)
_STYLES = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2, "\t"]),
        "separators": st.sampled_from([(", ", ": "), (",", ":"), (" , ", " : ")]),
    }
)
# Names that a template can write between quotes as they are.
_NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'),
    min_size=1,
    max_size=64,
)


@settings(max_examples=30, deadline=None)
@given(
    calls=st.lists(st.tuples(_NAMES, _ARGUMENTS, _STYLES, st.booleans()), min_size=1, max_size=3),
    space=st.sampled_from(["", " ", "\n\t"]),
)
def test_well_formed_calls_are_what_a_json_parser_reads(
    calls: list[tuple[str, dict[str, Any], dict[str, Any], bool]], space: str
) -> None:
    elements, written = [], []
    for name, arguments, style, as_text in calls:
        text = json.dumps(arguments, **style)
        written.append(text)
        value = json.dumps(text, ensure_ascii=style["ensure_ascii"]) if as_text else text
        key = json.dumps(name, ensure_ascii=style["ensure_ascii"])
        elements.append(f"{{{space}{key}{space}:{space}{value}{space}}}")
    block = f"[{space}" + f"{space},{space}".join(elements) + f"{space}]"
    found = read([71, *_TOKENIZER[0].encode(block), 72])
    assert (found.text, found.malformed) == ("", 0)
    assert [arguments for _, arguments in found.named] == written
    reference = [next(iter(element.items())) for element in json.loads(block)]
    assert [name for name, _ in found.named] == [name for name, _ in reference]
    for (_, arguments), (_, value) in zip(found.named, reference, strict=True):
        assert json.loads(arguments) == (json.loads(value) if isinstance(value, str) else value)
    # So that the conversation can go on.
    made = [ToolCall(str(index), *call).as_message() for index, call in enumerate(found.named)]
    read_messages([{"role": "assistant", "tool_calls": made}])


@pytest.mark.parametrize("name", ["", 'f"', "f\\", "f\n", "f\x7f", "f" * 65])
def test_a_name_that_no_later_prompt_can_say_makes_no_call(name: str) -> None:
    block = f"[{{{json.dumps(name)}: {{}}}}]"
    found = read(ids_of(f"⟨71⟩{block}⟨72⟩"))
    assert (found.named, found.text, found.malformed) == ([], block, 1)


@settings(max_examples=120, deadline=None)
@given(
    block=st.lists(
        st.sampled_from(
            ["[", "]", "{", "}", '"', ":", ",", "\\", "null", '"f"', '"a"', "{}", "1", " ", "true",
             "[1, 2]", '{"f": {}}', "NaN", '"{}"']
        ),
        max_size=12,
    ).map("".join)
)  # fmt: skip
def test_what_is_no_list_of_calls_for_a_json_parser_is_malformed(block: str) -> None:
    """The reference reads the whole block at once."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in found}) < len(found):
            raise ValueError("twice")
        return dict(found)

    def refuse(name: str) -> None:
        raise ValueError(name)

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=refuse)

    def reference() -> list[tuple[str, dict[str, Any]]]:
        value = decoder.decode(block)
        elements = value if isinstance(value, list) else [value]
        calls = []
        for element in elements:
            if element == {}:
                continue
            ((name, arguments),) = element.items()
            arguments = decoder.decode(arguments) if isinstance(arguments, str) else arguments
            arguments = {} if arguments is None else arguments
            if not isinstance(arguments, dict) or not name or {'"', "\\"} & set(name):
                raise ValueError("no object")
            calls.append((name, arguments))
        return calls

    found = read([71, *_TOKENIZER[0].encode(block), 72])
    try:
        wanted = reference()
    except (ValueError, AttributeError):
        assert found.malformed == (0 if not block.strip() else 1)
        return
    assert (found.malformed, found.text) == (0, "")
    assert [(name, json.loads(arguments)) for name, arguments in found.named] == wanted


def steps_of(ids: Sequence[int], **options: Any) -> int:
    """How many lines of the parser's own code run: time, but always the same."""
    files = {answer_parser.__file__, call_scanner.__file__, json_ends.__file__}
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        read(ids, **options)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("start", "unit"),
    [
        ('⟨71⟩[{"f": {"a": "', "é"),
        ('⟨71⟩[{"f": "', '\\"'),
        ("⟨71⟩[", '{"f": {}},'),
        ('⟨71⟩[{"f": {"a": [', "1,"),
        ("⟨71⟩", " "),
        ('[{"f": {"a": "', "b"),
        ("", "[{"),
    ],
)
def test_work_grows_with_the_text_and_not_faster(start: str, unit: str) -> None:
    for whole_tokens in (False, True):
        counts = []
        for length in (60, 120):
            ids = ids_of(start + unit * length)
            ids = merged(ids) if whole_tokens else ids
            counts.append(steps_of(ids, tool_names={"f"}))
        assert counts[1] < 2.1 * counts[0]
