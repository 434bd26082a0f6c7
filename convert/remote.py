"""The plan for a checkpoint on the Hub, from its headers alone, before any download."""

from __future__ import annotations

from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.recognise import recognise
from apertus_mlx.errors import UsageError
from apertus_mlx.hub.remote_headers import RemoteCheckpoint


def plan_remote(remote: RemoteCheckpoint, request: Request) -> Plan:
    """Plan from what `fetch_headers` returned.

    A head that the config ties is taken to equal the embedding, which only the weights can show.

    Raises:
        ApertusError: as for a local checkpoint.
    """
    if request.cuts_vocabulary:
        raise UsageError(
            f"{remote.repo_id}: which tokens are kept depends on its tokenizer, which is not here; "
            "download the model first"
        )
    source = recognise(remote.config(), remote.checkpoint().tensors, remote.repo_id)
    return make_plan(source, request)
