"""A short slice of the fuzzing of files: read or refused, never anything else.

The whole: `python -m benchmarks.fuzz_files`.
"""

from __future__ import annotations

import warnings

import pytest

from benchmarks.fuzz_files import KINDS, attend, fuzz

# What parses these is not Python: it could take this process with it.
FOREIGN = ("tokenizer", "prompt_cache")
EXECUTIONS = {"template": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APERTUS_MLX_CACHE", "set anew by the kind that needs it")
    count = EXECUTIONS.get(kind, 150)
    with warnings.catch_warnings():
        if kind in FOREIGN:
            outcomes = attend(kind, 1, 0, count)
        else:
            outcomes = fuzz(kind, 1, 0, count, lambda number: None)
    assert sum(outcomes.values()) == count
    assert not [text for text in outcomes if text.startswith(("crash", "hang"))]
    assert outcomes["accepted"] and outcomes["RejectedError"]
