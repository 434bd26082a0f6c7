"""Asks again, a few times, where the Hub says that it is busy or fails for the moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from apertus_mlx.hub.errors import UnreachableError, explained

TRIES = 4
# Where the answer names no time: so long before the second try, then twice as long each time.
FIRST_WAIT_S = 1.0
# Who has to wait longer is told so and decides.
LONGEST_WAIT_S = 60.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


def patiently(repo_id: str, revision: str, ask: Callable[[], T]) -> T:
    """What `ask` returns; it is called again after HTTP 429 and 5xx.

    Waits as long as the answer names (`Retry-After`, `RateLimit`).

    Raises:
        NotFoundError: as for `hub.resolve`, at once or after the last try.
    """
    wait_s = FIRST_WAIT_S
    for _ in range(TRIES - 1):
        try:
            with explained(repo_id, revision):
                return ask()
        except UnreachableError as error:
            if error.wait_s is None:
                raise
            named_s = error.wait_s or wait_s
            if named_s > LONGEST_WAIT_S:
                raise
            _log.warning("%s; trying again in %.0f s", error, named_s)
            time.sleep(named_s)
            wait_s *= 2
    with explained(repo_id, revision):
        return ask()
