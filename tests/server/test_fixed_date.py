"""The date that a template writes stays that of the server's start."""

from __future__ import annotations

import pytest

from apertus_mlx.text.template import operations


def test_the_date_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_fixed", [])
    now = operations.GLOBALS["strftime_now"]

    def told() -> str:
        operations.set_clock()
        return str(now("%f %S"))

    assert len({told() for _ in range(1000)}) > 1
    operations.fix_now()
    assert len({told() for _ in range(1000)}) == 1
