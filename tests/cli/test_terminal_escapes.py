"""Names and texts in a stranger's folder that give orders to a terminal: every command shows them.

Each folder holds as many of them as one command can meet at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.builders import config_4x, random_weights, write_checkpoint
from tests.commands import command, refusal

ORDER = "\x1b]0;title\x07\x1b[31mRED\x1b[0m\x9b31m\u202e\r"
SHOWN = "\\x1b]0;title\\x07\\x1b[31mRED\\x1b[0m\\x9b31m\\u202e"
CONFIG = config_4x(num_hidden_layers=1)


def weights(**more: np.ndarray) -> dict[str, np.ndarray]:
    return {**random_weights(CONFIG), **more}


@pytest.fixture(scope="module")
def runnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that runs, with an ignored tensor and an unknown key."""
    tensors = weights(**{f"{ORDER}rotary_emb.inv_freq": np.zeros(8, np.float32)})
    folder = write_checkpoint(tmp_path_factory.mktemp("runnable"), CONFIG, tensors)
    said = {"eos_token_id": 2, ORDER: 1}
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


def require_safe(output: bytes, shown: int) -> None:
    text = output.decode()
    assert text.count(SHOWN) == shown, text
    assert all(line.isprintable() for line in text.replace("\t", "").split("\n")), text


def test_what_a_runnable_folder_makes_commands_say(runnable: Path, tmp_path: Path) -> None:
    # Tokens are printed too: of a model with random weights they are any bytes, for --json escaped.
    done = command("generate", "--model", runnable, "--raw", "x", "-n", "9", "--json")
    assert done.returncode == 0
    require_safe(done.stdout, 0)
    require_safe(done.stderr, 2)
    for arguments, shown in (
        (["inspect", runnable], 1),
        (["convert", runnable, tmp_path / "out"], 1),
    ):
        done = command(*arguments)
        assert done.returncode == 0
        require_safe(done.stdout + done.stderr, shown)
    done = command("inspect", runnable, "--json")
    assert list(json.loads(done.stdout)["not_used"]) == [f"{ORDER}rotary_emb.inv_freq"]
    require_safe(done.stdout, 0)


def test_refusals(tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "a", CONFIG, weights(**{ORDER: np.zeros((2, 2), np.float32)}))
    template = write_checkpoint(tmp_path / "b", CONFIG)
    (template / "chat_template.jinja").write_text("{{ raise_exception('" + ORDER + "') }}")
    quantization = {"bits": 4, "group_size": 64, ORDER: {"bits": 4, "group_size": 64, "x": 1}}
    key = write_checkpoint(tmp_path / "c", {**CONFIG, "quantization": quantization}, weights())
    stray = write_checkpoint(tmp_path / "d", CONFIG, shards=2)
    (stray / f"model{ORDER}.safetensors").write_bytes(b"x")
    for arguments, code in (
        (["inspect", odd], 3),
        (["plan", odd], 3),
        (["convert", odd, "--plan"], 3),
        (["generate", "-m", template, "x"], 3),
        (["inspect", key], 3),
        (["inspect", stray], 3),
        (["inspect", tmp_path / ORDER], 4),
        (["generate", "x", f"--{ORDER}"], 2),
        ([ORDER], 2),
    ):
        done = command(*arguments)
        refusal(done, code)
        assert "\\x1b]0;title\\x07\\x1b[31mRED" in done.stderr.decode(), done
        require_safe(done.stderr, done.stderr.decode().count(SHOWN))
    done = command("verify", stray)
    assert done.returncode == 3
    require_safe(done.stdout + done.stderr, 1)
