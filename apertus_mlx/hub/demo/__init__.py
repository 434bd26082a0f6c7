"""The tiny Apertus-architecture model that ships inside the package.

It is a demonstration and a quantization test bed; ``recipe`` holds the code that made it.
"""

from pathlib import Path

__all__ = ["NAME", "model_dir"]

# What it is called where several models are named.
NAME = "embedded"


def model_dir() -> Path:
    """Return the folder that holds the embedded model's files."""
    return Path(__file__).resolve().parent / "model"
