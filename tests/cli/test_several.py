"""Commands as ranks: rank 0 speaks, and where one rank dies none hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_mlx.backend import ranks
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.cli import several
from apertus_mlx.errors import NotFoundError, UsageError
from tests.builders import config_4x, write_checkpoint
from tests.ranks import ends, start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Answers go on for longer than a test."""
    return write_checkpoint(tmp_path / "model", config_4x(max_position_embeddings=65_536))


def answering(folder: Path, model: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    """Ranks in the middle of an answer, of which rank 0 has printed the beginning."""
    command = ["-m", "apertus_mlx", "generate", "Hello", "-m", str(model), "--temp", "0"]
    endless = [*command, "-n", "60000", *(f"--logit-bias={id}=-100" for id in (2, 68, 72))]
    processes = start(folder, [endless] * count)
    assert processes[0].stdout is not None
    assert processes[0].stdout.read(2)
    return processes


def test_a_killed_rank_ends_all_and_is_named(tmp_path: Path, model: Path) -> None:
    processes = answering(tmp_path, model)
    processes[1].kill()
    (code, _, err), (_, other_out, other_err) = ends(processes)
    assert code == 4
    expected = "error: rank 1 (127.0.0.1) is gone: its process has ended; all ranks end"
    assert err.splitlines()[-1] == expected
    assert (other_out, other_err) == ("", "")


@pytest.mark.nightly
@pytest.mark.parametrize("gone", [0, 2])
def test_of_three_others_one_names_a_killed_rank(gone: int, tmp_path: Path, model: Path) -> None:
    wide = config_4x(max_position_embeddings=65_536, num_key_value_heads=4)
    processes = answering(tmp_path, write_checkpoint(tmp_path / "wide", wide), 4)
    processes[gone].kill()
    found = ends(processes)
    assert [code for code, _, _ in found if code != -signal.SIGKILL] == [4, 4, 4]
    lines = [line for _, _, err in found for line in err.splitlines() if "error" in line]
    expected = f"error: rank {gone} (127.0.0.1) is gone: its process has ended; all ranks end"
    assert lines == [expected]


@pytest.mark.nightly
def test_a_rank_that_stands_still_ends_all(tmp_path: Path, model: Path) -> None:
    processes = answering(tmp_path, model)
    os.kill(processes[1].pid, signal.SIGSTOP)
    code, _, err = ends(processes[:1])[0]
    processes[1].kill()
    ends(processes[1:])
    assert code == 4
    assert "rank 1 (127.0.0.1) has been silent for 10 s" in err.splitlines()[-1]


@pytest.mark.nightly
def test_rank_0_speaks_for_all(tmp_path: Path, model: Path) -> None:
    command = ["-m", "apertus_mlx", "generate", "Hello", "-n", "20", "--seed", "1", "-m"]
    alone = subprocess.run(
        [sys.executable, *command, str(model), "--compute", "mlx"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    first, second = ends(start(tmp_path, [[*command, str(model)]] * 2))
    assert first[:2] == (0, alone.stdout)
    assert second == (0, "", "")
    lost, other = ends(start(tmp_path, [[*command, str(model)], [*command, str(tmp_path)]]))
    assert lost[0] == 4
    assert other[2].startswith("rank 1 (127.0.0.1): error: ")
    plans = ends(start(tmp_path, [["-m", "apertus_mlx", "plan"]] * 2))
    assert [code for code, _, _ in plans] == [2, 2]
    assert plans[0][2].startswith("error: plan: computes on one machine")
    assert plans[1][1:] == ("", "")


@pytest.mark.nightly
@pytest.mark.parametrize("split", [[], ["--pipeline"]])
def test_every_rank_keeps_its_part_of_a_prompt(
    tmp_path: Path, model: Path, split: list[str]
) -> None:
    command = ["-m", "apertus_mlx", "generate", "Hello", "-n", "9", "--temp", "0", "--json"]
    command += ["-m", str(model), "--compute", "mlx"]
    alone = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True
    )  # fmt: skip
    expected = json.loads(alone.stdout)
    command += ["--prompt-cache", str(tmp_path / "prompt"), *split]
    for reused in (0, expected["prompt_tokens"] - 1):
        (code, out, err), other = ends(start(tmp_path, [command] * 2))
        assert (code, other) == (0, (0, "", "")), err
        told = json.loads(out)
        assert told["token_ids"] == expected["token_ids"]
        assert told["reused_prompt_tokens"] == reused
    assert sorted(each.name for each in tmp_path.glob("prompt*")) == ["prompt", "prompt.1"]
    (tmp_path / "prompt.1").unlink()
    found = ends(start(tmp_path, [command] * 2))
    assert [code for code, _, _ in found] == [2, 2]
    said = "rank 1 (127.0.0.1) has another prompt cache than rank 0 (127.0.0.1)"
    assert said in found[0][2]
    other_split = [each for each in command if each not in split] + (["--pipeline"] * (not split))
    found = ends(start(tmp_path, [other_split] * 2))
    assert found[0][0] == 3
    assert "prompt: was made by rank 0 of 2 with " in found[0][2]


@pytest.mark.nightly
@pytest.mark.parametrize("split", [[], ["--pipeline"]])
def test_bench_of_ranks(tmp_path: Path, model: Path, split: list[str]) -> None:
    command = ["-m", "apertus_mlx", "bench", str(model), "--prompt-tokens", "8", "--depths", "0"]
    command += ["--new-tokens", "3", "--rounds", "1", "--json", *split]
    (code, out, err), other = ends(start(tmp_path, [command] * 2))
    assert (code, other) == (0, (0, "", "")), err
    told = json.loads(out)
    (side,) = told["sides"]
    what = "layers 0 to 0" if split else "a share of each layer"
    assert side["ready"]["backend"] == f"MLX on the CPU, rank 0 of 2 with {what}"
    assert [each["task"]["kind"] for each in side["measurements"]] == ["prefill", "decode"]
    assert all(each["tokens_per_s"]["median"] > 0 for each in side["measurements"])
    assert side["measurements"][1]["roofline_share"] is None
    # Both machines' weights, as one would have them.
    assert told["model"]["parameters"] == layout.parameter_count(read_config(model))


@pytest.mark.nightly
@pytest.mark.parametrize("interrupted", [0, 1])
def test_an_interrupt_of_one_rank_ends_all(tmp_path: Path, model: Path, interrupted: int) -> None:
    processes = answering(tmp_path, model)
    processes[interrupted].send_signal(signal.SIGINT)
    found = ends(processes)
    assert [code for code, _, _ in found] == [130, 130]
    assert not any("error" in err or "Traceback" in err for _, _, err in found)


NOBODY_READS = """
import os
from apertus_mlx.cli import several
several.PRINTING_S = 0.1
os.set_blocking(1, False)
try:
    while os.write(1, bytes(4096)):
        pass
except BlockingIOError:
    os.set_blocking(1, True)
several._end("rank 1 is gone", 4)
"""


def test_a_rank_ends_though_nobody_reads_what_it_prints() -> None:
    command = [sys.executable, "-c", NOBODY_READS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.wait(60) == 4
        finally:
            process.kill()


class OneOfTwo:
    """What a rank sees of an exchange in which rank 0 sends `sent`."""

    def __init__(self, rank: int, sent: bytes = b"") -> None:
        self.rank, self.sent = rank, sent

    def shared(self, numbers: list[int]) -> list[int]:
        if self.rank == 0:
            self.sent = bytes(numbers)
        return list(self.sent)


def test_what_rank_0_finds_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def found_by(rank: OneOfTwo, find: Callable[[], str]) -> str:
        monkeypatch.setattr(ranks, "_joined", [rank])
        return several.of_rank_0(find)

    def fails() -> str:
        raise NotFoundError("chat.json: there is no such file")

    first = OneOfTwo(0)
    assert found_by(first, lambda: "Grüezi") == "Grüezi"
    assert found_by(OneOfTwo(1, first.sent), fails) == "Grüezi"
    with pytest.raises(NotFoundError, match="no such file"):
        found_by(first, fails)
    with pytest.raises(UsageError):
        found_by(OneOfTwo(1, first.sent), fails)
