"""The exceptions a user can meet, each with its exit code. Imports nothing of ours.

Every message is one line: what is wrong, where (file, tensor or key), and the way out.
Anything else that reaches the top is a bug of ours and exits with 1.
"""

from __future__ import annotations

from typing import ClassVar


class ApertusError(Exception):
    """Base of all expected failures; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(ApertusError):
    """The request itself is wrong: an option's value, an output path, a prompt that is too long."""

    exit_code = 2


class TooLongError(UsageError):
    """A prompt leaves no room for an answer in the model's context."""


class WrongTypeError(UsageError, TypeError):
    """A message or a tool holds a value of a wrong type: wrong usage, and Python's TypeError."""


class RejectedError(ApertusError):
    """An artefact (config, weights, tokenizer, template, manifest) is damaged or unsupported."""

    exit_code = 3


class NotFoundError(ApertusError):
    """A model or file does not exist, or cannot be reached (offline, gated, network)."""

    exit_code = 4


class ResourceError(ApertusError):
    """Not enough memory or disk for what was asked."""

    exit_code = 5
