"""Whatever happens in a conversation, its cache holds what was said, and nothing else."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest

from apertus_mlx.backend.choose import Compute
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from tests.builders import config_4x, write_checkpoint
from tests.cache_sequences import FORMS, Counts, Play

SEQUENCES, STEPS = 6, 6
# A ring of rows that is full, and one of codes.
DAILY = ("full", "bounded", "4 bits, bounded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_4x(num_attention_heads=2, head_dim=32, max_position_embeddings=4096)
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


@pytest.mark.parametrize(
    "form",
    [form if form in DAILY else pytest.param(form, marks=pytest.mark.nightly) for form in FORMS],
)
@pytest.mark.parametrize("compute", ["mlx", pytest.param("cpu", marks=pytest.mark.nightly)])
def test_logits_are_those_of_a_fresh_run(
    compute: Compute, form: str, folder: Path, tmp_path: Path
) -> None:
    if compute == "cpu":
        pytest.importorskip("onnxruntime")
    loaded = open_folder(folder).load(RunOptions(dtype="float32", compute=compute))
    counts = Counts()
    first = crc32(f"{compute} {form}".encode())
    for seed in range(first, first + SEQUENCES):
        Play(loaded, FORMS[form], seed, counts, tmp_path).play(STEPS)
    assert counts.sequences == SEQUENCES
    assert counts.interrupts and counts.compared
