"""Placeholder."""
from typing import Annotated
import typer
def verify(directory: str) -> None:
    """x"""
