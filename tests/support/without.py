"""Attacks that are played twice: caught by a named check, then with just that check taken away.

A refusal proves little if the attack would have failed anyway. ``without`` takes single statements
out of the running code, on both sides of the wire, and ``check_attack`` demands that the attack
then reaches its end, where it asserts that it got what it was after.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import grpc
import pytest

from protocols.errors import FederationError
from protocols.secagg.errors import CheckFailedError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One refusal in the code: where it stands, and how it shows.

    ``without`` replaces the statement that holds ``marker`` by ``then``: a ``raise``, or a call
    that does nothing but check.
    """

    clause: str  # of protocols/spec/masked-update.md
    function: Any
    says: str  # a piece of the sentence that the refusal gives
    marker: str = ""  # a piece of the statement; by default of the sentence
    then: str = "pass"
    forget: Callable[[], object] = lambda: None  # what remembers answers of the code as it was

    def recognise(self, error: Exception) -> None:
        """Assert that it was this check that refused."""
        said = error.details() if isinstance(error, grpc.RpcError) else str(error)
        assert self.says in (said or ""), f"want {self.says!r} [{self.clause}], got {said!r}"
        if isinstance(error, CheckFailedError) and error.clause:
            assert error.clause == self.clause


@dataclass(frozen=True, kw_only=True)
class Rule(Check):
    """A check that is no single statement: a structure, taken away by exchanging a function."""

    target: Any
    name: str
    instead: Callable[[Any], Any]  # real function -> what is put in its place


class _Cut(ast.NodeTransformer):
    def __init__(self, check: Check) -> None:
        self.check = check
        self.marker = check.marker or check.says
        self.cut = 0

    def _visit(self, node: ast.stmt) -> ast.AST:
        if self.marker not in ast.unparse(node):
            return node
        self.cut += 1
        return ast.copy_location(ast.parse(self.check.then).body[0], node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return self._visit(node) if isinstance(node.value, ast.Call) else node  # no docstring


def _code_without(function: FunctionType, checks: Iterable[Check]) -> Any:
    """The code of ``function`` with exactly one statement fewer for each check."""
    assert not function.__code__.co_freevars
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    definition.decorator_list = []
    for check in checks:
        cutter = _Cut(check)
        tree = cutter.visit(tree)
        assert cutter.cut == 1, f"{check.marker or check.says!r} stands {cutter.cut} times"
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)  # for tracebacks
    flags = __future__.annotations.compiler_flag
    code = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    names: dict[str, Any] = dict(function.__globals__)
    exec(code, names)  # noqa: S102 - our own source, one statement fewer
    return names[function.__name__].__code__


@contextmanager
def without(*checks: Check) -> Iterator[None]:
    """Run with these checks, and no others, taken out of the code of both sides."""
    with ExitStack() as stack:
        for check in checks:
            stack.callback(check.forget)  # runs last, when the code is whole again
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        by_function: dict[FunctionType, list[Check]] = {}
        for check in checks:
            if isinstance(check, Rule):
                real = getattr(check.target, check.name)
                patch.setattr(check.target, check.name, check.instead(real))
            else:
                by_function.setdefault(inspect.unwrap(check.function), []).append(check)
        for function, some in by_function.items():
            patch.setattr(function, "__code__", _code_without(function, some))
        for check in checks:
            check.forget()
        yield


def layers(*checks: Check) -> Any:
    """Rows for ``removed, caught``: with the first k checks away the next one catches; without
    any of them the attack goes through (``caught`` is None)."""
    rows = [
        pytest.param(
            checks[:k],
            checks[k] if k < len(checks) else None,
            id="+".join(c.clause for c in checks[:k]) + "-away" if k else "all-checks",
        )
        for k in range(len(checks) + 1)
    ]
    return pytest.mark.parametrize(("removed", "caught"), rows)


def check_attack(
    attack: Callable[[], None], removed: tuple[Check, ...], caught: Check | None
) -> None:
    """Play ``attack`` with ``removed`` away: ``caught`` refuses it, or it reaches its end.

    The attack itself asserts at its end that it got what it was after.
    """
    with without(*removed):
        if caught is None:
            attack()
            return
        with pytest.raises((FederationError, grpc.RpcError)) as refused:
            attack()
    caught.recognise(refused.value)
