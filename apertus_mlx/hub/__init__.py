"""The Hugging Face Hub: a repository id becomes a pinned folder, or headers read from afar.

Imports nothing heavy: `huggingface_hub` is imported inside the functions that need it.
"""

from apertus_mlx.hub.listing import is_repo_id
from apertus_mlx.hub.remote_headers import RemoteCheckpoint, fetch_headers
from apertus_mlx.hub.snapshot import Snapshot, locate, resolve
from apertus_mlx.system import telemetry

__all__ = [
    "RemoteCheckpoint",
    "Snapshot",
    "fetch_headers",
    "is_repo_id",
    "locate",
    "resolve",
]

telemetry.turn_off()
