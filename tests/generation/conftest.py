"""Models that are expensive to make and that no test changes."""

from __future__ import annotations

import pytest

from tests.draft_play import Models, load_models


@pytest.fixture(scope="session", params=["mlx", "cpu"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A model on each compute, and what drafts for it."""
    if request.param == "cpu":
        pytest.importorskip("onnxruntime")
    return load_models(tmp_path_factory.mktemp("models"), request.param)
