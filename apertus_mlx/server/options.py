"""What the command `serve` takes beside the options of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from apertus_mlx.errors import UsageError
from apertus_mlx.system.arguments import Option, Range, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a model is served.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range, or two that exclude each other.
    """

    host: Annotated[str, Option("Address to listen on; others than loopback need a key.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", Range(0, 65535))] = 8080
    alias: Annotated[
        Sequence[str] | None, Option("Another name that requests may call the model; repeatable.")
    ] = None
    api_key: Annotated[
        str | None,
        Option("Key that requests must bring; other users of this machine can see it here."),
    ] = None
    api_key_file: Annotated[
        Path | None, Option("File with that key; default: the variable APERTUS_MLX_API_KEY.")
    ] = None
    allow_host: Annotated[
        Sequence[str] | None, Option("Another name that this machine is called; repeatable.")
    ] = None
    allow_origin: Annotated[
        Sequence[str] | None,
        Option("Web page that may ask, such as https://chat.example; repeatable."),
    ] = None
    context: Annotated[
        int | None,
        Option("Tokens that memory is planned for at first; default: 8,192.", Range(1, 2**31)),
    ] = None
    max_tokens: Annotated[
        int, Option("Most tokens of an answer whose request does not say.", Range(1, 2**31 - 1))
    ] = 4096
    max_thought_tokens: Annotated[
        int | None, Option("Most tokens of a deliberation; then it ends.", Range(0, 2**31 - 1))
    ] = None
    think: Annotated[bool, Option("Deliberate where a request does not say.")] = False
    parallel: Annotated[
        int | None,
        Option(
            "Answers in progress at once; default: 4, 2 on M1 and M2 with affine weights.",
            Range(1, 256),
        ),
    ] = None
    max_queue: Annotated[int, Option("Requests that may wait for that.", Range(0, 100_000))] = 32
    keep_prefixes: Annotated[
        int, Option("Caches kept for later requests that begin alike.", Range(0, 10_000))
    ] = 16
    slots: Annotated[
        Path | None, Option("Folder where what each cache_key keeps survives the server.")
    ] = None
    idle_unload: Annotated[
        int | None, Option("Give back the memory after so many idle seconds.", Range(1, 10**9))
    ] = None
    grace: Annotated[
        int, Option("Seconds that answers have to end after SIGTERM.", Range(0, 10**6))
    ] = 30
    metrics: Annotated[bool, Option("Serve /metrics for Prometheus.")] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.api_key is not None and self.api_key_file is not None:
            raise UsageError("--api-key and --api-key-file: give one of them")
        if self.api_key == "":
            raise UsageError("--api-key: is empty")
        if self.slots is not None and not self.keep_prefixes:
            raise UsageError("--slots: nothing is kept with --keep-prefixes 0; leave out one")
