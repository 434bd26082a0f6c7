"""Turns off what libraries report to their makers about those who use them.

onnxruntime (from 1.32) makes a device id and a database in the user's cache folder and looks for a
host to report to; huggingface_hub tells the Hub more about this machine than it needs, and hf_xet
posts how each transfer went. All of them look at the environment when they are imported. So the
packages that use them (`cpu`, `hub`) call this when they are imported themselves, and so does the
command line, whose child processes inherit it.
"""

from __future__ import annotations

import os

VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def turn_off() -> None:
    """Turn it off in this process and its children."""
    for name in VARIABLES:
        os.environ[name] = "1"
