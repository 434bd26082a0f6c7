"""Every command and every Python example in README and docs runs, as a reader would type it.

What pages say that commands print is compared with what they print, but for times and speeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import GENERATED, PAGES, blocks, mentioned, pipelines, read
from tests.docs.parsing import check_line
from tests.docs.typing_in import alike, read_page

PLACES = [page for page in PAGES if page not in GENERATED]
KINDS = {page: {block.kind for block in blocks(read(page))} for page in PLACES}
WITH_EXAMPLES = [page for page in PLACES if KINDS[page] & {"sh", "console", "python"}]
NIGHTLY = [page for page in PLACES if any(block.mark == "nightly" for block in blocks(read(page)))]
# Where a test of the page's own looks at more of what it prints.
READ_ELSEWHERE = {"docs/tools.md"}
# How often the examples in Python give this answer.
ANSWER = "The capital of France is Paris."
ANSWERS = {"docs/python.md": 4}


@pytest.mark.parametrize("page", sorted(set(WITH_EXAMPLES) - READ_ELSEWHERE))
def test_what_a_page_shows(
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlx_lm")
    read_page(page, monkeypatch, tmp_path)
    answers, said = capsys.readouterr()
    assert answers.count(ANSWER) >= ANSWERS.get(page, 0)
    # Nothing in the Python API prints; what commands say there was taken.
    assert said == ""


@pytest.mark.nightly
@pytest.mark.parametrize("page", NIGHTLY)
def test_what_takes_long(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read_page(page, monkeypatch, tmp_path, at_night=True)


@pytest.mark.parametrize("page", PLACES)
def test_commands_in_sentences_have_these_options(page: str) -> None:
    for line in mentioned(read(page)):
        try:
            check_line(line)
        except Exception as error:
            raise AssertionError(f"{page}: `{line}`: {error}") from error


@pytest.mark.parametrize("page", PLACES)
def test_what_is_printed_stands_where_it_is_compared(page: str) -> None:
    """Only the recordings of `chat`, which are compared with a terminal, have a `$` elsewhere."""
    for block in blocks(read(page)):
        if page != "docs/chat.md":
            assert block.kind == "console" or not block.text.startswith("$ "), block


@pytest.mark.parametrize(
    "line",
    [
        "apertus-mlx generate --temprature 0",
        "apertus-mlx convert --bits four",
        "apertus-mlx translate",
        "echo hello | apertus-mlx generate --no-such",
        "python -m benchmarks.quantizers --bits two",
        "python -m benchmarks.no_such",
        "pip install '.[serv]'",
        "pip install 'apertus-mlx[serve]'",
        "true && frobnicate",
    ],
)
def test_a_line_that_could_not_run_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"."):
        check_line(line)


def test_output_is_compared_but_for_times_and_speeds() -> None:
    page = "read 7 tokens, 93.3 tokens/s\n...\nBern.\n"
    assert alike(page, "read 7 tokens, 5 tokens/s\nand so on\nand on\nBern.\n")
    assert not alike(page, "read 8 tokens, 93.3 tokens/s\nBern.\n")
    assert not alike(page, "read 7 tokens, 93.3 tokens/s\nBasel.\n")


def test_lines_are_split_as_a_shell_does() -> None:
    line = "a 'b c' && printf 'x|y' | d --e \"f && g\" > h"
    assert list(pipelines(line)) == [
        [["a", "b c"]],
        [["printf", "x|y"], ["d", "--e", "f && g", ">", "h"]],
    ]
