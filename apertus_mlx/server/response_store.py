"""Responses that are kept in memory, so that a later request can go on from one."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.fields import shown

MOST_RESPONSES, MOST_STORED_BYTES = 256, 64 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A response and the items of its whole conversation, its own output last."""

    response: Mapping[str, Any]
    items: Sequence[Any]
    nbytes: int


@dataclass(slots=True)
class ResponseStore:
    """The latest responses: at most so many, and so many bytes of JSON; the oldest go first.

    The items of a conversation count for each of its responses. Any thread may use it.
    """

    most: int = MOST_RESPONSES
    most_bytes: int = MOST_STORED_BYTES
    nbytes: int = 0
    _kept: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, response: Mapping[str, Any], items: Sequence[Any]) -> None:
        """Keep a response; one that is larger than all the room is not kept."""
        nbytes = len(json.dumps([response, items]))
        if nbytes > self.most_bytes:
            return
        with self._lock:
            self._kept[response["id"]] = Stored(response, items, nbytes)
            self.nbytes += nbytes
            while len(self._kept) > self.most or self.nbytes > self.most_bytes:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def get(self, name: str) -> Stored:
        """What is kept under an id.

        Raises:
            ApiError: 404, nothing.
        """
        with self._lock:
            found = self._kept.get(name)
        if found is None:
            raise _missing(name)
        return found

    def before(self, name: str) -> Sequence[Any]:
        """The items that a request goes on from.

        Raises:
            ApiError: 400, there are none.
        """
        try:
            return self.get(name).items
        except ApiError as error:
            place = "previous_response_id"
            raise ApiError(
                400, f"{place}: {error.message}", param=place, code="previous_response_not_found"
            ) from None

    def drop(self, name: str) -> None:
        """Forget a response.

        Raises:
            ApiError: 404, there is none.
        """
        with self._lock:
            found = self._kept.pop(name, None)
            if found is None:
                raise _missing(name)
            self.nbytes -= found.nbytes


def _missing(name: str) -> ApiError:
    return ApiError(404, f"response {shown(name)} is not kept here", code="not_found")
