"""Changed files of a model folder, by the million: each is read or refused, in a moment.

    python -m benchmarks.fuzz_files config header … --executions 100000 --seed 0

Input number i of a kind follows from kind, seed and i alone, so that a finding can be repeated:
`--first i --executions 1`. Each kind runs in a child, because libraries in other languages can end
the process; a child that dies or takes too long costs one finding and is started anew. Prints a
line of counts for each kind; the exit code tells whether there were findings.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.system.user_folders import CACHE_VARIABLE
from tests.builders import LLAMA3, TEMPLATE, config_4x, config_5x, write_checkpoint

HANG_S = 20.0
# Executions after which a child is replaced, so that what leaks cannot add up.
CHILD_EXECUTIONS = 50_000

Execute = Callable[[bytes], object]

NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 61, 73, 383, 384, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, 0.5,
    -0.0, 1e-300, 1e300, 1e-45, 5e-324, 1.5, 1e999,
]  # fmt: skip
TEXTS = ["", "a", "\x00", "\x1b[31m", "\ud800", "é", "😀", "../x", "model.safetensors", "BPE",
         "WordLevel", "(a+)+$", "default", "llama3", "F32", "BF16", "<s>", "x" * 5000, "%s{}",
         "affine", "mxfp4", "no", "Ġ"]  # fmt: skip
PIECES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true",
          b"1e999", b"-", b"0", b"\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"#", b"=", b"'", b" ",
          b"version https://git-lfs", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000]  # fmt: skip
WORDS = ["{{", "}}", "{%", "%}", "{#", "#}", " for x in ", " endfor ", " if ", " else ", " endif ",
         "messages", "message", "loop", "range(10**9)", "*10**9", "|length", "|tojson", "|join",
         "['content']", ".__class__", "bos_token", "eos_token", "<s>", "</s>", " set x = ",
         "namespace(a=1)", "raise_exception('x')", "strftime_now('%Y')", " macro m(a) ", "m(1)",
         " endmacro ", " include 'x' ", " import os ", "not ", " is defined", "-", "+", "~", "'",
         '"', "(", ")", "|sort", "|map(attribute='x')", "[::-1]", "\x1b[2J", "\ufdd0", "😀",
         "{% generation %}", "|e", " do ", " call ", " filter upper "]  # fmt: skip


def random_value(chance: random.Random) -> Any:
    """A telling JSON value."""
    kind = chance.randrange(7)
    if kind == 0:
        return chance.choice([None, True, False])
    if kind < 3:
        return chance.choice(NUMBERS)
    if kind < 5:
        return chance.choice(TEXTS)
    if kind == 5:
        return [random_value(chance) for _ in range(chance.randrange(4))]
    return {chance.choice(TEXTS): random_value(chance) for _ in range(chance.randrange(3))}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Container and key of everything inside `value`."""
    found, left = [], [value]
    while left:
        node = left.pop()
        keys = node.keys() if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                left.append(node[key])
    return found


def change_structure(value: Any, chance: random.Random) -> Any:
    """`value` with one to three parts removed, replaced, renamed, repeated or exchanged."""
    for _ in range(chance.randint(1, 3)):
        found = places(value)
        if not found:
            return random_value(chance)
        node, key = chance.choice(found)
        action = chance.randrange(6)
        if action == 0:
            del node[key]
        elif action == 1:
            other, place = chance.choice(found)
            if isinstance(other, dict) and place in other:
                node[key] = copy.deepcopy(other[place])
        elif action == 2 and isinstance(node, dict):
            node[chance.choice([*TEXTS, *(str(k) for k in node)])] = copy.deepcopy(node[key])
        elif action == 3 and isinstance(node, list):
            node.insert(chance.randrange(len(node) + 1), copy.deepcopy(node[key]))
        else:
            node[key] = random_value(chance)
    return value


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four places overwritten, removed, doubled, or filled with a piece."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content) + 1)
        action = chance.randrange(6)
        if action == 0 and place < len(content):
            content[place] ^= 1 << chance.randrange(8)
        elif action == 1 and place < len(content):
            content[place] = chance.randrange(256)
        elif action == 2:
            del content[place : place + chance.randint(1, 40)]
        elif action == 3:
            content[place:place] = content[place : place + chance.randint(1, 40)]
        elif action == 4:
            content[place:place] = chance.choice(PIECES)
        elif chance.randrange(8) == 0:
            del content[place:]
    return bytes(content)


def change_json(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """One of `seeds`, changed by its structure or by its bytes."""
    seed = chance.choice(seeds)
    if chance.randrange(3) == 0:
        return change_bytes(seed, chance)
    changed = change_structure(json.loads(seed), chance)
    return json.dumps(changed).encode()


def change_safetensors(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A file whose header is changed, with its length put right, or whose bytes are."""
    seed = chance.choice(seeds)
    if chance.randrange(4) == 0:
        return change_bytes(seed, chance)
    length = int.from_bytes(seed[:8], "little")
    header = change_json([seed[8 : 8 + length]], chance)
    return len(header).to_bytes(8, "little") + header + seed[8 + length :]


def change_template(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A template with words of the language put in, taken out or moved."""
    seed = chance.choice(seeds)
    if chance.randrange(6) == 0:
        return change_bytes(seed, chance)
    text = seed.decode()
    for _ in range(chance.randint(1, 5)):
        start = chance.randrange(len(text) + 1)
        stop = min(len(text), start + chance.choice((0, 0, 1, 5, 20, 80)))
        put = chance.choice((chance.choice(WORDS), "", text[stop : stop + 30]))
        text = text[:start] + put + text[stop:]
    return text.encode("utf-8", "surrogatepass")


RECIPES = [
    b"bits = 4\ngroup_size = 64\n[modules]\n"
    b'"*.mlp.*" = {bits = 8, group_size = 32}\nlm_head = false\n',
    b'mode = "mxfp4"\n[modules."model.layers.0.*"]\nbits = 6\ngroup_size = 128\n',
]


def change_recipe(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A recipe in TOML with changed bytes, or in JSON with a changed structure."""
    if chance.randrange(2):
        return change_bytes(chance.choice(RECIPES), chance)
    return change_json(seeds, chance)


class Readers:
    """What reads each kind, over a small model in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        config = config_4x(num_hidden_layers=1, head_dim=32)
        self.folder = write_checkpoint(folder / "model", config)

    def _put(self, name: str, data: bytes) -> Path:
        path = self.folder.parent / name
        path.write_bytes(data)
        return path

    def config(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.checkpoint import layout
        from apertus_mlx.checkpoint.config import parse_config
        from apertus_mlx.convert.check import swift_contract
        from apertus_mlx.model.apertus import rotary_wavelengths
        from apertus_mlx.system.strict_json import parse_object

        block: dict[str, Any] = {"group_size": 64, "bits": 4, "lm_head": False}
        block["model.embed_tokens"] = {"group_size": 32, "bits": 6, "mode": "affine"}
        foreign = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
        text = config_5x(rope_scaling=LLAMA3, model_type="apertus1p5_text")
        seeds = [
            config_4x(), config_4x(rope_scaling=LLAMA3), config_5x(rope_scaling=LLAMA3),
            config_4x(rope_scaling={"type": "linear", "factor": 2}), config_4x(quantization=block),
            config_4x(quantization_config=foreign),
            {"model_type": "apertus1p5", "text_config": text, "tie_word_embeddings": False},
        ]  # fmt: skip

        def read(data: bytes) -> None:
            values = parse_object(data, "config.json")
            config = parse_config(values)
            layout.parameter_count(config)
            if not swift_contract.check_config(values):
                swift_contract.check_meaning(config, values)
            swift_contract.check_quantization(values)
            if config.head_dim <= 1024:
                rotary_wavelengths(config.head_dim, config.rope)

        return [json.dumps(seed).encode() for seed in seeds], read

    def generation(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.checkpoint.generation_config import read_generation_config

        seed = {"bos_token_id": 1, "eos_token_id": [2, 68, 72], "do_sample": True,
                "temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
                "repetition_penalty": 1.1}  # fmt: skip

        def read(data: bytes) -> None:
            self._put("generation_config.json", data)
            read_generation_config(self.folder.parent, 384)

        return [json.dumps(seed).encode()], read

    def header(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.checkpoint.header import read_header

        entries = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
            "c": {"dtype": "U32", "shape": [1], "data_offsets": [26, 30]},
        }
        raw = json.dumps(entries).encode()
        seed = len(raw).to_bytes(8, "little") + raw + bytes(30)
        return [seed], lambda data: read_header(self._put("x.safetensors", data))

    def index(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.checkpoint.header import TensorInfo
        from apertus_mlx.checkpoint.tensors import merge_headers, read_weight_map
        from apertus_mlx.system.strict_json import parse_object

        files = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
        infos: dict[str, list[TensorInfo]] = {}
        for name, file in files.items():
            infos.setdefault(file, []).append(TensorInfo(name, "U8", (1,), file, 100, 1))

        def read(data: bytes) -> None:
            merge_headers(infos, read_weight_map(parse_object(data, "index"), "index"), "x")

        return [json.dumps({"metadata": {"total_size": 3}, "weight_map": files}).encode()], read

    def tokenizer(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.text.tokenizer import Tokenizer

        data = (self.folder / "tokenizer.json").read_bytes()
        rich = json.loads(data)
        rich["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}|\s+"},
             "behavior": "Isolated", "invert": False}, rich["pre_tokenizer"]]}  # fmt: skip
        rich["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst",
                              "stride": 0}  # fmt: skip
        rich["padding"] = {
            "strategy": {"Fixed": 10}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>",
        }  # fmt: skip
        rich["model"]["merges"] = [["a", "b"], ["ab", "c"]]
        rich["model"]["vocab"] |= {"ab": 384, "abc": 385}

        def read(data: bytes) -> None:
            self._put("tokenizer.json", data)
            tokenizer = Tokenizer.load(self.folder.parent, vocab_size=400, bos_token_id=1)
            ids = tokenizer.encode("Hello <s> wörld 123\n\udcff abc")
            tokenizer.decode(ids)
            for token_id in ids[:5]:
                tokenizer.token_bytes(token_id)

        return [data, json.dumps(rich).encode()], read

    def template(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.hub.demo import model_dir
        from apertus_mlx.text.template import ChatTemplate, Message
        from apertus_mlx.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(self.folder, vocab_size=384, bos_token_id=1)
        messages = [Message(role="system", content="Be kind."), Message(role="user", content="Hi")]
        tools = [{"name": "f", "description": "d", "parameters": {"type": "object"}}]

        def read(data: bytes) -> None:
            self._put("chat_template.jinja", data)
            template = ChatTemplate.load(self.folder.parent, tokenizer)
            assert template is not None
            template.render(messages)
            template.render(messages, tools=tools, add_generation_prompt=False)

        seeds = [TEMPLATE.encode(), (model_dir() / "chat_template.jinja").read_bytes()]
        v1_1 = Path(__file__).parents[1] / "tests" / "templates" / "v1_1.jinja"
        return [*seeds, v1_1.read_bytes()], read

    def recipe(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.convert.plan.options import read_recipe

        modules = {"*.mlp.*": {"bits": 8, "mode": "affine"}, "lm_head": False}
        seed = {"bits": 4, "group_size": 64, "modules": modules}

        def read(data: bytes) -> None:
            suffix = ".json" if data.lstrip()[:1] in (b"{", b"[") else ".toml"
            read_recipe(self._put(f"recipe{suffix}", data))

        return [json.dumps(seed).encode()], read

    def manifest(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.convert.write.manifest import MANIFEST, read_manifest

        files = {"config.json": {"size_bytes": 5, "sha256": "0" * 64}}
        source = {"name": "x", "commit": None}
        seed = {"format_version": 1, "source": source, "bits_per_weight": 4.5, "files": files}

        def read(data: bytes) -> None:
            self._put(MANIFEST, data)
            read_manifest(self.folder.parent)

        return [json.dumps(seed).encode()], read

    def verdict(self) -> tuple[list[bytes], Execute]:
        from apertus_mlx.backend.metal import verdict

        os.environ[CACHE_VARIABLE] = str(self.folder.parent)
        seed = {"format": verdict.FORMAT, "verdicts": [{
            "machine": dict.fromkeys(("chip", "system", "mlx", "package"), "x"),
            "texts": "t", "model": "m", "date": "d", "tuned": True, "accepted": {"a": ["b"]},
            "rejected": {"c": "d"}, "compiled_step": None}]}  # fmt: skip

        def read(data: bytes) -> None:
            self._put(verdict.FILE_NAME, data)
            verdict._read()

        return [json.dumps(seed).encode()], read

    def prompt_cache(self) -> tuple[list[bytes], Execute]:
        import mlx.core as mx

        from apertus_mlx.backend.mlx import load_inventory
        from apertus_mlx.cache import CacheConfig
        from apertus_mlx.cache.config import STEP
        from apertus_mlx.checkpoint.inventory import take_inventory
        from apertus_mlx.generation.cached_prefix import CachedPrefix
        from apertus_mlx.generation.prompt_cache import (
            fingerprint,
            load_prompt_cache,
            save_prompt_cache,
        )

        inventory = take_inventory(self.folder)
        model = load_inventory(inventory)
        config, now = inventory.config, fingerprint(inventory)
        path = self.folder.parent / "prompt.safetensors"
        seeds = []
        for form, length in (
            (CacheConfig(), 5),
            (CacheConfig(bound=8), 10),
            (CacheConfig(key_bits=4, value_bits=8, window=0, sinks=0), 3 * STEP),
        ):
            prefix = CachedPrefix(model, form)
            prefix.begin([1, *range(100, 99 + length)]).read()
            save_prompt_cache(path, prefix, now)
            seeds.append(path.read_bytes())

        def read(data: bytes) -> None:
            path.write_bytes(data)
            form = CacheConfig(bound=8)
            if b"keys.words" in data:
                form = CacheConfig(key_bits=4, value_bits=8, window=0, sinks=0)
            elif b'bound\\": null' in data:
                form = CacheConfig()
            load_prompt_cache(path, config, form, mx.float32, now)

        return seeds, read


CHANGES: dict[str, Callable[[Sequence[bytes], random.Random], bytes]] = {
    "header": change_safetensors,
    "prompt_cache": change_safetensors,
    "template": change_template,
    "recipe": change_recipe,
}
KINDS = ("config", "generation", "header", "index", "tokenizer", "template", "recipe", "manifest",
         "verdict", "prompt_cache")  # fmt: skip


def fuzz(
    kind: str, seed: int, first: int, count: int, begin: Callable[[int], object]
) -> Counter[str]:
    """Execute inputs `first` to `first + count`; `begin` is told each before it is read."""
    warnings.simplefilter("error")
    outcomes: Counter[str] = Counter()
    change = CHANGES.get(kind, change_json)
    with tempfile.TemporaryDirectory() as name:
        seeds, execute = getattr(Readers(Path(name)), kind)()
        for sound in seeds:
            with suppress(UsageError):  # as the template that takes no tools
                execute(sound)
        for number in range(first, first + count):
            begin(number)
            data = change(seeds, random.Random(f"{kind} {seed} {number}"))
            try:
                execute(data)
                outcomes["accepted"] += 1
            except ApertusError as error:
                name_ = type(error).__name__
                outcomes[name_ if "\n" not in str(error) else f"crash: {name_} of two lines"] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                outcomes[f"crash: {number}: {text}"] += 1
    return outcomes


def attend(kind: str, seed: int, first: int, count: int) -> Counter[str]:
    """As `fuzz`, in children that may die or hang."""
    outcomes: Counter[str] = Counter()
    last = first + count
    with tempfile.NamedTemporaryFile() as place, tempfile.TemporaryFile("w+") as answer:
        while first < last:
            chunk = min(CHILD_EXECUTIONS, last - first)
            answer.truncate(0)
            answer.seek(0)
            place.truncate(0)
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fuzz_files", kind, "--seed",
                 str(seed), "--first", str(first), "--executions", str(chunk), "--place",
                 place.name],
                stdout=answer, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
            ending = _wait(child, Path(place.name), started=time.monotonic())
            answer.seek(0)
            text = answer.read()
            if ending is None and child.returncode == 0:
                outcomes.update(json.loads(text))
                first += chunk
                continue
            reached = Path(place.name).read_bytes()
            if not reached:
                raise RuntimeError(f"{kind}: its sound files are refused")
            number = int(reached)
            outcomes[f"{ending or f'crash: code {child.returncode}'}: {number}"] += 1
            # What came before it is done again, without it.
            if number > first:
                outcomes.update(attend(kind, seed, first, number - first))
            first = number + 1
    return outcomes


def _wait(child: subprocess.Popen[bytes], place: Path, started: float) -> str | None:
    """Wait for a child's end; "hang" if one input takes too long."""
    before, since = b"", started
    while True:
        try:
            child.wait(timeout=1)
            return None
        except subprocess.TimeoutExpired:
            now = place.read_bytes()
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > HANG_S * (5 if not now else 1):
                child.kill()
                child.wait()
                return "hang"


def main() -> int:
    """Run the kinds that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.place:
        descriptor = os.open(arguments.place, os.O_WRONLY)
        found = fuzz(
            arguments.kinds[0], arguments.seed, arguments.first, arguments.executions,
            lambda number: os.pwrite(descriptor, b"%d" % number, 0),
        )  # fmt: skip
        print(json.dumps(found))
        return 0
    findings = 0
    for kind in arguments.kinds or KINDS:
        started = time.perf_counter()
        found = attend(kind, arguments.seed, arguments.first, arguments.executions)
        bad = {text: n for text, n in found.items() if text.startswith(("crash", "hang"))}
        findings += sum(bad.values())
        good = ", ".join(f"{text} {n}" for text, n in sorted((found - Counter(bad)).items()))
        seconds = time.perf_counter() - started
        counts = f"{good}; findings {sum(bad.values())}"
        print(f"{kind}: {sum(found.values())} in {seconds:.0f} s: {counts}")
        for text in sorted(bad)[:20]:
            print(f"  {text}")
        sys.stdout.flush()
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
