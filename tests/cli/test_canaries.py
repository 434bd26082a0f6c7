"""Every command in, on and beside folders full of canaries: nothing runs, leaves, hangs or paints.

The current folder, the model's and the one that holds the output have a module under every name
that Python or this program imports, links that lead out, and names with orders to a terminal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from apertus_mlx import cli
from apertus_mlx.convert.write.golden import GOLDEN
from apertus_mlx.convert.write.manifest import MANIFEST
from tests.builders import config_4x, write_checkpoint
from tests.daily import every

CONFIG = config_4x(num_hidden_layers=1)
SECRET = "the-words-of-a-private-key"
TEXT = "\n\n".join(f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(160))
OURS = {"apertus_mlx", "convert", "quant", "sitecustomize", "usercustomize"}
MODULES = sorted(OURS | {*sys.stdlib_module_names} | {*packages_distributions()})


def fill(folder: Path, ran: Path) -> None:
    """Put canaries into `folder`; a module that is run leaves a file in `ran`."""
    for name in MODULES:
        if "/" not in name:
            (folder / f"{name}.py").write_text(f"open({str(ran / name)!r}, 'w').close()\n")
    for name in ("matplotlibrc", "fifo.txt"):
        os.mkfifo(folder / name)
    (folder / "notes.txt").symlink_to(ran.parent / "private")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what `convert` makes of it, a text, and canaries all around."""
    place = tmp_path_factory.mktemp("canaries")
    (place / "private").write_text(SECRET)
    (place / "ran").mkdir()
    (place / "out").mkdir()
    (place / "text.txt").write_text(TEXT)
    model = write_checkpoint(place / "model", CONFIG)
    subprocess.run(
        [*command(), "convert", str(model), str(place / "student"), "--bits", "8"], check=True
    )
    for folder in ("model", "student", "out"):
        fill(place / folder, place / "ran")
    for folder in ("model", "out"):
        (place / folder / "\x1b[31m\x1b]0;owned\x07.txt").write_text("")
    return place


def command() -> list[str]:
    """The console script: `python -m` would put the current folder first among the modules."""
    script = Path(sys.executable).with_name("apertus-mlx")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-P", "-c", "from apertus_mlx.cli import main; main()"]


DISTILL = ("--text", "../text.txt", "--tokens", "64", "--window", "32")
BENCH = ("--prompt-tokens", "3", "--depths", "0", "--new-tokens", "2", "--rounds", "1")
# The folder to be in, and what is asked.
ASKED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "generate": ("model", ("-m", ".", "-n", "2", "hello")),
    "chat": ("model", ("-m", ".", "--max-tokens", "2")),
    "models": ("out", ()),
    "inspect": ("model", (".",)),
    "plan": ("model", (".",)),
    "convert": ("model", (".", "../out/converted", "--bits", "4")),
    "verify": ("student", (".",)),
    "eval": ("model", ("../student", "--reference", ".", "--text", "../text.txt", "--tokens", "64",
                       "--plot", "../out/damage.svg")),
    "bench": ("model", (".", *BENCH)),
    "doctor": ("model", (".",)),
    "distill": ("model", (".", "../student", "../out/distilled", *DISTILL)),
}  # fmt: skip


def test_every_command_is_asked() -> None:
    from apertus_mlx.cli.app import COMMANDS

    # `serve` does not end by itself; tests/server/test_process.py has it.
    assert set(COMMANDS) - {"serve"} == ASKED.keys()


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in {"generate", "convert", "verify"}
        else pytest.param(name, marks=pytest.mark.nightly)
        for name in ASKED
    ],
)
def test_nothing_runs_leaves_hangs_or_paints(name: str, place: Path) -> None:
    folder, arguments = ASKED[name]
    if name == "eval":
        pytest.importorskip("matplotlib")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*command(), name, *arguments],
        cwd=place / folder,
        input=b"hello\n",
        capture_output=True,
        env={**environment, "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert list((place / "ran").iterdir()) == []
    assert SECRET.encode() not in said
    assert not {0x1B, 0x07} & set(said)
    for written in ("converted", "distilled"):
        for path in (place / "out" / written).glob("*"):
            assert not path.is_symlink() and SECRET.encode() not in path.read_bytes()


# --- files that are read, in the shape of what must not be


READ = ("config.json", "generation_config.json", "model.safetensors.index.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "chat_template.json", "LICENSE", "README.md", MANIFEST, GOLDEN)  # fmt: skip
# What no command may overlook although it could do without.
NEEDED = {
    "generate": set(READ) - {"chat_template.json", "LICENSE", "README.md", MANIFEST, GOLDEN},
    "inspect": set(READ[:5]),
    "plan": {"config.json", "model.safetensors", "model.safetensors.index.json"},
    "convert": set(READ) - {"chat_template.json", MANIFEST, GOLDEN},
    "verify": set(READ) - {"chat_template.json", "README.md", "LICENSE"},
    "eval": set(READ[2:7]) - {"generation_config.json"},
    "distill": {"config.json", "model.safetensors", "model.safetensors.index.json",
                "tokenizer.json"},
}  # fmt: skip
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "generate": ("-m", "MODEL", "-n", "2", "hello"),
    "inspect": ("MODEL",),
    "plan": ("MODEL",),
    "convert": ("MODEL", "out", "--bits", "4"),
    "verify": ("MODEL",),
    "eval": ("MODEL", "--reference", "MODEL", "--text", "TEXT", "--tokens", "64"),
    "distill": ("MODEL", "STUDENT", "out", "--text", "TEXT", "--tokens", "64", "--window", "32"),
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").write_text(SECRET)
    return tmp_path


@pytest.mark.parametrize("kind", ["fifo", "link"])
@pytest.mark.parametrize("name", every(2, ARGUMENTS))
def test_every_file_that_is_read(
    name: str,
    kind: str,
    work: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Some do much work where nothing is wrong.
    files = READ if name in ("inspect", "plan", "convert", "verify") else sorted(NEEDED[name])
    for index, file in enumerate(files):
        model = write_checkpoint(work / str(index), CONFIG)
        (model / file).unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(model / file)
        else:
            (model / file).symlink_to("../private")
        known = {"MODEL": model, "STUDENT": place / "student", "TEXT": place / "text.txt"}
        arguments = [str(known.get(word, word)) for word in ARGUMENTS[name]]
        monkeypatch.setattr(sys, "argv", ["apertus-mlx", name, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code or 0
        assert code == 3 or (code == 0 and file not in NEEDED[name]), (file, code, err)
        if code:
            assert err.splitlines()[-1].startswith("error: ") and "bug" not in err
        assert SECRET not in out + err
        if (work / "out").exists():
            assert SECRET not in "".join(
                path.read_text(errors="replace") for path in (work / "out").iterdir()
            )
            for path in sorted((work / "out").iterdir()):
                path.unlink()
            (work / "out").rmdir()
