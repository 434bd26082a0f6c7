"""`convert --device`: what would not fit is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from apertus_mlx.convert.job import prepare
from apertus_mlx.convert.plan.budget import require_fit
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.errors import ResourceError
from apertus_mlx.memory import parse_device
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint

# By hand: 512 positions, 2 layers, 2 key heads of 16, keys and values, 2 bytes.
CACHE_BYTES = 512 * 2 * 2 * 16 * 2 * 2


def test_the_limit_is_weights_and_cache(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", config_4x())
    plan = prepare(folder, Request(QuantSpec(8, 64)), "x").plan
    needed = plan.weight_bytes + CACHE_BYTES
    require_fit(plan, parse_device(f"{needed}B"))
    with pytest.raises(ResourceError) as caught:
        require_fit(plan, parse_device(f"{needed - 1}B"))
    assert "--bits 2" in str(caught.value) and " 8 (" not in str(caught.value)
    with pytest.raises(ResourceError, match="no width"):
        require_fit(plan, parse_device(f"{CACHE_BYTES}B"))
