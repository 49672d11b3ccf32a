"""The rule table: aten operator -> how its scale follows from its inputs' scales.

A rule is a pure function. It gets the operator's own arguments, with a `Pair` where the operator was given a scaled
tensor, and returns a `Pair`, a tuple of such, or plain tensors (a comparison's booleans). It is one of two kinds:

* layout: moves or copies elements and keeps the scale;
* rule: predicts the output's scale from input scales and shapes, under an assumption that its docstring states.

The third way, a fallback (unscale, run, scale 1), is no rule: a user opts in, operator by operator. An operator that
writes into its input is looked up as its functional form, and refused if that has no rule: on unscaled copies it would
do nothing, silently.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch._ops import OpOverload

from isoscale._base.errors import ConfigError, did_you_mean

Kind = Literal["layout", "rule"]
RuleFunction = Callable[..., Any]
F = TypeVar("F", bound=RuleFunction)


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        op: the operator.
        function: the rule.
        kind: layout or rule.
        source: a digest of the function's code; compiled graphs are kept apart by it.
    """

    op: OpOverload
    function: RuleFunction
    kind: Kind
    source: str

    @property
    def formula(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]


_TABLE: dict[OpOverload, Rule] = {}
_LATER: dict[str, tuple[RuleFunction, Kind]] = {}
TABLE = MappingProxyType(_TABLE)
"""Read only; `rule` adds to it."""


def rule(*ops: OpOverload | str, kind: Kind = "rule", replace: bool = False) -> Callable[[F], F]:
    """Register a rule for one or several operators.

    Args:
        ops: overloads, such as `torch.ops.aten.tanh.default` or an operator of your own; `prims::fma`, a name, for one
            that exists only once its library is imported.
        kind: `layout` if the output keeps the input's scale by moving elements, otherwise `rule`.
        replace: take the place of a rule that is there.

    Raises:
        ConfigError: an operator has a rule already, or is none.
    """

    def register(function: F) -> F:
        for op in ops:
            if isinstance(op, str) and "::" in op:
                _LATER[op] = (function, kind)
                continue
            if not isinstance(op, OpOverload):
                raise ConfigError(
                    "a rule is for one overload of an operator", key="ops", value=str(op), place=function.__name__,
                    hint="write torch.ops.aten.tanh.default, not torch.ops.aten.tanh or torch.tanh",
                )  # fmt: skip
            if op in _TABLE and not replace:
                raise ConfigError(
                    f"{op} has a rule already", key="ops", value=_TABLE[op].function.__name__,
                    place=function.__name__, hint="replace=True takes its place",
                )  # fmt: skip
            _TABLE[op] = Rule(op, function, kind, _digest(function))
        version.cache_clear()
        return function

    return register


def _digest(function: RuleFunction) -> str:
    code = function.__code__
    cells = tuple(repr(cell.cell_contents) for cell in function.__closure__ or ())
    text = repr((code.co_code, code.co_names, cells, [str(c) for c in code.co_consts if not inspect.iscode(c)]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def version() -> str:
    """A digest of every rule in the table and of this package's files; part of what a compiled graph is kept under.

    The compile cache does not look into the rules: without this a graph made before an edit would be served after it.
    """
    parts = sorted(f"{op} {row.source}" for op, row in _TABLE.items())
    folder = Path(__file__).parent
    parts += [path.read_text() for path in sorted(folder.rglob("*.py"))] if folder.is_dir() else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def writes(op: OpOverload) -> bool:
    """Whether an operator writes into one of its arguments."""
    return op._schema.is_mutable


_OTHER_OVERLOADS = {"aten::pow_.Scalar": "Tensor_Scalar", "aten::pow_.Tensor": "Tensor_Tensor"}


def functional(op: OpOverload) -> OpOverload | None:
    """The form of an in-place or out= operator that writes nowhere: add_.Tensor -> add.Tensor; None without one."""
    namespace, _, name = str(op._schema.name).partition("::")
    overload = _OTHER_OVERLOADS.get(f"{op._schema.name}.{op._overloadname}", op._overloadname)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    elif overload == "out" or overload.endswith("_out"):
        overload = overload.removesuffix("out").removesuffix("_")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return None
    inputs = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
    for candidate in dict.fromkeys((overload or "default", overload, *packet.overloads())):
        found = getattr(packet, candidate, None) if candidate else None
        if not isinstance(found, OpOverload) or writes(found):
            continue
        if inputs == [(a.name, str(a.type)) for a in found._schema.arguments]:
            return found
    return None


def find(op: OpOverload) -> Rule | None:
    """The rule of an operator, or of its functional form where it writes into its inputs."""
    if op not in _TABLE and op._schema.name in _LATER:
        function, kind = _LATER.pop(op._schema.name)
        rule(op, kind=kind)(function)
    row = _TABLE.get(op)
    if row is None and writes(op):
        other = functional(op)
        row = _TABLE.get(other) if other is not None else None
    return row


def suggestion(op: OpOverload) -> str:
    """Names of operators with rules that are spelt like this one."""
    return did_you_mean(str(op), [str(known) for known in _TABLE])
