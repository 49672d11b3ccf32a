"""What is checked: a way to build the model at any width and depth.

Three kinds: a function of the user's (`module:function`), a Hugging Face config (a file or a folder), and isoscale's
own decoder. A function may return the model alone, `(model, example)`, or `(model, batch, loss)`; see `task.py`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isoscale._base.errors import ConfigError, IsoscaleError, did_you_mean
from isoscale.check.hf import hf_builder
from isoscale.models import Decoder, DecoderConfig

Loss = Callable[[nn.Module, Any], Tensor]
WAYS = "module:function, a config.json or its folder, or isoscale"


@dataclass(frozen=True)
class Built:
    """One model, with what its builder said of its inputs.

    Args:
        model: on the CPU, initialised by its own code.
        example: an input; None where the model itself tells.
        loss: of (model, example); None: chosen by the shape of the output.
    """

    model: nn.Module
    example: Any = None
    loss: Loss | None = None


@dataclass(frozen=True)
class Subject:
    """A model at any size.

    Args:
        name: as the user gave it.
        build: (width, depth) -> model.
        has_depth: whether depth can be chosen.
        notes: what is not as in the user's model, in words.
    """

    name: str
    build: Callable[[int, int], Built]
    has_depth: bool = True
    notes: tuple[str, ...] = ()


@contextmanager
def _here() -> Iterator[None]:
    """The current folder can be imported from."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:  # not pop(0): what is imported may have put a folder of its own in front
        with suppress(ValueError):
            sys.path.remove(here)


def function_of(target: str) -> Callable[..., Any]:
    """The function that `module:function` names; the current folder can be imported from.

    Raises:
        ConfigError: no such module or function, or one that does not import.
    """
    path, _, name = target.partition(":")
    try:
        with _here():
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise ConfigError(f"{path} does not import: {error}", key="TARGET", value=target) from error
        near = [file.stem for file in Path.cwd().glob("*.py")]
        hint = did_you_mean(path, near) if near else f"run it in the folder that holds {path}.py"
        raise ConfigError(f"no module {path!r}", key="TARGET", value=target, place=str(Path.cwd()), hint=hint) from None
    except Exception as error:  # a user's module may raise anything
        message = f"{path} does not import: {type(error).__name__}: {error}"
        raise ConfigError(message, key="TARGET", value=target) from error
    found: Callable[..., Any] | None = getattr(module, name, None)
    if found is None or not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = did_you_mean(name, own) if own else "def build(width, depth): return MyModel(width, depth)"
        place = str(getattr(module, "__file__", path))
        raise ConfigError(f"{path} has no function {name!r}", key="TARGET", value=target, place=place, hint=hint)
    return found


def takes_depth(function: Callable[..., Any], name: str) -> bool:
    """Whether a user's function takes a depth beside the width.

    Raises:
        ConfigError: it takes neither, or more than these two.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    free = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in free if p.default is p.empty]
    if not free or len(needed) > 2:
        hint = "def build(width, depth): return MyModel(width, depth)"
        raise ConfigError("the function takes a width, or a width and a depth", key="TARGET", value=name, hint=hint)
    return len(needed) == 2 or (len(free) >= 2 and free[1].name == "depth")


def _built(function: Callable[..., Any], sizes: tuple[int, ...], name: str) -> Built:
    place = ", ".join(f"{axis} {size}" for axis, size in zip(("width", "depth"), sizes))
    try:
        made = function(*sizes)
    except IsoscaleError:
        raise
    except Exception as error:  # a user's function may raise anything
        message = f"the function raised {type(error).__name__}: {error}"
        raise ConfigError(message, key="TARGET", value=name, place=place) from error
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module) or (len(parts) == 3 and not callable(parts[2])):
        kinds = ", ".join(type(part).__name__ for part in parts)
        hint = "return model, or (model, example), or (model, batch, loss) with loss(model, batch)"
        raise ConfigError(f"the function returned ({kinds})", key="TARGET", value=name, place=place, hint=hint)
    return Built(*parts)


def from_function(function: Callable[..., Any], name: str) -> Subject:
    """A subject made of a function of width, or of width and depth."""
    deep = takes_depth(function, name)

    def build(width: int, depth: int) -> Built:
        return _built(function, (width, depth) if deep else (width,), name)

    return Subject(name, build, deep)


def _decoder(unit: bool) -> Subject:
    def build(width: int, depth: int) -> Built:
        config = DecoderConfig(width=width, depth=depth, norm="trainable" if not unit else "plain",
                               scaling="unit" if unit else "plain")  # fmt: skip
        return Built(Decoder(config))

    return Subject("isoscale", build)


def resolve(target: str | Callable[..., Any], *, smallest: int, unit: bool) -> Subject:
    """The subject that a TARGET names.

    Args:
        target: `module:function`, a path, `isoscale`, or a function itself.
        smallest: the smallest width that will be built; a Hugging Face model's heads must fit into it.
        unit: whether the rule needs unit-scaled ops (isoscale's own decoder has both kinds).

    Raises:
        ConfigError: it names nothing that can be built; says what is near.
        MissingDependencyError: a Hugging Face config without transformers.
    """
    if not isinstance(target, str):
        return from_function(target, getattr(target, "__name__", type(target).__name__))
    if target == "isoscale":
        return _decoder(unit)
    path = Path(target)
    if path.exists() or path.suffix == ".json":
        build, notes = hf_builder(path, smallest)
        return Subject(target, lambda width, depth: Built(build(width, depth)), True, notes)
    if ":" in target:
        return from_function(function_of(target), target)
    hint = WAYS
    if path.parent == Path() and Path(f"{target}.py").exists():
        hint = f"{target}:build names the function build in {target}.py"
    raise ConfigError("this names no model", key="TARGET", value=target, hint=hint)
