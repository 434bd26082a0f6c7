"""What a model may write, id by id, with the pieces that Python makes of it.

`answers.json` is a list of groups: answers of the same text in different tokens. An answer has its
ids, how it is read, and `steps`: the pieces after each id, and at last those of the end.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.answer_parser import AnswerParser
from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE
from apertus_mlx.text.pieces import Piece
from apertus_mlx.text.tokenizer import Tokenizer
from tests.swift_fixtures.sizes import sized
from tests.text.test_answer_parser import ROWS

ANSWERS = sized(800, 150)
_FRAGMENTS = [
    *(f"⟨{token_id}⟩" for token_id in (67, 69, 70, 71, 71, 71, 72, 68, 3, 32, 33)),
    "[", "]", "{", "}", '"', ":", ",", "\\", "null", '"f"', '{"f": {}}', '[{"g": {"é": 1}}]', " ",
    "é", "🏔", "\\u00e9", "\\ud83d", "\\ude00", "1e5", '{"f": "{}"}', '{"f": {"a": ', "}}]",
    "stop", "Hello", "\n", "\\n", '{"f": "{\\"a\\": \\"', '\\"', '{"a": 1, "a": 2}', "01", "1e999",
    "\u007f", '[{"f": {"a": "\\ud83d"}}]', '[{"f": "', '{"f": {"\\ud800": 1, "\\ud801": 2}}',
    "\u212a",
]  # fmt: skip


def write_answer_fixtures(out: Path) -> None:
    """Write the file described above."""
    tokenizer = Tokenizer.load(model_dir(), vocab_size=2**17, bos_token_id=1)
    groups = list(_groups(tokenizer))
    (out / "answers.json").write_text(json.dumps(groups, ensure_ascii=False), encoding="utf-8")


def _groups(tokenizer: Tokenizer) -> Iterator[list[dict[str, Any]]]:
    rng = random.Random(0)
    for written, cut, *_ in ROWS:
        how: dict[str, Any] = {"cut": cut, "names": ["f", "g"], "stops": [], "thinking": False}
        yield list(_splits(tokenizer, written, how, rng))
    for _ in range(ANSWERS):
        written = "".join(rng.choices(_FRAGMENTS, k=rng.randrange(1, 18)))
        if rng.random() < 0.5:
            written = "⟨71⟩[" + written
        how = {
            "cut": rng.random() < 0.5,
            "names": rng.choice([[], ["f"], ["f", "g"]]),
            "stops": rng.choice([[], [], ["stop", "}]"], ["é", "Hello s"]]),
            "thinking": rng.random() < 0.2,
        }
        yield list(_splits(tokenizer, written, how, rng))
    # Any ids at all, as a model without training writes them.
    for _ in range(sized(200, 50)):
        ids = [
            rng.choice([rng.randrange(74), rng.randrange(2000)]) for _ in range(rng.randrange(30))
        ]
        how = {"cut": False, "names": ["f"], "stops": [], "thinking": False}
        yield [_answer(tokenizer, ids, how)]


def _splits(
    tokenizer: Tokenizer, written: str, how: dict[str, Any], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Answers that say the same: byte by byte, in whole tokens, and cut at random."""
    for size in (1, 10**6, 7):
        ids: list[int] = []
        for index, part in enumerate(written.replace("⟩", "⟨").split("⟨")):
            if index % 2:
                ids.append(int(part))
                continue
            data = part.encode()
            while data:
                length = size if size != 7 else rng.randint(1, 7)
                ids += _encode(tokenizer, data[:length])
                data = data[length:]
        yield _answer(tokenizer, ids, how)


def _encode(tokenizer: Tokenizer, data: bytes) -> list[int]:
    if len(data) > 1:
        return tokenizer.encode(data.decode("utf-8", "surrogateescape"))
    return [i for byte in data if (i := tokenizer.token_to_id(CHARACTER_OF_BYTE[byte])) is not None]


def _answer(tokenizer: Tokenizer, ids: list[int], how: dict[str, Any]) -> dict[str, Any]:
    numbers = itertools.count()
    parser = AnswerParser(
        tokenizer,
        how["stops"],
        thinking=how["thinking"],
        tool_names=how["names"],
        new_id=lambda: f"call_{next(numbers)}",
    )
    steps = [[_piece(piece) for piece in parser.push(token_id)] for token_id in ids]
    steps.append([_piece(piece) for piece in parser.finish(how["cut"])])
    return {
        **how,
        "ids": ids,
        "steps": steps,
        "malformed": parser.malformed,
        "ended_with_calls": parser.ended_with_calls,
    }


def _piece(piece: Piece) -> list[Any]:
    call = piece.call
    if call is None:
        return [piece.kind, piece.text]
    return ["call", call.index, call.id, call.name, call.arguments, call.withdrawn]
