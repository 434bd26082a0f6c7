"""Renders chat templates that nobody trusts: Jinja with a short list of features.

This is the program of `TemplateProcess`. A line of JSON comes in, a line goes out; the system ends
it when it takes too much. It imports nothing of this package.
"""

from __future__ import annotations

import functools
import json
import re
import resource
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[3:]  # Jinja is there, and the standard library comes first

import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro, Undefined
from jinja2.visitor import NodeTransformer

_FILTERS = (
    "capitalize count d default first items join last length list lower map reject rejectattr "
    "replace safe select selectattr string title trim upper"
)
_TESTS = (
    "boolean defined false float integer iterable mapping none number sequence string true "
    "undefined == eq equalto != ne < lt lessthan <= le in > gt greaterthan >= ge"
)
_METHODS: dict[type, str] = {
    str: "capitalize endswith join lower lstrip replace rstrip split startswith strip title upper",
    dict: "get items keys values",
}
# Their first argument is a text to look for in a message, rather than one to write.
_SEARCHES = ("endswith", "lstrip", "replace", "rstrip", "split", "startswith", "strip")
# Most characters of a prompt: these, and so many for each of the messages and tools.
_MOST, _MOST_PER_CHARACTER = 2**20, 4
# How Python prints what is no data; it differs from run to run.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")


class _Generation(jinja2.ext.Extension):
    """The `generation` tag, which marks what a model wrote for training; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as transformers gives it to chat templates, less what they do not need."""

    texts: list[str]  # of the template that renders, those with control tokens
    now: datetime

    def __init__(self) -> None:
        extensions = [jinja2.ext.loopcontrols, _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters = {name: self.filters[name] for name in _FILTERS.split()}
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.tests = {name: self.tests[name] for name in _TESTS.split()}
        self.globals = {
            **{name: self.globals[name] for name in ("namespace", "range")},
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        known = isinstance(__obj, Macro | Undefined) or __obj in __self.globals.values()
        if isinstance(__obj, BuiltinMethodType):
            known = __obj.__name__ in _METHODS.get(type(__obj.__self__), "").split()
        if not known:
            name = getattr(__obj, "__name__", type(__obj).__name__)
            raise SecurityError(f"{name} is not available to chat templates")
        return __context.call(__obj, *args, **kwargs)

    def _strftime_now(self, form: str) -> str:
        return self.now.strftime(form)


def _raise_exception(message: Any) -> str:
    raise jinja2.TemplateError(message)


class _OwnTexts(NodeTransformer):
    """Makes the texts with control tokens that a template writes those in `_Sandbox.texts`."""

    def __init__(self, names: re.Pattern[str], tree: nodes.Template) -> None:
        self.texts: list[str] = []
        self._names = names
        self._searched = set(map(id, _searched(tree)))

    def visit_Const(self, node: Any) -> Any:
        text = node.data if isinstance(node, nodes.TemplateData) else node.value
        if id(node) in self._searched or not isinstance(text, str) or not self._names.search(text):
            return node
        self.texts.append(text)
        return nodes.EnvironmentAttribute(f"texts[{len(self.texts) - 1}]", lineno=node.lineno)

    visit_TemplateData = visit_Const


def _searched(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Yield what is compared with a message, or looked for in it."""
    for compare in tree.find_all(nodes.Compare):
        yield from (compare.expr, *(each.expr for each in compare.ops))
    called: Any
    for called in tree.find_all((nodes.Call, nodes.Filter)):
        if getattr(called, "name", getattr(called.node, "attr", "")) in _SEARCHES:
            yield from called.args[:1]


_sandbox = _Sandbox()


@functools.lru_cache(maxsize=8)
def _compiled(source: str, names: re.Pattern[str]) -> tuple[jinja2.Template, list[str]]:
    tree = _sandbox.parse(source)
    own = _OwnTexts(names, tree)
    return _sandbox.from_string(own.visit(tree)), own.texts


def render(question: Mapping[str, Any]) -> str:
    """Return what a template writes, with marks in place of the control tokens that it writes.

    Args:
        question: `name` and `source` of the template; `marks`, a character for each text of a
            control token in it; `texts`, variables that it may write as its own. To render it
            rather than only compile it, also `data`, messages and tools in JSON; `variables`,
            further ones; `now`.

    Raises:
        Exception: of any type, for what the template does wrong.
    """
    marks = question["marks"]
    names = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")
    template, texts = _compiled(question["source"], names)
    if "data" not in question:
        return ""
    _sandbox.now = datetime.fromisoformat(question["now"])

    def write(some: Mapping[str, str]) -> str:
        def own(text: str) -> str:
            return names.sub(lambda match: some.get(match[0], match[0]), text)

        _sandbox.texts = list(map(own, texts))
        messages, tools = json.loads(question["data"])
        variables = {name: own(text) for name, text in question["texts"].items()}
        variables |= question["variables"]
        return template.render(variables, messages=messages, tools=tools, documents=None)

    def attempt(some: Mapping[str, str]) -> str | None:
        """Return the text with `some` marks, or None if they make it another text."""
        try:
            result = write(some)
        except MemoryError:
            raise
        except Exception:  # a template can make any
            return None
        names_of = {ord(mark): name for name, mark in some.items()}
        return result if result.translate(names_of) == text else None

    text = write({})
    if len(text) > _MOST + _MOST_PER_CHARACTER * len(question["data"]):
        raise RuntimeError(f"it writes {len(text)} characters, too many for these messages")
    if any(address not in question["data"] for address in _ADDRESS.findall(text)):
        raise RuntimeError("it prints what is no data")
    marked = attempt(marks)
    if marked is None:
        alone = (name for name in marks if attempt({name: marks[name]}) is None)
        raise RuntimeError(
            f"it looks at the text of control token {next(alone, '')!r}, which is not supported"
        )
    return marked


def _explain(error: Exception) -> tuple[str, str]:
    """Return whose fault an error is, and a line that begins after the template's name."""
    says = " ".join((str(error) or type(error).__name__).split())[:300]
    if isinstance(error, RecursionError):
        says = "it nests calls or data without end"
    if type(error) is jinja2.TemplateError:
        return "refused", f": the chat template refuses these messages: {says}"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    line = getattr(error, "lineno", lines[-1] if lines else None)
    # A filter or test that is missing here is a TemplateAssertionError, a kind of this one.
    kind = "damaged" if type(error) is jinja2.TemplateSyntaxError else "failed"
    return kind, f"{f', line {line}' if line else ''}: the chat template failed: {says}"


def _answer(question: Mapping[str, Any]) -> str:
    try:
        return json.dumps(["written", render(question)])
    except MemoryError:
        raise
    except Exception as error:  # a template can make any
        kind, says = _explain(error)
        return json.dumps([kind, question["name"] + says])


def main(seconds: float, memory_bytes: int) -> None:
    """Answer questions until there are no more; who gets out of Jinja here can open nothing."""
    _answer({"name": "", "source": "{{ 'a' }}{{ b", "marks": {}})  # loads what loads late
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])  # the thread that started it may
    try:
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _answer(json.loads(line))
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(answer, flush=True)  # noqa: T201  # the other side reads it
    except MemoryError:
        signal.raise_signal(signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
