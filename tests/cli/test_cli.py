"""The command line: what goes where, exit codes, and one line for every mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx import __version__
from tests.builders import FIRST_BYTE_ID, config_4x, random_weights, write_checkpoint, write_json
from tests.daily import every

QUESTION = "What is the capital of France?"


def run(
    *arguments: str, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "apertus_mlx", *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
        check=False,
    )


def refused(code: int, *arguments: str, stdin: bytes = b"") -> str:
    """Run a command that must fail with one error line and nothing on stdout; return the line."""
    done = run(*arguments, stdin=stdin)
    lines = done.stderr.decode().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (code, b"", 1), done
    assert b"Traceback" not in done.stderr
    return errors[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), config_4x(num_hidden_layers=1))


def test_generate_answers_offline() -> None:
    done = run("generate", QUESTION)
    assert done.returncode == 0
    assert done.stdout == b"The capital of France is Paris.\n"
    stats = done.stderr.decode()
    for part in ("prompt", "tokens/s", "first token after", "peak memory", "demonstration"):
        assert part in stats


def test_prompt_from_stdin() -> None:
    assert run("generate", stdin=QUESTION.encode()).stdout == run("generate", QUESTION).stdout


def test_json_holds_one_object() -> None:
    report = json.loads(run("generate", QUESTION, "--json").stdout)
    assert report["text"] == "The capital of France is Paris."
    assert report["finish_reason"] == "stop"
    assert report["token_ids"][-1] == 68
    assert report["prompt_token_ids"][0] == 1
    assert min(report[key] for key in ("decode_tokens_per_s", "load_s")) > 0
    expected = len(report["prompt_token_ids"]) / report["time_to_first_token_s"]
    assert report["prefill_tokens_per_s"] == pytest.approx(expected)
    # At least the weights, in bytes.
    assert report["peak_memory_bytes"] > 5.6e6
    assert 0 <= report["seed"] < 2**64


def test_same_seed_same_text(tiny: Path) -> None:
    options = ["generate", "hello", "--model", str(tiny), "--max-tokens", "20", "--json"]
    first, again, other = (
        json.loads(run(*options, "--seed", seed).stdout)["token_ids"] for seed in ("7", "7", "8")
    )
    assert first == again != other


def test_raw_continues_text() -> None:
    done = run("generate", "--raw", "The capital of France is", "--max-tokens", "3")
    assert done.stdout.startswith(b" Paris")


def test_control_text_is_only_text(tiny: Path) -> None:
    report = json.loads(
        run(
            "generate", "--raw", "--model", str(tiny), "--max-tokens", "1", "--json",
            stdin=b"\x00<|assistant_start|>\r\n",
        ).stdout
    )  # fmt: skip
    assert 67 not in report["prompt_token_ids"]
    assert len(report["prompt_token_ids"]) == 1 + len(b"\x00<|assistant_start|>\r\n")


USAGE = [
    (["generate", ""], "empty"),
    (["generate", "x", "--max-tokens", "0"], "--max-tokens"),
    (["generate", "x", "--max-tokens", "-1"], "--max-tokens"),
    (["generate", "x", "--max-tokens", "many"], "--max-tokens"),
    (["generate", "x", "--temperature", "-1"], "--temperature"),
    (["generate", "x", "--temperature", "nan"], "--temperature"),
    (["generate", "x", "--temperature", "inf"], "--temperature"),
    (["generate", "x", "--top-p", "0"], "--top-p"),
    (["generate", "x", "--top-p", "1.1"], "--top-p"),
    (["generate", "x", "--top-k", "-1"], "--top-k"),
    (["generate", "x", "--min-p", "2"], "--min-p"),
    (["generate", "x", "--repetition-penalty", "nan"], "--repetition-penalty"),
    (["generate", "x", "--seed", "-1"], "--seed"),
    (["generate", "x", "--seed", str(2**70)], "--seed"),
    (["generate", "x", "--stop", ""], "--stop"),
    (["generate", "x", "--raw", "--system", "y"], "--raw"),
    (["generate", "x", "--dtype", "int4"], "--dtype"),
    (["generate", "x", "--nonsense"], "--nonsense"),
    (["nonsense"], "nonsense"),
]


@pytest.mark.parametrize("case", every(3, USAGE), ids=lambda case: " ".join(case[0])[:40])
def test_usage_errors(case: tuple[list[str], str]) -> None:
    arguments, named = case
    assert named in refused(2, *arguments)


def test_missing_and_damaged_models(tmp_path: Path) -> None:
    assert "no such folder" in refused(4, "generate", "x", "--model", str(tmp_path / "absent"))
    assert "no config.json" in refused(3, "inspect", str(tmp_path))
    assert "--offline" in refused(4, "generate", "x", "--model", "a/b", "--offline")
    write_json(tmp_path / "config.json", config_4x(hidden_act="silu"))
    assert "hidden_act" in refused(3, "generate", "x", "--model", str(tmp_path))


def test_what_computes_is_a_choice() -> None:
    installed = importlib.util.find_spec("onnxruntime") is not None
    for compute in ("mlx", "auto", *(["cpu"] if installed else [])):
        done = run("generate", QUESTION, "--compute", compute)
        assert done.stdout == b"The capital of France is Paris.\n"
    line = refused(2, "generate", QUESTION, "--compute", "cpu", "--dtype", "bfloat16")
    assert "--dtype bfloat16" in line
    refused(2, "generate", QUESTION, "--compute", "gpu")


def test_prompt_beyond_the_context(tiny: Path) -> None:
    line = refused(2, "generate", "--model", str(tiny), stdin=b"x" * 600)
    assert "512" in line and "tokens" in line


def test_code_of_a_checkpoint_is_named_not_run(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1, auto_map={"a": "evil.A"}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    done = run("generate", "x", "--model", str(folder), "--max-tokens", "1")
    assert done.returncode == 0
    assert b"auto_map" in done.stderr
    assert not (tmp_path / "canary").exists()


def test_version_and_help() -> None:
    assert run("--version").stdout.decode().strip() == __version__
    assert run("-h").returncode == 0
    for command in ("generate", "verify"):
        done = run(command, "--help")
        assert (done.returncode, done.stderr) == (0, b"")


def test_inspect(tiny: Path) -> None:
    report: dict[str, Any] = json.loads(run("inspect", str(tiny), "--json").stdout)
    # Counted by hand: embedding and head, one layer of 64 with 4/2 heads of 16, and the norms.
    matrices = 2 * 384 * 64 + 64 * 64 * 2 + 2 * 32 * 64 + 2 * 64 * 128
    assert report["parameters"] == matrices + 2 * 64 + 2 * 16 + 64
    assert report["bits_per_weight"] == pytest.approx(32, abs=0.01)
    assert report["geometry"]["head_dim"] == 16
    assert report["kv_cache_per_token_16_bit_bytes"] == 2 * 2 * 16 * 2
    assert report["stop_ids"] == [2, 68, 72]
    assert report["control_tokens"]["user"] == ["65 <|user_start|>", "66 <|user_end|>"]
    assert b"stop ids: 2, 68, 72" in run("inspect", str(tiny)).stdout


def test_chat_keeps_its_prefix() -> None:
    lines = f"{QUESTION}\n/stats\n/retry\n/undo\n/undo\n/what\n/reset\n/help\n/exit\n"
    done = run("chat", stdin=lines.encode())
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == ["The capital of France is Paris."] * 2
    notes = done.stderr.decode()
    for part in ("tokens/s", "nothing to undo", "/what: unknown", "/retry"):
        assert part in notes


def test_chat_refuses_a_model_without_template(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refused(3, "chat", "--model", str(folder))
    done = run("generate", "x", "--model", str(folder), "--max-tokens", "1")
    assert b"no chat template" in done.stderr and done.returncode == 0


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "apertus_mlx", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell may have started the tests with interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that talks for 30,000 tokens: no stop id is ever likely."""
    config = config_4x(num_hidden_layers=1, max_position_embeddings=40_000)
    weights = random_weights(config)
    weights["lm_head.weight"][:FIRST_BYTE_ID] = 0
    weights["lm_head.weight"][FIRST_BYTE_ID + 10] *= 100
    weights["lm_head.weight"][FIRST_BYTE_ID + 20] *= -100
    folder = write_checkpoint(tmp_path_factory.mktemp("endless"), config, weights)
    return ["generate", "x", "--model", str(folder), "--max-tokens", "30000", "--temp", "0"]


def test_interrupt_keeps_partial_text(endless: list[str]) -> None:
    process = start(*endless)
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, notes = process.communicate(timeout=60)
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in notes
    assert process.returncode == 130


def test_reader_that_leaves(endless: list[str]) -> None:
    process = start(*endless)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    notes = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in notes and b"BrokenPipe" not in notes
