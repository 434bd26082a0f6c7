"""The CPU path's planned peak beside what fresh processes really held (Linux's `VmHWM`).

    python -m benchmarks.cpu_memory MODEL ... [--prompt-tokens N ...] [--steps N ...] [--json]

Each run is `apertus-mlx generate --compute cpu` on a prompt of so many tokens with an answer of 8,
with a form of cache and a prefill step that are kept as given. Models are those of
`benchmarks.make_checkpoint`, converted to each width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.text.tokenizer import Tokenizer

NEW_TOKENS = 8
FORMS = {
    "full": (),
    "8 bits": ("--kv-bits", "8"),
    "4 bits": ("--kv-bits", "4"),
    "full, at most 512": ("--max-kv", "512"),
    "4 bits, at most 512": ("--kv-bits", "4", "--max-kv", "512"),
}


def main() -> None:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 256, 1000, 4000])
    parser.add_argument("--steps", type=int, nargs="+", default=[512])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    ratios = []
    for model, tokens, form, step in itertools.product(
        arguments.models, arguments.prompt_tokens, arguments.forms, arguments.steps
    ):
        row = measure(model, tokens, form, step, arguments.precision)
        ratios.append(row["planned_bytes"] / row["held_bytes"])
        if arguments.json:
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{model.name}, {tokens} tokens, {form}, step {step}: "
            f"planned {row['planned_bytes'] / 1e6:.0f} MB, held {row['held_bytes'] / 1e6:.0f} MB, "
            f"{ratios[-1]:.3f}",
            flush=True,
        )
    print(f"planned by held: {min(ratios):.3f} to {max(ratios):.3f}", file=sys.stderr)


def measure(model: Path, tokens: int, form: str, step: int, precision: str) -> dict[str, Any]:
    """One fresh process; bytes planned and held."""
    command = [
        sys.executable, "-m", "apertus_mlx", "generate", "--model", str(model), "--raw", "--json",
        "--compute", "cpu", "--precision", precision, "--force", "--prefill-step", str(step),
        "--max-tokens", str(NEW_TOKENS), "--temperature", "0", *FORMS[form],
    ]  # fmt: skip
    run = subprocess.run(
        command, input=prompt(model, tokens), capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    return {
        "model": model.name,
        "prompt_tokens": found["prompt_tokens"],
        "form": form,
        "step": step,
        "precision": precision,
        "planned_bytes": found["memory"]["total_bytes"],
        "held_bytes": found["peak_memory_bytes"],
    }


def prompt(model: Path, tokens: int) -> str:
    """A text of so many tokens, the beginning included."""
    config = read_config(model)
    tokenizer = Tokenizer.load(
        model, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
    )
    words = "The quick brown fox jumps over the lazy dog near river banks. " * (tokens // 4 + 1)
    ids = tokenizer.encode(words)[: tokens - (tokenizer.bos_id is not None)]
    return tokenizer.decode(ids)


if __name__ == "__main__":
    main()
