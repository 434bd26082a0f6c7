"""No command tells anybody anything: which addresses are asked for, and what is left in a home.

Commands run in a process of their own with a private home, Python's audit hook watches them
everywhere, and strace, where there is one, also watches the libraries and the children.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.system import telemetry
from tests.builders import config_4x, write_checkpoint
from tests.hub_server import serving

REPO = "swiss-ai/Tiny"
SHORT = ("--rounds", "1", "--prompt-tokens", "4", "--depths", "0", "--new-tokens", "2")
TEXT = "\n\n".join(f"Line {n} has {n * n} birds." for n in range(60))
WATCHED = Path(__file__).parents[1] / "watched_commands.py"
ADDRESS = re.compile(r'htons\((\d+)\).*?(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"')
# What may be in a home: the Hub's cache, fonts that plots listed, and what `doctor` measured.
KEPT = re.compile(
    r"\.cache/(huggingface|matplotlib)/.*|\.config/matplotlib/.*"
    r"|\.cache/apertus-mlx/(doctor\.lock|row-costs\.json)"
)


@dataclass(frozen=True, slots=True)
class Watched:
    """What commands did. `connected` holds address and port; None where there is no strace."""

    commands: list[dict[str, Any]]
    connected: set[tuple[str, int]] | None
    home: Path

    @property
    def asked(self) -> list[str]:
        return [line for command in self.commands for line in command["asked"]]

    def left(self) -> list[str]:
        """Files in the home that have no business there."""
        files = [path for path in self.home.rglob("*") if not path.is_dir()]
        names = [path.relative_to(self.home).as_posix() for path in files]
        return sorted(name for name in names if not KEPT.fullmatch(name))


def strace(log: Path) -> list[str]:
    """What to start commands with, so that `log` tells of all connections; empty without strace."""
    found = shutil.which("strace")
    if found is None:
        return []
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    command = [found, "-f", "-qq", "--seccomp-bpf", "-e", calls, "-o", str(log)]
    # Some containers have it and do not let it trace.
    works = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else []


def watch(
    folder: Path, commands: Sequence[Sequence[str]], environment: Mapping[str, str]
) -> Watched:
    """Run commands in `folder`, which gets a home."""
    home, log = folder / "home", folder / "strace"
    home.mkdir(exist_ok=True)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "MPL")) and name not in telemetry.VARIABLES
    }
    prefix = strace(log)
    done = subprocess.run(
        [*prefix, sys.executable, "-P", WATCHED, folder / "report", json.dumps(commands)],
        cwd=folder,
        env={**clean, "HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report").read_text())
    assert [command["code"] for command in report] == [0] * len(commands), (report, done.stderr)
    connected = None
    if prefix:
        connected = {(host, int(port)) for port, host in ADDRESS.findall(log.read_text())}
    return Watched(report, connected, home)


def write_model(folder: Path) -> Path:
    return write_checkpoint(folder, config_4x(num_hidden_layers=1, torch_dtype="bfloat16"))


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.nightly)])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Commands on folders: those that end soon, or all."""
    folder = tmp_path_factory.mktemp("local")
    model = str(write_model(folder / "model"))
    (folder / "text.txt").write_text(TEXT)
    text = ("--text", "text.txt")
    commands: list[tuple[str, ...]] = [
        ("generate", "--model", model, "--max-tokens", "2", "Hello"),
        ("chat", "--model", model),
        ("plan", model),
        ("convert", model, "q4", "--bits", "4", "--group-size", "32"),
        ("verify", "q4"),
    ]  # fmt: skip
    long: list[tuple[str, ...]] = [
        ("inspect", model),
        ("convert", model, "q2", "--bits", "2", "--group-size", "32", "--method", "gptq",
         "--calibration", "text.txt"),
        ("eval", "q4", "--reference", model, *text, "--tokens", "64", "--plot", "eval.svg"),
        ("distill", model, "q2", "learned", *text, "--tokens", "256", "--window", "32"),
        ("bench", model, *SHORT),
        ("doctor", model, "--tune"),
        ("models",),
    ]  # fmt: skip
    return watch(folder, [*commands, *(long if request.param else ())], {})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Watched, int]:
    """The commands that take a Hub id, first with the Hub and then without; the Hub's port."""
    folder = tmp_path_factory.mktemp("hub")
    model = write_model(folder / "model")
    commands: list[tuple[str, ...]] = [
        ("plan", REPO),
        ("generate", "--model", REPO, "--max-tokens", "2", "Hello"),
        ("inspect", REPO),
        ("convert", REPO, "q4", "--bits", "4", "--group-size", "32"),
        ("eval", "q4", "--reference", REPO, "--tokens", "64"),
        ("models", "--download", REPO),
    ]
    with serving() as server:
        server.repository(REPO).commit_folder(model)
        online = watch(folder, commands, {"HF_ENDPOINT": server.endpoint})
        (folder / "q4").rename(folder / "first")
        offline = [(*command, "--offline") for command in commands]
        return online, watch(folder, offline, {"HF_ENDPOINT": server.endpoint}), server.server_port


def test_a_local_folder_needs_no_address(local: Watched) -> None:
    assert local.asked == []
    if local.connected is None:
        pytest.skip("without strace only Python has been watched")
    assert local.connected == set()


def test_a_local_folder_leaves_nothing_in_the_home(local: Watched) -> None:
    assert local.left() == []


def test_a_hub_id_asks_only_the_hub(hub: tuple[Watched, Watched, int]) -> None:
    online, _, port = hub
    assert online.commands[0]["asked"] and online.commands[1]["asked"]
    allowed = rf"socket\.(connect|getaddrinfo) (127\.0\.0\.1|localhost|::1) {port}"
    assert [line for line in online.asked if not re.fullmatch(allowed, line)] == []
    assert online.left() == []
    if online.connected is None:
        pytest.skip("without strace only Python has been watched")
    # The resolver tries addresses of localhost by connecting without a port or a packet.
    assert {host for host, _ in online.connected} <= {"127.0.0.1", "::1"}
    assert {other for _, other in online.connected} <= {0, port}


def test_offline_asks_nobody(hub: tuple[Watched, Watched, int]) -> None:
    _, offline, _ = hub
    assert offline.asked == []
    if offline.connected is None:
        pytest.skip("without strace only Python has been watched")
    assert offline.connected == set()


def test_watching_sees_what_is_there(tmp_path: Path) -> None:
    """A command that cannot reach its Hub has asked for it; so the tests above are able to fail."""
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    command = [*strace(tmp_path / "log"), sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=60)
    if len(command) == 3:
        pytest.skip("without strace only Python has been watched")
    assert ADDRESS.findall((tmp_path / "log").read_text()) == [("9", "127.0.0.1")]
