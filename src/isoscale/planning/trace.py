"""What each parameter of any model is for, read off one forward.

Names, classes and order of modules say nothing here: a forward on an example is recorded operator by operator, and the
recorded graph is asked who multiplies what, where the residual branches are, which products are attention scores.
It works on the meta device, so a model of any size costs no memory. What is lost: a parameter that this one forward
does not touch is only listed as `unused`, and a branch in Python code that the example does not take is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.example import make_example
from isoscale.planning.names import normalise
from isoscale.planning.trace_attention import attention, consumers, normalised, routes
from isoscale.planning.trace_flow import ends, projected, residuals
from isoscale.planning.trace_graph import Consumed, Graph
from isoscale.planning.trace_record import record

Kind = Literal["lookup", "matmul", "conv", "gain", "shift", "other"]


@dataclass(frozen=True)
class Use:
    """How one parameter is used.

    Args:
        kinds: `lookup` picked by integer index; `matmul`, `conv` a weight; `gain` multiplies an activation elementwise
            (also as `1 + w`); `shift` is added to one or stands beside it (bias, position table, class token); `other`
            anything else (through an exp, as an exponent).
        contracted: dims of the parameter that are summed over (its fan-in); None for other kinds, or when uses differ.
        groups: of a convolution, else 1.
        inside: used inside a residual branch.
        after: used after the last residual add on its way (final norm, readout); False without residual adds.
        routes: a matmul that decides which expert a token goes to.
        normalised: a gain or shift of something normalised.
        bent: a matmul or convolution takes it, but after something nonlinear (a normalised or squashed weight).
    """

    kinds: frozenset[Kind]
    contracted: tuple[int, ...] | None
    groups: int
    inside: bool
    after: bool
    routes: bool
    normalised: bool
    bent: bool = False


@dataclass(frozen=True)
class Attention:
    """One place where queries meet keys.

    Args:
        path: the innermost module running there.
        head_size: extent that q.k sums over.
        scale: product of the numbers between what makes q and k (projections, rope, norms) and the softmax.
        queries: parameters that q is linear in: the projection's weight and bias, or the gain of a norm on q.
        fused: whether some of them make k or v too.
    """

    path: str
    head_size: int
    scale: float
    queries: frozenset[str]
    fused: bool


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Args:
        ends: scaling all of these parameters by c scales what the branch adds by c; empty when unresolved.
        path: the innermost module running where it is added.
    """

    ends: frozenset[str]
    path: str


@dataclass(frozen=True)
class Trace:
    """What one forward said about a model.

    Args:
        uses: by normalised name; a parameter shared under several names stands once, under the first.
        branches: residual adds in order.
        attention: products of queries and keys in order.
        feeds: for each matmul weight after the last residual add, the parameters that its input is linear in (gain and
            shift of the final norm); empty where the raw stream or something nonlinear feeds it.
        unused: trainable parameters that the forward did not touch.
    """

    uses: Mapping[str, Use]
    branches: tuple[Branch, ...]
    attention: tuple[Attention, ...]
    feeds: Mapping[str, frozenset[str]]
    unused: tuple[str, ...]


def trace(model: nn.Module, example: object = None) -> Trace:
    """Run the model once and say what each parameter is for. The model, its mode and all random state stay as they are.

    Args:
        model: any module, on any device (meta included).
        example: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; None to guess.

    Raises:
        PlanError: no example could be guessed, or the forward failed on it.
    """
    if torch.get_default_device().type == "meta":  # numbers that the forward makes should keep their values
        with torch.device("cpu"):
            return trace(model, example)
    inputs = make_example(model, example)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        graph = record(model, inputs.args, inputs.kwargs)
    except Exception as error:
        more = "; on the meta device values are made up, a real copy may trace" if on_meta else ""
        raise PlanError(
            f"the forward of {type(model).__name__} failed on {inputs.said}: {type(error).__name__}: {error}",
            key="example", hint=f"give example= (a tensor, a tuple or a dict) for forward{inputs.signature}{more}",
        ) from error  # fmt: skip
    unused = _unused(model, graph)
    if unused and not on_meta:
        with suppress(Exception):  # experts that got no token: on meta every expert gets one
            other = record(model, inputs.args, inputs.kwargs, on_meta=True)
            if len(less := _unused(model, other)) < len(unused):
                graph, unused = other, less
    return _read(graph, unused)


def _unused(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    names = ((normalise(raw), parameter) for raw, parameter in model.named_parameters())
    return tuple(name for name, parameter in names if parameter.requires_grad and name not in graph.touched)


def _read(g: Graph, unused: tuple[str, ...]) -> Trace:
    adds = residuals(g)
    streams = {add.add for add in adds} | {add.stream for add in adds}
    inside = frozenset().union(*(add.region for add in adds))
    before, behind = _sides(g, {add.add for add in adds})
    after = {node.id for node in g.nodes if node.id in behind and node.id not in before and node.id not in inside}
    by_name: dict[str, list[Consumed]] = {name: [] for name in sorted(g.touched)}
    for one in g.consumed:
        if not (one.kind == "lookup" and one.at in g.weights):
            by_name[one.name].append(one)
    order = {source.name: node.id for node in g.nodes if node.op == "param" for source in node.sources}
    users = consumers(g)
    uses = {name: _use(g, by_name[name], inside, after, users) for name in sorted(by_name, key=order.__getitem__)}
    feeds = {
        one.name: ends(g, g.nodes[g.nodes[one.at].inputs[0]], streams).params
        for one in g.consumed if one.kind == "matmul" and one.at in after
    }  # fmt: skip
    return Trace(
        uses=uses,
        branches=tuple(Branch(ends(g, g.nodes[a.branch], streams).params, g.nodes[a.add].path) for a in adds),
        attention=tuple(Attention(a.path, a.head_size, a.scale, a.queries, a.fused) for a in attention(g)),
        feeds=feeds, unused=unused,
    )  # fmt: skip


def _sides(g: Graph, tops: set[int]) -> tuple[set[int], set[int]]:
    """Ids of what some residual add (`tops`) is made from, itself included, and of what is made from one."""
    before, behind = tops | set(projected(g) if tops else ()), set[int]()
    for node in reversed(g.nodes):
        if node.id in before:
            before.update(node.inputs)
    for node in g.nodes:
        if any(i in behind or i in tops for i in node.inputs):
            behind.add(node.id)
    return before, behind


def _use(g: Graph, found: list[Consumed], inside: frozenset[int], after: set[int], users: list[list[int]]) -> Use:
    weights = [one for one in found if one.kind in ("matmul", "conv")]
    contracted = {one.contracted for one in weights}
    steered = [one for one in found if one.kind in ("gain", "shift")]
    within = any(one.at in inside for one in found)
    kinds: set[Kind] = {cast(Kind, one.kind) for one in found} or {"other"}
    return Use(
        kinds=frozenset(kinds),
        contracted=contracted.pop() if len(contracted) == 1 else None,
        groups=max((one.groups for one in weights), default=1),
        inside=within,
        after=not within and any(one.at in after for one in found),
        routes=any(
            one.kind == "matmul" and one.at not in after and routes(g, users, g.nodes[one.at]) for one in weights
        ),
        normalised=any(normalised(g, g.nodes[one.at]) for one in steered),
        bent=any(one.kind == "other" and g.nodes[one.at].op in ("matmul", "conv") for one in found),
    )
