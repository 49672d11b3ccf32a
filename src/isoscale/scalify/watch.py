"""Every operator's predicted scale against its measured RMS, in both directions.

A tensor's scale says what RMS was predicted; the RMS of its data is how far that was off. `watch` records one row per
tensor that an operator made, `Watched` sums up and says where a rescale would help. It looks and changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from isoscale._base.files import atomic_write
from isoscale.scalify import registry
from isoscale.scalify.errors import user_line
from isoscale.scalify.tensor import ScaledTensor


@dataclass(frozen=True)
class Row:
    """One tensor that an operator made.

    Attributes:
        index: in the order of execution.
        op: the operator.
        kind: layout, rule or fallback.
        direction: forward or backward.
        module: path of the module at work.
        shape: of the tensor.
        dtype: of its data.
        scale: log2 of the predicted RMS; None under any scale.
        rms: log2 of the data's RMS: how far the prediction is off; None for zeros, inf for data that are not finite.
        inputs: indices of the rows that it was made from.
        line: of user code, forward only.
    """

    index: int
    op: str
    kind: str
    direction: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    rms: float | None
    inputs: tuple[int, ...]
    line: str = ""

    @property
    def off(self) -> float:
        """|log2 of the data's RMS|; 0 where there is nothing to measure."""
        return 0.0 if self.rms is None else abs(self.rms)


@dataclass
class Watched:
    """What one pass showed.

    Attributes:
        rows: every tensor, in order.
        formulas: operator -> formula of its rule.
    """

    rows: list[Row] = field(default_factory=list)
    formulas: dict[str, str] = field(default_factory=dict)

    def within(self, octaves: float = 3.0, direction: str | None = None) -> float:
        """Share of the measured tensors whose prediction is off by at most so many octaves; NaN without any."""
        rows = self.measured(direction)
        return sum(row.off <= octaves for row in rows) / len(rows) if rows else math.nan

    def measured(self, direction: str | None = None) -> list[Row]:
        """The rows with an RMS, views and memory that nothing was written to apart."""
        return [r for r in self.rows if r.rms is not None and r.kind != "layout" and ".empty" not in r.op
                and ".new_empty" not in r.op and direction in (None, r.direction)]  # fmt: skip

    def worst(self, count: int | None = None) -> list[Row]:
        """Measured rows, the worst prediction first."""
        return sorted(self.measured(), key=lambda row: (-row.off, row.index))[:count]

    def proposals(self, octaves: float = 3.0) -> list[tuple[Row, str]]:
        """Where predictions go wrong first, and the rescale that would mend it there.

        A row is named if it is off by more than so many octaves while everything that it was made from is not.
        """
        by = {row.index: row for row in self.rows}
        out = []
        for row in self.measured():
            if row.off <= octaves or any(by[i].off > octaves for i in row.inputs):
                continue
            place = f'iso.scalify.place(model, "{row.module}", direction="{row.direction}")'
            name = "rescale_l2" if row.direction == "forward" else "rescale_l2_grad"
            inside = f"iso.scalify.{name}(x) behind {row.op.split('.')[1]}"
            out.append((row, f"{place}, or {inside}" if row.module else inside))
        return out

    def save(self, path: Path | str) -> None:
        """As JSON lines, the formulas first."""
        lines = [json.dumps({"formulas": self.formulas})]
        lines += [json.dumps(asdict(row)) for row in self.rows]
        atomic_write(Path(path), "\n".join(lines).replace("Infinity", '"inf"') + "\n")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, seen: Watched, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.stack = seen, stack
        self.rows = WeakIdKeyDictionary()
        self.nodes: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, ScaledTensor)]
        if not made:
            return out
        node: Any = torch._C._current_autograd_node()
        if node is None:
            direction, module = "forward", self.stack[-1] if self.stack else ""
            self.nodes[torch._C._autograd._get_sequence_nr() - 1] = module
        else:
            direction, module = "backward", self.nodes.get(node._sequence_nr(), "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ScaledTensor)]
        inputs = tuple(dict.fromkeys(self.rows[leaf] for leaf in given if leaf in self.rows))
        row = registry.find(func)
        if row is not None:
            self.seen.formulas.setdefault(str(func), row.formula)
        for leaf in made:
            index = len(self.seen.rows)
            self.seen.rows.append(
                Row(index, str(func), "fallback" if row is None else row.kind, direction, module,
                    tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."), *_measure(leaf), inputs,
                    user_line() if direction == "forward" else "")
            )  # fmt: skip
            self.rows[leaf] = index
        return out


def _measure(x: ScaledTensor) -> tuple[float | None, float | None]:
    scale = float(x._scale.detach().amax()) if x._scale.numel() else 0.0
    data = x._data.detach().double()
    size = float(data.square().mean().sqrt()) if data.numel() else 0.0
    rms = None if size == 0 else math.log2(size) if math.isfinite(size) else math.inf
    return (math.log2(scale) if scale > 0 else None), rms


@contextmanager
def watch(model: nn.Module | None = None) -> Iterator[Watched]:
    """Record every tensor that operators make inside.

    Args:
        model: whose module paths are told; None for none.

    Yields:
        What was seen, complete at the end of the block.
    """
    seen, stack = Watched(), [""]
    handles: list[Any] = []
    for path, module in model.named_modules() if model is not None else ():
        handles.append(module.register_forward_pre_hook(_enter(stack, path), prepend=True))
        handles.append(module.register_forward_hook(_leave(stack), always_call=True))
    try:
        with _Recorder(seen, stack):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _enter(stack: list[str], path: str) -> Callable[..., None]:
    return lambda *_: stack.append(path)


def _leave(stack: list[str]) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        stack.pop()

    return leave


def measure(model: nn.Module, loss: Callable[[], Tensor]) -> Watched:
    """One forward and backward pass of a scaled model; its gradients are cleared.

    Args:
        model: scaled.
        loss: runs the forward and returns the scalar loss.
    """
    model.zero_grad(set_to_none=True)
    with watch(model) as seen:
        loss().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return seen
