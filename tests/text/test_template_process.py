"""The process that renders templates: it ends when it should, and nobody gets another's answer."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from apertus_mlx.errors import RejectedError, ResourceError
from apertus_mlx.text.template_process import TemplateProcess


def question(source: str) -> dict[str, Any]:
    given = {"name": "t.jinja", "source": source, "texts": {}, "marks": {}, "variables": {}}
    return {**given, "data": "[[], null]", "now": "2026-11-27T00:00:00"}


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.end()


def test_one_that_is_watched_ends_when_it_takes_too_much_memory() -> None:
    """As on macOS, where the system lets it take more."""
    process = TemplateProcess(seconds=60, memory_bytes=2**27, watched=True)
    for source in ("{{ 'a' * 10**9 }}", "{{ ([0] * 10**9) | length }}"):
        with pytest.raises(RejectedError, match=r"t\.jinja: .* or 134\.2 MB of memory"):
            process.render(question(source))
        assert process.render(question("a")) == "a"
    process.end()


def test_a_question_too_large_to_be_read_is_no_fault_of_python() -> None:
    process = TemplateProcess(memory_bytes=2**26)
    with pytest.raises(RejectedError, match=r"67\.1 MB of memory"):
        process.render({**question("a"), "data": " " * 2**25})
    assert process.render(question("a")) == "a"
    process.end()


def test_it_ends_where_the_thread_that_started_it_blocks_signals() -> None:
    process = TemplateProcess(seconds=0.2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        running = process._running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    endless = "{% for i in range(10**5) %}{% for k in range(10**5) %}{% endfor %}{% endfor %}"
    patience = threading.Timer(60, running.kill)
    patience.start()
    with pytest.raises(RejectedError, match=r"0\.2 s of work"):
        process.render(question(endless))
    patience.cancel()
    assert running.returncode == -signal.SIGPROF


def test_an_interrupt_leaves_no_old_answer(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process.render(question("a")) == "a"
    ask = process._ask

    def interrupted(*args: Any) -> bytes:
        running, line = args
        running.stdin.write(line)
        running.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.render(question("b"))
    monkeypatch.setattr(process, "_ask", ask)
    assert process.render(question("c")) == "c"


def test_one_that_was_ended_starts_again(process: TemplateProcess) -> None:
    process.start()
    running = process._running()
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert process.render(question("a")) == "a"
    assert process._running() is not running


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the limits of a process")
def test_who_gets_out_of_jinja_can_open_nothing(process: TemplateProcess) -> None:
    process.render(question("a"))
    running = psutil.Process(process._running().pid)
    for limit in (psutil.RLIMIT_NOFILE, psutil.RLIMIT_NPROC, psutil.RLIMIT_CORE):
        assert running.rlimit(limit) == (0, 0)
    assert running.rlimit(psutil.RLIMIT_AS) == (2**28, 2**28)


def test_threads_take_turns(process: TemplateProcess) -> None:
    told: dict[str, set[str]] = {name: set() for name in "abcd"}

    def ask(name: str) -> None:
        for _ in range(30):
            told[name].add(process.render(question(f"{{{{ '{name}' * 9 }}}}")))

    threads = [threading.Thread(target=ask, args=[name]) for name in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {name: {name * 9} for name in told}


@pytest.mark.parametrize("executable", ["/bin/false", "", "/no/such/python"])
def test_without_a_python_there_is_one_line(
    process: TemplateProcess, executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    process.start()
    with pytest.raises(ResourceError, match="template"):
        process.render(question("a"))


def test_too_many_open_files_are_no_fault_of_python(process: TemplateProcess) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(ResourceError, match="open files"):
            process.render(question("a"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert process.render(question("a")) == "a"


def test_a_frozen_app_is_not_started_again(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ResourceError, match="Python"):
        process.render(question("a"))


def ran(script: str, *options: str) -> str:
    """What a script prints in which `TEMPLATES` and `question` are."""
    start = (
        "import os, signal, sys\n"
        "from apertus_mlx.text.template_process import TEMPLATES\n"
        "from tests.text.test_template_process import question\n"
    )
    command = [sys.executable, *options, "-c", start + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_with_its_parent(end: str) -> None:
    script = f"TEMPLATES.start(); print(TEMPLATES._running().pid, flush=True)\n{end}"
    number = ran(script, "-X", "dev", "-W", "error::ResourceWarning")
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(number)).wait(timeout=60)


def test_a_fork_has_its_own() -> None:
    said = ran(
        "assert TEMPLATES.render(question('a')) == 'a'\n"
        "child = os.fork()\n"
        "name = 'b' if child else 'c'\n"
        "told = {TEMPLATES.render(question(name * n)) == name * n for n in range(1, 200)}\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
        "print(told, TEMPLATES.render(question(name)) == name)\n"
    )
    assert said == "{True} True\n" * 2
