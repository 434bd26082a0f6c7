"""Output filters: any split as a search of the whole text; files that are none are refused."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.text.filtered_pieces import PieceFilter
from apertus_mlx.text.output_filter import FilterStream, OutputFilter, load_output_filter
from apertus_mlx.text.pieces import CallPiece, Piece

DOCS = Path(__file__).parents[2] / "docs/output-filter.md"
RULES: list[dict[str, Any]] = [
    {"texts": ["ab", "aba", "b-b"], "replacement": "[1]"},
    {"texts": ["AB", "é"], "ignore_case": True, "replacement": "ab"},
    {"texts": ["a", "b1"], "whole_words": True, "replacement": ""},
    {"texts": ["ss", "i", "k"], "ignore_case": True, "whole_words": True, "replacement": "\\1"},
    {"pattern": r"\b\d{2,3}\b", "replacement": "[n]"},
    {"pattern": "(a|b){2,4}?-", "replacement": "x"},
    {"pattern": "b[^1]{1,3}+1", "ignore_case": True, "replacement": '"'},
    {"pattern": r"(?:1|\B-)a{0,2}", "replacement": "ééé"},
]


def write(folder: Path, value: Any) -> Path:
    path = folder / "rules.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def through(stream: FilterStream, parts: list[str]) -> str:
    return "".join([*map(stream.push, parts), stream.finish()])


def reference(rules: list[dict[str, Any]], text: str) -> str:
    """Each place in turn; there, each rule in turn; there, each text, the longest first."""
    shown, position = "", 0
    while position < len(text):
        for rule in rules:
            flags = re.IGNORECASE if rule.get("ignore_case") else 0
            for one in sorted(rule.get("texts", [None]), key=lambda t: -len(t or "")):
                pattern = rule["pattern"] if one is None else re.escape(one)
                if rule.get("whole_words"):
                    pattern = rf"(?<!\w){pattern}(?!\w)"
                found = re.compile(pattern, flags).match(text, position)
                if found:
                    break
            if found:
                shown, position = shown + rule["replacement"], found.end()
                break
        else:
            shown, position = shown + text[position], position + 1
    return shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules")


@settings(deadline=None, max_examples=100)
@given(
    rules=st.lists(st.sampled_from(RULES), min_size=1, max_size=4),
    parts=st.lists(st.text("abAB1- éÉſıKİ", max_size=6), max_size=8),
)
def test_any_split_gives_what_a_search_of_the_whole_text_gives(
    folder: Path, rules: list[dict[str, Any]], parts: list[str]
) -> None:
    chosen = load_output_filter(write(folder, {"rules": rules}))
    assert through(chosen.begin("text"), parts) == reference(rules, "".join(parts))


def test_one_rule_is_what_re_substitutes(folder: Path) -> None:
    text = "ab aba ABAB -1a 12 123 1234 b-b bx1" * 3
    for rule in RULES[4:]:
        flags = re.IGNORECASE if rule.get("ignore_case") else 0
        wanted = re.sub(rule["pattern"], lambda _: rule["replacement"], text, flags=flags)  # noqa: B023
        chosen = load_output_filter(write(folder, {"rules": [rule]}))
        assert through(chosen.begin("thought"), list(text)) == wanted


def test_no_more_is_held_back_than_a_match_takes(folder: Path) -> None:
    rules = [{"texts": ["secret"], "replacement": "[...]"}]
    stream = load_output_filter(write(folder, {"rules": rules})).begin("text")
    pushed = shown = ""
    for character in "no secret is safe; secrets are not" * 2:
        pushed += character
        shown += stream.push(character)
        assert len(shown) >= len(pushed.replace("secret", "[...]")) - len("secret")
        assert not shown.endswith(("secret", "secre"))
    assert "secret" not in shown + stream.finish()


def test_the_example_of_the_page(folder: Path) -> None:
    example = re.search(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    chosen = load_output_filter(str(write(folder, example[1])))
    text = "JANE EXAMPLE (Jane Examples), 756.1234.5678.97, Jane.E@example.org."
    wanted = "[name] (Jane Examples), [AHV number], [address]."
    assert through(chosen.begin("text"), [text]) == wanted


def test_each_text_of_an_answer_is_filtered_and_keeps_its_place(folder: Path) -> None:
    rules = [{"texts": ["secret"], "replacement": 'a "b"'}]
    chosen = PieceFilter(load_output_filter(write(folder, {"rules": rules})))

    def call(index: int, name: str | None = None, arguments: str = "", **how: Any) -> Piece:
        part = CallPiece(index, None if name is None else "id", name, arguments, **how)
        return Piece("", call=part)

    pieces = [
        Piece("My sec", is_thought=True), Piece("ret.", is_thought=True), Piece("A sec"),
        Piece("ret"), Piece(" se"), call(0, "f"), call(0, arguments='{"a": "sec'),
        call(0, arguments='ret"'), call(0, arguments="}"), call(1, "secret"),
        call(1, arguments='{"se'), call(1, withdrawn=True), Piece("cret"), Piece(" secret"),
    ]  # fmt: skip
    shown = [*chosen.push(pieces), *chosen.finish()]
    joined: list[tuple[Any, str]] = []
    for piece in shown:
        key = piece.kind if piece.call is None else piece.call.index
        text = piece.text if piece.call is None else piece.call.arguments
        if joined and joined[-1][0] == key:
            text = joined.pop()[1] + text
        joined.append((key, text))
    assert joined[:3] == [
        ("thought", 'My a "b".'),
        ("text", 'A a "b" se'),
        (0, r'{"a": "a \"b\""}'),
    ]
    assert joined[3][0] == 1 and '{"se'.startswith(joined[3][1])
    assert joined[4:] == [("text", 'cret a "b"')]
    named = [p.call.name for p in shown if p.call is not None and p.call.id is not None]
    assert named == ["f", "secret"]
    assert sum(p.call is not None and p.call.withdrawn for p in shown) == 1


def rule(**changes: Any) -> dict[str, Any]:
    return {"rules": [{"texts": ["x"], "replacement": ""} | changes]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "is empty"),
        ("[]", "expected a JSON object"),
        ('{"rules": [], "rules": []}', "duplicate key"),
        ({}, r'expected \{"rules"'),
        ({"rules": []}, r'expected \{"rules"'),
        ({**rule(), "version": 1}, "no other key"),
        ({"rules": [1]}, r"rules\[0\]: expected an object"),
        (rule(words=True), r"rules\[0\]: unknown key 'words'"),
        (rule(texts="x"), r"rules\[0\].texts: expected list"),
        (rule(ignore_case=1), "ignore_case: expected bool"),
        (rule(texts=[]), "none that is empty"),
        (rule(texts=["x", ""]), "none that is empty"),
        (rule(texts=["x" * 257]), "257 characters; 256 at most"),
        (rule(texts=["x"] * 10_001), "10001 texts"),
        (rule(pattern="x"), "either texts or pattern"),
        ({"rules": [{"replacement": ""}]}, "either texts or pattern"),
        ({"rules": [{"texts": ["x"]}]}, "no replacement"),
        ({"rules": [{"pattern": "a*", "replacement": ""}]}, r"\.pattern: .*without end"),
        ({"rules": [{"pattern": "a", "whole_words": True, "replacement": ""}]}, r"write \\b"),
        (rule(replacement="\ud800"), "surrogate"),
        (rule(texts=["\ud800"]), "surrogate"),
    ],
)
def test_a_file_that_is_no_file_of_rules(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(RejectedError, match=says) as caught:
        load_output_filter(write(tmp_path, value))
    assert "rules.json: " in str(caught.value) and "\n" not in str(caught.value)


class Upper:
    """A filter of one's own."""

    def begin(self, kind: str) -> Upper:
        return self

    def push(self, text: str) -> str:
        return text.upper()

    def finish(self) -> str:
        return ""


def test_filters_of_programs_and_of_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Upper()
    assert load_output_filter(own) is own and isinstance(own, OutputFilter)
    here = EntryPoint("upper", f"{__name__}:Upper", "apertus_mlx.output_filters")
    wrong = EntryPoint("wrong", "builtins:dict", "apertus_mlx.output_filters")
    broken = EntryPoint("broken", "no_such_module:make", "apertus_mlx.output_filters")

    def installed(group: str, name: str) -> list[EntryPoint]:
        points = (here, wrong, broken)
        return [each for each in points if (each.group, each.name) == (group, name)]

    monkeypatch.setattr("importlib.metadata.entry_points", installed)
    assert through(load_output_filter("upper").begin("text"), ["a", "b"]) == "AB"
    with pytest.raises(RejectedError, match=r"wrong: .* returns no filter"):
        load_output_filter("wrong")
    with pytest.raises(RejectedError, match=r"broken: no_such_module:make fails \(ModuleNotFound"):
        load_output_filter("broken")
    (tmp_path / "link.json").symlink_to("nowhere")
    with pytest.raises(RejectedError, match=r"link\.json: is a broken link$"):
        load_output_filter(tmp_path / "link.json")
    with pytest.raises(NotFoundError, match="absent"):
        load_output_filter("absent")
    with pytest.raises(NotFoundError, match=r"none\.json"):
        load_output_filter(tmp_path / "none.json")
