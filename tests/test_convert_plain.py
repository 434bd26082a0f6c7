"""Conversion of Hugging Face checkpoints, compared with `mx.quantize` and with mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.config import read_config
from apertus_mlx.inventory import take_inventory
from convert import reading
from convert.job import convert, prepare
from convert.policy import Request, Rule
from quant.spec import FLOAT_MODES, QuantSpec
from tests import convert_builders as build

