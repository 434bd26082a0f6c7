"""Commands under `mlx.launch` itself: what ends it ends the ranks, and who types there chats."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.builders import config_4x, write_checkpoint
from tests.cli import ssh_double
from tests.ranks import ROOT

pytestmark = pytest.mark.nightly
LAUNCH = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
# Each rank leaves its process's number, and the code that it exits with by itself.
RANK = """if True:
    import os, pathlib, sys
    from apertus_mlx.cli import main
    folder = pathlib.Path(sys.argv.pop(1))
    (folder / f"pid{os.environ['MLX_RANK']}").write_text(str(os.getpid()))
    try:
        main()
    except SystemExit as end:
        (folder / f"code{os.environ['MLX_RANK']}").write_text(str(end.code))
        raise
"""
HOSTS = [{"ssh": f"mac-{name}", "ips": ["127.0.0.1"]} for name in "ab"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Answers go on for longer than a test."""
    return write_checkpoint(tmp_path / "model", config_4x(max_position_embeddings=65_536))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def launch(
    folder: Path, arguments: Sequence[str], over_ssh: bool = False
) -> subprocess.Popen[bytes]:
    """`mlx.launch` in a session of its own."""
    own = [sys.executable, "-c", RANK, str(folder), *arguments]
    (folder / "hosts.json").write_text(json.dumps(HOSTS))
    ssh_double.write(folder)
    how = ["--hostfile", str(folder / "hosts.json")] if over_ssh else ["-n", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *how, "--starting-port", str(free_port()), "--", *own],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        start_new_session=True, env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip


def require_end(folder: Path) -> None:
    """Wait until both ranks have ended."""
    assert len(list(folder.glob("pid*"))) == 2
    for path in folder.glob("pid*"):
        number = int(path.read_text())
        with suppress(ProcessLookupError), os.fdopen(os.pidfd_open(number)) as end:
            ended = select.select([end], [], [], 30)[0]
            os.kill(number, signal.SIGKILL) if not ended else None
            assert ended, path.name


def asked(command: str, model: Path) -> list[str]:
    """Arguments for an answer that does not end, or a server."""
    if command == "serve":
        return [command, str(model), "--port", "0"]
    endless = [f"--logit-bias={id}=-100" for id in (2, 68, 72)]
    return [command, "Hello", "-n", "60000", "-m", str(model), "--temp", "0", *endless]


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_an_interrupt_of_the_launcher_ends_all(tmp_path: Path, model: Path, command: str) -> None:
    """As a terminal does it: all of its processes get the signal."""
    process = launch(tmp_path, asked(command, model))
    told = process.stdout if command == "generate" else process.stderr
    assert told is not None
    assert any(told.read(1) for _ in range(2))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    codes = re.findall(rb"Node with rank (\d) exited with code (\d+)", err)
    assert sorted(codes) == [(b"0", b"130"), (b"1", b"130")], err


needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")


@needs_pidfd
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_an_interrupt_of_ssh_ends_all(tmp_path: Path, model: Path, command: str) -> None:
    process = launch(tmp_path, asked(command, model), over_ssh=True)
    assert process.stdout is not None
    told = b""
    while (b"serving" if command == "serve" else b"computing") not in told:
        more = process.stdout.read(1)
        assert more, told
        told += more
    os.killpg(process.pid, signal.SIGINT)
    require_end(tmp_path)
    process.communicate()
    codes = [path.read_text() for path in tmp_path.glob("code*")]
    # Rank 0 may find that it cannot write any more before it hears of the interrupt.
    assert len(codes) == 2 and set(codes) <= {"130", "5"}, codes


@needs_pidfd
@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_launcher(
    tmp_path: Path, model: Path, command: str, number: signal.Signals
) -> None:
    """It alone gets the signal, and nobody is left to end them."""
    process = launch(tmp_path, asked(command, model))
    told = process.stdout if command == "generate" else process.stderr
    assert told is not None
    assert any(told.read(1) for _ in range(2))
    process.send_signal(number)
    process.communicate()
    require_end(tmp_path)


def test_a_chat_is_saved_and_loaded_by_rank_0(tmp_path: Path) -> None:
    file, other = tmp_path / "chat.json", tmp_path / "other.json"
    typed = f"Hello\n/save {file}\n/reset\n/load {tmp_path}\n/load {file}\nWhy?\n/save {other}\n"
    process = launch(tmp_path, ["chat", "--temp", "0"])
    assert process.stdin is not None
    process.stdin.write(f"{typed}/exit\n".encode())
    process.stdin.flush()
    process.wait()
    out, err = process.communicate()
    told = err.decode().splitlines()
    assert [line.split()[0] for line in told[-5:]] == [
        "saved", "forgot", "error:", "loaded", "saved"
    ], told  # fmt: skip
    saved = json.loads(other.read_text())["messages"]
    assert saved[:2] == json.loads(file.read_text())["messages"]
    command = [sys.executable, "-m", "apertus_mlx", "chat", "--temp", "0", "--compute", "mlx"]
    alone = subprocess.run(command, input=b"Hello\nWhy?\n", capture_output=True, check=True)
    assert alone.stdout == out
    assert [each["content"] for each in saved if each["role"] == "assistant"] == (
        alone.stdout.decode().splitlines()
    )


def test_a_chat_over_ssh(tmp_path: Path) -> None:
    """Each rank has a terminal there, on which nobody edits lines."""
    process = launch(tmp_path, ["chat", "--temp", "0"], over_ssh=True)
    assert process.stdin is not None
    long = "a " * 2500
    process.stdin.write(f"Hello\n{long}\n/exit\n".encode())
    process.stdin.flush()
    process.wait()
    out, _ = process.communicate()
    assert b"\x1b" not in out
    lines = out.decode().splitlines()
    assert lines[-3] == "type a message; /help for more"
    assert lines[-1].startswith("error: the prompt has 25")
