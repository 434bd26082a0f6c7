"""The plan for a checkpoint on the Hub, from its headers alone, before any download."""

from __future__ import annotations

from apertus_mlx.checkpoint.config import CONFIG_FILE, parse_config
from apertus_mlx.checkpoint.header import parse_header
from apertus_mlx.checkpoint.tensors import INDEX_FILE, merge_headers, read_weight_map
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.recognise import recognise
from apertus_mlx.errors import RejectedError
from apertus_mlx.hub.remote_headers import RemoteCheckpoint
from apertus_mlx.system.strict_json import parse_object


def plan_remote(checkpoint: RemoteCheckpoint, request: Request) -> Plan:
    """Plan from what `fetch_headers` returned.

    A head that the config ties is taken to equal the embedding, which only the weights can show.

    Raises:
        ApertusError: as for a local checkpoint.
    """
    name = checkpoint.repo_id
    if CONFIG_FILE not in checkpoint.files:
        raise RejectedError(f"{name}: no {CONFIG_FILE}; not a model repository")
    values = parse_object(checkpoint.files[CONFIG_FILE], f"{name}: {CONFIG_FILE}")
    config = parse_config(values, f"{name}: {CONFIG_FILE}")
    weight_map = None
    if INDEX_FILE in checkpoint.files:
        index = parse_object(checkpoint.files[INDEX_FILE], f"{name}: {INDEX_FILE}")
        weight_map = read_weight_map(index, f"{name}: {INDEX_FILE}")
    files = set(weight_map.values()) if weight_map is not None else None
    headers = {}
    for file, raw in checkpoint.headers.items():
        if files is not None and file not in files:
            continue
        where = f"{name}: {file}"
        headers[file] = parse_header(raw.header_json, raw.file_size, file, where)
    if files is not None and files - headers.keys():
        missing = sorted(files - headers.keys())[0]
        raise RejectedError(f"{name}: {missing} is named in {INDEX_FILE} but missing")
    tensors = merge_headers(headers, weight_map, name)
    source = recognise(config, tensors, name, untied_head=False)
    return make_plan(source, request)
