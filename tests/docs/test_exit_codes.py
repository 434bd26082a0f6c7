"""docs/exit-codes.md has the codes of the errors, and what they are for."""

from __future__ import annotations

from apertus_mlx import errors
from tests.docs.markdown import code_column
from tests.house.test_house import ROOT

PAGE = ROOT / "docs" / "exit-codes.md"


def test_every_code_and_every_class_is_listed() -> None:
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and each.__module__ == errors.__name__
    ]
    codes = [int(code) for code in code_column(PAGE, "Codes")]
    # 0 and 130 have no class: nothing is raised, and Python's KeyboardInterrupt.
    assert codes == sorted({0, 130, *(each.exit_code for each in classes)})
    listed = dict(
        zip(
            code_column(PAGE, "Errors in Python"),
            map(int, code_column(PAGE, "Errors in Python", 1)),
            strict=True,
        )
    )
    assert listed == {each.__name__: each.exit_code for each in classes}
