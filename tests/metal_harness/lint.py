"""What Metal's compiler would refuse, found without it: libclang reads the kernel's text.

Address spaces become attributes that clang checks, only Metal's functions exist (cpp/lint), and a
walk over the syntax tree finds what clang accepts and Metal does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from .compile import CPP
from .mlx_text import GeneratedKernel
from .translate import ATTRIBUTES, FORBIDDEN, THREADGROUP_VARIABLE

# MLX compiles with the language of the system it runs on: either of them.
STANDARDS = ("c++14", "c++17")
TARGET = ("-target", "arm64-apple-macosx14.0", "-ffreestanding", "-nostdinc", "-Wno-everything")
NEWER = "-Werror=c++17-extensions"
SPACE = re.compile(r"\b(?:device|constant|threadgroup|thread)\b")
CONSTANT, THREADGROUP = 2, 3
HEADER, SIGNATURE, BODY = "header", "signature", "body"
MAIN = "kernel.cpp"


@cache
def lint(kernel: GeneratedKernel, standard: str) -> tuple[str, ...]:
    """Messages, each with a line in the header or body; none if the text is clean.

    Args:
        kernel: as MLX generates it.
        standard: one of `STANDARDS`.
    """
    from clang import cindex

    files = {
        HEADER: kernel.header + "\n",
        SIGNATURE: kernel.signature,
        # As everywhere in clang, only a static variable may lie in an address space.
        BODY: THREADGROUP_VARIABLE.sub(r"static \g<0>", kernel.body) + "\n}\n",
    }
    includes = [f'#include "{CPP}/lint/metal_lint.h"\n']
    includes += [f"#pragma GCC poison {' '.join(FORBIDDEN)}\n"]
    includes += [f'#include "{file}"\n' for file in files]
    unit = cindex.Index.create().parse(
        MAIN,
        args=["-x", "c++", f"-std={standard}", "-I.", *TARGET, NEWER],
        unsaved_files=[(MAIN, "".join(includes)), *((f"./{k}", v) for k, v in files.items())],
    )
    refused = [
        f"{_place(diagnostic.location)}: {diagnostic.spelling}"
        for diagnostic in unit.diagnostics
        if diagnostic.severity >= cindex.Diagnostic.Error
    ]
    walk = _Walk(cindex, files, kernel.function)
    return tuple(dict.fromkeys([*refused, *walk.problems(unit.cursor), *_misplaced(kernel)]))


def _place(location: Any) -> str:
    name = str(location.file).removeprefix("./") if location.file else MAIN
    return f"{name}:{location.line}"


def _misplaced(kernel: GeneratedKernel) -> Iterator[str]:
    """MLX declares an attribute only if its name occurs in the body."""
    for attribute in sorted(ATTRIBUTES):
        if attribute in kernel.header and attribute not in kernel.body:
            yield f"header: {attribute} does not occur in the body, so MLX does not declare it"


class _Walk:
    """Looks at the syntax tree of a kernel."""

    def __init__(self, cindex: Any, files: dict[str, str], function: str) -> None:
        self.kinds = cindex.CursorKind
        self.types = cindex.TypeKind
        self.storage = cindex.StorageClass
        self.files = {name: text.encode() for name, text in files.items()}
        self.function = function
        self.calls: dict[str, set[str]] = {}
        kinds = self.kinds
        self.refused = {
            kinds.LAMBDA_EXPR: "a lambda",
            kinds.GOTO_STMT: "goto",
            kinds.CXX_TRY_STMT: "an exception",
            kinds.CXX_NEW_EXPR: "new",
            kinds.CXX_DELETE_EXPR: "delete",
            kinds.CXX_DYNAMIC_CAST_EXPR: "dynamic_cast",
        }
        casts = (kinds.CSTYLE_CAST_EXPR, kinds.CXX_REINTERPRET_CAST_EXPR)
        self.checks: dict[Any, Callable[[Any, tuple[Any, ...]], Iterator[str]]] = {
            kinds.VAR_DECL: self._variable,
            kinds.PARM_DECL: self._pointer,
            kinds.FIELD_DECL: self._pointer,
            kinds.FLOATING_LITERAL: self._literal,
            kinds.CALL_EXPR: self._call,
            **dict.fromkeys(casts, self._cast),
            **dict.fromkeys(self.refused, self._refused),
        }

    def problems(self, root: Any) -> Iterator[str]:
        """Everything that is wrong below `root`."""
        for cursor in root.get_children():
            if self._file(cursor) in self.files:
                yield from self._below(cursor, (cursor,))
        yield from self._recursion()

    def _below(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        """Problems of `cursor`, the last of `path`, and of all in it."""
        check = self.checks.get(cursor.kind)
        if check is not None:
            for problem in check(cursor, path):
                yield f"{_place(cursor.location)}: {problem}"
        for child in cursor.get_children():
            yield from self._below(child, (*path, child))

    def _variable(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        space = cursor.type.get_address_space()
        if cursor.type.kind == self.types.CONSTANTARRAY:
            space = space or cursor.type.get_array_element_type().get_address_space()
        in_function = any(self._is_function(parent) for parent in path[:-1])
        if space == THREADGROUP:
            # Function, its braces, the statement, the variable.
            if path[0].spelling != self.function or len(path) != 4:
                yield f"threadgroup variable '{cursor.spelling}' outside a kernel's own braces"
            if "=" in self._text(cursor):
                yield f"threadgroup variable '{cursor.spelling}' has an initial value"
        elif space != CONSTANT and (not in_function or cursor.storage_class == self.storage.STATIC):
            yield f"'{cursor.spelling}' outlives its thread and is not in constant memory"
        yield from self._pointer(cursor, path)

    def _pointer(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        pointers = (self.types.POINTER, self.types.LVALUEREFERENCE, self.types.RVALUEREFERENCE)
        if cursor.type.kind in pointers and not SPACE.search(self._declaration(cursor)):
            yield f"pointer '{cursor.spelling}' has no address space"

    def _literal(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        if cursor.type.kind == self.types.DOUBLE:
            yield f"{self._text(cursor)} is a double in C++ and a float in Metal: write the f"

    def _cast(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        if cursor.type.kind != self.types.POINTER:
            return
        to = cursor.type.get_pointee().get_address_space()
        for operand in cursor.get_children():
            kind = operand.type.kind
            if kind == self.types.POINTER and operand.type.get_pointee().get_address_space() != to:
                yield f"a cast to '{cursor.type.spelling}' leaves the address space"

    def _refused(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        yield f"Metal has no {self.refused[cursor.kind].removeprefix('a ').removeprefix('an ')}"

    def _call(self, cursor: Any, path: tuple[Any, ...]) -> Iterator[str]:
        callers = [parent.get_usr() for parent in path if self._is_function(parent)]
        if cursor.referenced is not None and callers:
            self.calls.setdefault(callers[-1], set()).add(cursor.referenced.get_usr())
        yield from ()

    def _recursion(self) -> Iterator[str]:
        for function in self.calls:
            reached: set[str] = set()
            ahead = [function]
            while ahead:
                new = self.calls.get(ahead.pop(), set()) - reached
                reached |= new
                ahead += new
            if function in reached:
                yield f"{HEADER}: recursion in {function}"

    def _is_function(self, cursor: Any) -> bool:
        kinds = (self.kinds.FUNCTION_DECL, self.kinds.FUNCTION_TEMPLATE, self.kinds.CXX_METHOD)
        return cursor.kind in kinds

    def _file(self, cursor: Any) -> str:
        return _place(cursor.location).rpartition(":")[0]

    def _declaration(self, cursor: Any) -> str:
        """Its text from the bracket, comma or semicolon before it: `thread` lies outside it."""
        source = self.files.get(self._file(cursor), b"")[: cursor.extent.end.offset]
        before = source[: cursor.extent.start.offset]
        return source[max(before.rfind(mark) for mark in b"(,;{}") + 1 :].decode()

    def _text(self, cursor: Any) -> str:
        start, end = cursor.extent.start, cursor.extent.end
        source = self.files.get(self._file(cursor), b"")
        return source[start.offset : end.offset].decode()
