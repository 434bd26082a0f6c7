"""`bench`: what is counted, who measures when, what a side may do wrong, and what is printed."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apertus_mlx.backend import hardware
from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.header import DTYPE_BITS
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.cli import bench as bench_command
from apertus_mlx.cli import main
from apertus_mlx.errors import ApertusError, RejectedError, ResourceError
from apertus_mlx.generation.draft_pace import FixedPace
from apertus_mlx.generation.drafts import Drafting, ModelDraft
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.measure.bench.drafted import Drafted
from apertus_mlx.measure.bench.ours import Ours
from apertus_mlx.measure.bench.report import measurements
from apertus_mlx.measure.bench.roofline import Bandwidth, kv_read_bytes, weights_read_bytes
from apertus_mlx.measure.bench.sides import Ready, Settings, Side
from apertus_mlx.measure.bench.stopwatch import Stopwatch
from apertus_mlx.measure.bench.turns import Figure, ratios, time_task, total_tokens
from apertus_mlx.measure.bench.workload import Task, Workload, make_workload, random_prompt
from apertus_mlx.memory.devices import published_bandwidth
from tests.builders import config_4x, write_checkpoint, write_json
from tests.daily import every

SIZES = {
    "0.5B": config_4x(
        hidden_size=1024, intermediate_size=6144, num_hidden_layers=20, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=131072, tie_word_embeddings=True,
    ),
    "1.5B": config_4x(
        hidden_size=2048, intermediate_size=12288, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=131072,
    ),
}  # fmt: skip
FORM = {"bits": 4, "group_size": 64}
READY = Ready("1", "nothing", False, [], "bfloat16", "full precision", 2, 512, 0.5)
SETTINGS = Settings(".", 100, 4, 0, None, "auto", "auto", {}, 512, 0, 0)
TINY = ("--prompt-tokens", "3,8", "--depths", "0,5", "--new-tokens", "2", "--rounds", "2")


def inventory_of(size: str, folder: Path) -> Inventory:
    """A checkpoint with headers and no weights: its file has a hole where they would be."""
    values = {**SIZES[size], "quantization": FORM}
    config = parse_config(SIZES[size], size)
    tensors = {key: ("BF16", shape) for key, shape in layout.vectors(config)}
    for matrix in layout.matrices(config):
        tensors[matrix.weight] = ("U32", (matrix.rows, matrix.columns * 4 // 32))
        for part in ("scales", "biases"):
            tensors[f"{matrix.path}.{part}"] = ("BF16", (matrix.rows, matrix.columns // 64))
    header: dict[str, Any] = {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        offsets = {"data_offsets": [begin, end]}
        header[key] = {"dtype": dtype, "shape": list(shape), **offsets}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    write_json(folder / "config.json", values)
    return take_inventory(folder)


# By hand: 4.5 bits for each of 438,304,768 and 1,241,513,984 weights, 2 bytes for each number of
# norms and xIELU, and a row of the embedding. Rates: what 120 GB/s (an M4) makes of the MB.
@pytest.mark.parametrize(
    ("size", "quantized", "vectors", "row", "megabytes", "at_120_gb"),
    [
        ("0.5B", 246_546_432, 20 * (2 * 1024 + 2 * 64 + 4) + 1024, 576, 247, 487),
        ("1.5B", 698_351_616, 16 * (2 * 2048 + 2 * 64 + 4) + 2048, 1152, 698, 172),
    ],
)
def test_bytes_and_roofline_of_the_released_sizes(
    size: str,
    quantized: int,
    vectors: int,
    row: int,
    megabytes: int,
    at_120_gb: int,
    tmp_path: Path,
) -> None:
    inventory = inventory_of(size, tmp_path)
    read = weights_read_bytes(inventory)
    assert read == quantized + 2 * vectors + row
    assert round(read / 1e6) == megabytes
    # The notes' rates leave out norms and the cache.
    workload = Workload((), (0,), 1, 1, 0)
    task = Task("decode", 0)
    bandwidth = Bandwidth(120e9, 1.0)
    (found,) = measurements(
        inventory, bandwidth, workload, READY, CacheConfig(), {task: [[1 / 100]]}
    )
    assert found.roofline_tokens_per_s is not None and found.roofline_share is not None
    assert found.roofline_tokens_per_s == pytest.approx(at_120_gb, rel=0.002)
    assert found.roofline_share == pytest.approx(100 / at_120_gb, rel=0.002)


def test_bytes_of_the_cache() -> None:
    small, large = (parse_config(SIZES[size], size) for size in SIZES)
    full = CacheConfig()
    assert kv_read_bytes(small, full, 999, 1, 2) == 1000 * 20 * 1024
    assert kv_read_bytes(large, full, 999, 1, 2) == 1000 * 32 * 1024
    assert kv_read_bytes(large, full, 999, 1, 4) == 1000 * 64 * 1024
    # Steps at 1,025 to 1,028 positions.
    assert kv_read_bytes(small, full, 1024, 4, 2) == 2053 * 20 * 1024 // 2
    assert kv_read_bytes(small, CacheConfig(bound=512), 4096, 64, 2) == 512 * 20 * 1024
    # 8.5 bits for 2 * 20 * 4 * 64 numbers; of 1,000 positions 29 blocks of 32 are coded by then,
    # since 4 sinks and the latest 64 stay as they are.
    coded = 29 * 32
    assert kv_read_bytes(small, CacheConfig(8, 8), 999, 1, 2) == (
        coded * 10_240 * 17 // 16 + (1000 - coded) * 20 * 1024
    )


def test_bandwidth_by_the_name_of_the_chip() -> None:
    assert published_bandwidth("Apple M4 Pro") == 273e9
    assert published_bandwidth("Apple M1") == 68.25e9
    assert published_bandwidth("Apple M2 Max") == 400e9
    # Two kinds of one name, told by their memory.
    assert published_bandwidth("Apple M3 Max") is None
    assert published_bandwidth("Apple M3 Max", 36 * 2**30) == 300e9
    assert published_bandwidth("Apple M3 Max", 64 * 2**30) == 400e9
    assert published_bandwidth("Apple A18 Pro") is None
    assert published_bandwidth("Apple M1 (Virtual)") is None
    assert published_bandwidth("M1") is None
    assert published_bandwidth("AMD EPYC") is None
    assert Bandwidth(None, 2.0).reference == 2.0
    assert Bandwidth(3.0, 2.0).reference == 3.0


def test_figures() -> None:
    figure = Figure.of([3.0, 1.0, 2.0, 2.5])
    assert (figure.median, figure.spread) == (2.25, 1.0)
    assert str(figure) == "2.25 ± 1.00"
    assert str(Figure.of([1234.5])) == "1,234"
    # Twice as fast in one round, three times in the other.
    assert ratios([[1.0, 1.0], [1.0, 1.0]], [[1.5, 2.5], [3.0, 3.0]]) == Figure(
        2.5, 0.5, (2.0, 3.0)
    )


class Fake:
    """A side that writes down when it was asked, and takes as many seconds as were asked of all."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    def seconds(self, task: Task) -> float:
        self._log.append(self._name)
        return float(len(self._log))


def test_turns() -> None:
    log: list[str] = []
    shown: list[int] = []
    workload = Workload((7,), (), 1, 2, 0)
    task = Task("prefill", 7)
    taken = time_task([Fake("A", log), Fake("B", log)], task, workload, shown.append)
    assert "".join(log) == "AB" + "ABBA" + "ABBA"
    assert taken == [[[3, 6], [7, 10]], [[4, 5], [8, 9]]]
    assert shown == [7 * count for count in range(1, 11)]
    assert shown[-1] == total_tokens(2, task, workload)
    log.clear()
    assert time_task([Fake("A", log)], task, workload, shown.append) == [[[2], [3]]]
    assert len(log) * 7 == total_tokens(1, task, workload)


def test_workload() -> None:
    asked = make_workload("512,128, 128", "1000,0", 8, 3, 1, 4096)
    assert list(map(str, asked.tasks)) == [
        "prefill 128", "prefill 512", "decode at 0", "decode at 1000"
    ]  # fmt: skip
    # The prompt, the tokens that are timed, and one that is under way by then.
    assert asked.context == 1000 + 8 + 1
    usual = make_workload(None, None, 64, 5, 0, 4096)
    assert (usual.prompt_tokens, usual.depths) == ((128, 512, 2048), (0, 1024, 4031))
    assert usual.context == 4096
    assert make_workload(None, "", 64, 5, 0, 8192).depths == ()
    prompt = random_prompt(1000, 50, 3)
    assert prompt == random_prompt(1000, 50, 3) != random_prompt(1000, 50, 4)
    assert set(prompt) == set(range(50))


class Layer:
    offset = 0
    state: tuple[()] = ()


class FakeEngine:
    """Counts instead of computing; `can_rewind` says whether its caches can go back."""

    def __init__(self, can_rewind: bool) -> None:
        self._can_rewind = can_rewind
        self.log: list[Any] = []
        self.spent_s = 0

    def make_cache(self) -> list[Any]:
        return [Layer()]

    def read(self, prompt: list[int], cache: list[Any]) -> None:
        self.log.append(("read", len(prompt)))
        self.spent_s += len(prompt)
        cache[0].offset += len(prompt)

    def tokens(self, prompt: list[int], cache: list[Any]) -> Generator[int, None, None]:
        self.log.append(("prompt", cache[0].offset, len(prompt)))
        cache[0].offset += len(prompt)
        self.spent_s += len(prompt)
        count = 0
        try:
            while True:
                cache[0].offset += 1
                count += 1
                self.spent_s += 1
                yield 0
        finally:
            self.log.append(count)

    def rewind(self, cache: list[Any], positions: int) -> bool:
        if self._can_rewind:
            cache[0].offset -= positions
        return self._can_rewind


@pytest.mark.parametrize("can_rewind", [True, False])
def test_what_is_timed(can_rewind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(can_rewind)
    # A prompt takes a second for each token, a token drawn takes one.
    clock = SimpleNamespace(perf_counter=lambda: engine.spent_s)
    monkeypatch.setattr("apertus_mlx.measure.bench.stopwatch.time", clock)
    watch = Stopwatch(engine, vocab_size=10, new_tokens=4, seed=0)
    # Tokens drawn: one after a prompt; behind a depth that one and those that are timed.
    assert watch.seconds(Task("prefill", 9)) == 10
    assert engine.log == [("prompt", 0, 9), 1]
    engine.log.clear()
    assert watch.seconds(Task("decode", 6)) == 4
    assert watch.seconds(Task("decode", 6)) == 4
    again = [] if can_rewind else [("read", 5)]
    assert engine.log == [("read", 5), ("prompt", 5, 1), 5, *again, ("prompt", 5, 1), 5]
    engine.log.clear()
    watch.seconds(Task("decode", 0))
    assert engine.log == [("prompt", 0, 1), 5]


def side_of(code: str) -> Side:
    return Side("odd", [sys.executable, "-c", code], SETTINGS)


def serving(body: str) -> str:
    return (
        "from apertus_mlx.measure.bench.sides import *\n"
        "import os, signal\nfrom contextlib import contextmanager\n"
        "from apertus_mlx.errors import RejectedError\n"
        f"@contextmanager\ndef open_side(settings):\n    {body}\n"
        f"    yield Loaded({READY!r}, seconds)\n"
        "serve(open_side)"
    )


def test_a_side_may_print() -> None:
    body = "print('noise')\n    def seconds(task): print('noise'); return float(task.tokens)"
    side = side_of(serving(body))
    try:
        assert side.ready == READY
        assert [side.seconds(Task("prefill", n)) for n in (3, 4)] == [3.0, 4.0]
        assert side.peak_memory_bytes > 0 and side.start_s > 0
    finally:
        side.close()


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("raise ValueError('all is lost')", ApertusError, "code 1): ValueError: all is lost"),
        ("import os; os._exit(7)", ApertusError, "code 7): without a word"),
        ("print('half a line', end='', flush=True)", ApertusError, "code 0)"),
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "too little memory"),
        (serving("raise RejectedError('damaged')"), RejectedError, "^damaged$"),
    ],
)
def test_a_side_that_does_not_start(code: str, kind: type[ApertusError], said: str) -> None:
    with pytest.raises(ApertusError, match=said.replace(")", r"\)")) as caught:
        side_of(code)
    assert type(caught.value) is kind


@pytest.mark.parametrize("body", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGSEGV)", "1 / 0"])
def test_a_side_that_crashes_later(body: str) -> None:
    side = side_of(serving(f"def seconds(task): {body}"))
    try:
        with pytest.raises(ApertusError, match="the odd side ended"):
            side.seconds(Task("prefill", 1))
    finally:
        side.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apertus_mlx", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, Path]:
    """The report on the embedded model beside mlx-lm, what went to stderr, and the plot."""
    pytest.importorskip("mlx_lm")
    plot = tmp_path_factory.mktemp("bench") / "speed.svg"
    done = run(*TINY, "--against", "mlx-lm", "--json", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, plot


@pytest.mark.nightly
def test_json_is_complete(compared: tuple[Any, str, Path]) -> None:
    report, said, plot = compared
    names = [side["name"] for side in report["sides"]]
    assert names == ["apertus-mlx", "mlx-lm"]
    assert report["workload"] == {
        "prompt_tokens": [3, 8], "depths": [0, 5], "new_tokens": 2, "rounds": 2, "seed": 0
    }  # fmt: skip
    tasks = [["prefill", 3], ["prefill", 8], ["decode", 0], ["decode", 5]]
    for side in report["sides"]:
        assert side["peak_memory_bytes"] > 10**7
        assert 0 < side["ready"]["load_s"] < side["start_s"]
        assert all(side["ready"][key] for key in ("version", "backend", "dtype", "cache"))
        assert [list(one["task"].values()) for one in side["measurements"]] == tasks
        for one in side["measurements"]:
            tokens = one["task"]["tokens"] if one["task"]["kind"] == "prefill" else 2
            flat = [seconds for turns in one["seconds"] for seconds in turns]
            assert [len(turns) for turns in one["seconds"]] == [2, 2]
            assert one["tokens_per_s"]["samples"] == pytest.approx([tokens / s for s in flat])
            is_decode = one["task"]["kind"] == "decode"
            assert (one["roofline_share"] is not None) == is_decode
    # Each side caches numbers of its own type.
    sizes = [side["ready"]["number_bytes"] for side in report["sides"]]
    kv = [side["measurements"][3]["kv_read_bytes"] for side in report["sides"]]
    assert kv[0] * sizes[1] == kv[1] * sizes[0]
    assert [list(one["task"].values()) for one in report["ratios"]] == tasks
    assert all(len(one["ratio"]["samples"]) == 2 for one in report["ratios"])
    identity = report["machine"]["identity"]
    assert all(identity[key] for key in ("chip", "system", "mlx", "package"))
    assert report["model"]["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert report["date"][:2] == "20"
    assert any("Metal" in note for note in report["notes"]) == (not report["machine"]["metal"])
    assert "mlx-lm: loading" in said and "decode at 5" in said
    labels = set(re.findall(r"<!-- (.*?) -->", plot.read_text()))
    assert {"roofline", "depth, tokens", "decoded tokens/s", "0"} <= labels


def test_table_on_stdout(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_4x(hidden_size=128))
    done = run(str(tmp_path), *TINY, "--kv-bits", "8", "--compute", "mlx", "--offline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(tmp_path)) and "32.00 bits per weight" in lines[0]
    assert any("MLX on the" in line and "cache in 8 bits" in line for line in lines)
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == ["tokens/s", "apertus-mlx", "KV", "read", "roofline"]
    assert [line.split("  ")[0] for line in table[1:]] == [
        "prefill 3", "prefill 8", "decode at 0", "decode at 5"
    ]  # fmt: skip
    assert all(line.endswith("%") for line in table[3:])


def test_mlx_lm_stays_in_its_process() -> None:
    script = "import sys, apertus_mlx.measure.bench.peer\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {
        "mlx_lm",
        "apertus_mlx.model.apertus",
        "apertus_mlx.generation.decode",
        "onnxruntime",
    }


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The only line that a command which must fail says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["apertus-mlx", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert (ended.value.code, said.out) == (code, "")
    assert "Traceback" not in said.err
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--new-tokens", "0"], "--new-tokens"),
        (["--new-tokens", "5000"], "--new-tokens 5000"),
        (["--seed", "-1"], "--seed"),
        (["--prompt-tokens", "many"], "--prompt-tokens 'many'"),
        (["--prompt-tokens", "8,,9"], "--prompt-tokens"),
        (["--prompt-tokens", "0"], "--prompt-tokens"),
        (["--prompt-tokens", "1e3"], "--prompt-tokens"),
        (["--prompt-tokens", "99999999999999"], "--prompt-tokens"),
        (["--prompt-tokens", "9000"], "context"),
        (["--depths", "-1"], "--depths"),
        (["--depths", "2048"], "context"),
        (["--depths", "", "--prompt-tokens", ""], "nothing to measure"),
        (["--against", "llama"], "--against"),
        (["--against", "mlx-lm", "--draft", "lookup"], "give one of them"),
        (["--plot", "speed.gif"], "--plot"),
        (["--plot", "speed.png", "--depths", ""], "--depths"),
        (["--kv-bits", "5"], "--kv-bits"),
        (["--memory-limit", "much"], "--memory-limit"),
        (["--compute", "cpu", "--dtype", "bfloat16"], "--dtype"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in refused(capsys, 2, *arguments)


def test_what_cannot_be_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "memory" in refused(capsys, 5, *TINY, "--memory-limit", "1MB")
    assert "nowhere" in refused(capsys, 4, "nowhere", "--offline")
    write_checkpoint(tmp_path, config_4x(model_file="own.py"))
    if hardware.has_library("mlx_lm"):
        assert "model_file" in refused(capsys, 3, str(tmp_path), *TINY, "--against", "mlx-lm")
    monkeypatch.setattr(hardware, "has_library", lambda _: False)
    assert "pip install mlx-lm" in refused(capsys, 2, "--against", "mlx-lm")
    # A side that crashes is one line, too, and an exit code.
    monkeypatch.setattr(bench_command, "SIDES", (("apertus-mlx", "apertus_mlx.nowhere"),))
    assert "the apertus-mlx side ended" in refused(capsys, 1, *TINY)


@pytest.mark.parametrize("kv", every(2, [{"key_bits": 4, "value_bits": 4}, {}]), ids=str)
def test_a_side_with_a_draft_decodes_the_same(kv: dict[str, int]) -> None:
    """Behind tokens that were read before, twice on one cache."""
    loaded = open_folder(model_dir()).load(RunOptions(compute="mlx", dtype="float32"))
    form, width = CacheConfig(**kv), loaded.folder.config.output_vocab_size
    draft = ModelDraft(loaded.model, 256, width)
    plain = Ours(loaded.model, form, 512)
    drafted = Drafted(loaded.model, form, 512, Drafting(draft, FixedPace(3)))
    found = []
    for engine in (plain, drafted):
        cache = engine.make_cache()
        engine.read([80, 81, 82, 83], cache)
        for _ in range(2):
            with closing(engine.tokens([84], cache)) as tokens:
                found.append([next(tokens) for _ in range(12)])
            assert engine.rewind(cache, cache[0].offset - 4)
    assert found == [found[0]] * 4
    assert drafted.speculation.accepted > 10


@pytest.mark.nightly
def test_with_a_draft_and_without() -> None:
    report = json.loads(run(*TINY, "--draft", "lookup", "--json").stdout)
    names = [side["name"] for side in report["sides"]]
    assert names == ["with the draft", "plain"]
    assert report["sides"][1]["speculation"] is None
    assert report["sides"][0]["speculation"]["passes"] > 0
