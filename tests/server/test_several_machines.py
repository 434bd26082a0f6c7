"""`serve` on several ranks: rank 0 listens and the others follow; as one process would answer."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.builders import config_4x, write_checkpoint
from tests.ranks import ends, start
from tests.server.process import Process

pytestmark = pytest.mark.nightly

PROMPTS = [[1, *range(80, 80 + 3 * count)] for count in range(4, 8)]
ENDLESS = {
    "prompt": PROMPTS[0], "max_tokens": 60_000, "stream": True, "temperature": 0,
    "logit_bias": {"2": -100, "68": -100, "72": -100},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_4x(max_position_embeddings=65_536)
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


@contextmanager
def serving(
    folder: Path, model: Path, *options: str, count: int = 2
) -> Iterator[tuple[int, list[subprocess.Popen[str]]]]:
    """The port of ranks that serve; they may be ended before."""
    command = ["-m", "apertus_mlx", "serve", str(model), "--port", "0", *options]
    processes = start(folder, [command] * count)
    try:
        assert processes[0].stderr is not None
        for line in processes[0].stderr:
            if found := re.search(r"serving .* at http://\S+:(\d+)/v1", line):
                break
        else:
            raise AssertionError(ends(processes))
        yield int(found[1]), processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def post(port: int, **body: Any) -> Any:
    """A completion; asks again until the server listens and the model is loaded."""
    for _ in range(10_000):
        with suppress(ConnectionRefusedError), closing(connect(port)) as connection:
            request(connection, body)
            reply = connection.getresponse()
            found = reply.read()
            if reply.status != 503:
                assert reply.status == 200, found
                return json.loads(found)["choices"][0]["text"]
    raise AssertionError(f"nobody answers on port {port}")


def request(connection: HTTPConnection, body: dict[str, Any]) -> None:
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), kind)


def connect(port: int) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", port, timeout=60)


def asked(port: int) -> list[str]:
    """Answers at the same time, greedy and by chance, and one that goes on from another."""

    def ask(number: int) -> str:
        given: dict[str, Any] = {"temperature": 0} if number % 2 else {"seed": number}
        text: str = post(port, prompt=PROMPTS[number], max_tokens=20, **given)
        return text

    first = ask(1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    more = post(port, prompt=[*PROMPTS[1], 90, 91], max_tokens=9, temperature=0)
    return [first, *found, more]


@pytest.mark.parametrize(
    ("split", "count"),
    [
        ([], 2),
        ([], 4),
        (["--pipeline"], 2),
        (["--kv-bits", "8"], 2),
        (["--max-kv", "64"], 2),
    ],
)
def test_ranks_answer_as_one_process(
    tmp_path: Path, model: Path, split: list[str], count: int
) -> None:
    if "--kv-bits" in split or count == 4:
        wide = {"head_dim": 64, "num_key_value_heads": 4, "num_hidden_layers": 4}
        model = write_checkpoint(tmp_path / "wide", config_4x(**wide))
    form = [each for each in split if each != "--pipeline"]
    alone = Process(str(model), "--compute", "mlx", *form)
    try:
        post(alone.port, prompt="a", max_tokens=1)
        expected = asked(alone.port)
    finally:
        alone.end()
    with serving(tmp_path, model, *split, count=count) as (port, processes):
        assert asked(port) == expected
        processes[0].send_signal(signal.SIGTERM)
        assert [code for code, _, _ in ends(processes)] == [0] * count


def test_a_client_that_goes_frees_all(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, model, "--parallel", "1") as (port, processes):
        expected = post(port, prompt=PROMPTS[1], max_tokens=9, temperature=0)
        connection = connect(port)
        request(connection, ENDLESS)
        reply = connection.getresponse()
        assert reply.read(100)
        reply.close()
        connection.close()
        # There is but one place.
        assert post(port, prompt=PROMPTS[1], max_tokens=9, temperature=0) == expected
        processes[0].send_signal(signal.SIGINT)
        found = ends(processes)
    assert [code for code, _, _ in found] == [130, 130]
    assert not any("error" in err for _, _, err in found)


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("answering", [False, True])
def test_a_killed_rank_ends_the_server(
    tmp_path: Path, model: Path, gone: int, answering: bool
) -> None:
    with serving(tmp_path, model) as (port, processes), closing(connect(port)) as connection:
        post(port, prompt="a", max_tokens=1)
        if answering:
            request(connection, ENDLESS)
            assert connection.getresponse().read(100)
        processes[gone].kill()
        found = ends(processes)
    codes = [code for code, _, _ in found]
    assert codes == [[-9, 4], [4, -9]][gone]
    lines = [line for _, _, err in found for line in err.splitlines() if "error:" in line]
    expected = f"error: rank {gone} (127.0.0.1) is gone: its process has ended; all ranks end"
    assert lines == [expected]


def test_what_is_for_one_machine_is_refused(tmp_path: Path, model: Path) -> None:
    command = ["-m", "apertus_mlx", "serve", str(model), "--idle-unload", "9"]
    found = ends(start(tmp_path, [command] * 2))
    assert [code for code, _, _ in found] == [2, 2]
    assert "error: --idle-unload: is for one machine; under mlx.launch leave it out" in found[0][2]
