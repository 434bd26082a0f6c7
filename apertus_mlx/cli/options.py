"""The options of commands, made of the annotations of functions and dataclasses."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from apertus_mlx.system.arguments import Option, find_option, hints_of, kinds_of

ModelArgument = Annotated[
    str | None, Option("Model folder or Hub id; default: the embedded model.")
]
ModelOption = Annotated[
    str | None,
    Option("Model folder or Hub id (org/name); default: the embedded model.", flags="-m"),
]
SystemOption = Annotated[str | None, Option("System message.", flags="-s")]
ThinkOption = Annotated[bool, Option("Let the model deliberate first (shown on stderr).")]
OutputFilterOption = Annotated[
    str | None,
    Option(
        "Replace in answers what this file of rules says, or an installed filter of this name.",
        metavar="FILE",
    ),
]
PlotOption = Annotated[
    Path | None, Option("Draw what was measured into this SVG, PNG or PDF file.")
]
JsonOption = Annotated[bool, Option("Print one JSON object.")]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options that its annotations and those of its groups say.

    A group is a parameter annotated with a dataclass, which is made of its fields' options, or with
    `Annotated[dict[str, Any], function]`: what the command line gives of the function's arguments.
    """
    parameters, groups = [], {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        target = parameter.annotation
        make = target if inspect.isclass(target) and hasattr(target, "__post_init__") else None
        if get_origin(target) is Annotated and inspect.isfunction(target.__metadata__[0]):
            target, make = target.__metadata__[0], dict
        if make is None:
            parameters.append(_typed(parameter, parameter.annotation))
            continue
        options = list(_options(target))
        groups[parameter.name] = make, [option.name for option in options]
        parameters += options

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (make, names) in groups.items():
            given[name] = make(**{each: given.pop(each) for each in names})
        command(**given)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run


def _options(target: Callable[..., object]) -> Iterator[inspect.Parameter]:
    hints = hints_of(target)
    for parameter in inspect.signature(target).parameters.values():
        if parameter.name in hints and find_option(hints[parameter.name]):
            yield _typed(parameter, hints[parameter.name])


def _typed(parameter: inspect.Parameter, hint: Any) -> inspect.Parameter:
    """The parameter as typer reads it. Of several types the command line gives the first."""
    option, kinds = find_option(hint), kinds_of(hint)
    if option is None:
        return parameter
    kind: Any = kinds[0]
    several = [each for each in kinds if get_origin(each) is Sequence]
    if kind in several:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        choices: Any = enum.StrEnum
        kind = choices(parameter.name, {value: value for value in get_args(kind)})
    if several:
        kind = list[kind]
    if NoneType in kinds:
        kind = kind | None
    words: dict[str, Any] = {"help": option.words, "metavar": option.metavar}
    if int in kinds and option.range is not None and option.range.most <= 2**32:
        words |= {"min": option.range.least, "max": option.range.most}
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
        return parameter.replace(annotation=Annotated[kind, typer.Argument(**words)])
    flag = f"--{parameter.name.replace('_', '-')}"
    if bool in kinds and NoneType in kinds:
        flag += f"/--no-{flag[2:]}"
    return parameter.replace(
        annotation=Annotated[kind, typer.Option(flag, *option.flags.split(), **words)]
    )
