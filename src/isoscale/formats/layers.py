"""The formats of one linear layer's matmuls, and how its operands are treated before and while they are rounded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats.block import BlockFormat, Format, by_name

MATMULS = {"forward": ("input", "weight"), "grad_input": ("grad", "backward_weight"),
           "grad_weight": ("weight_grad", "backward_input")}  # fmt: skip
"""Matmul -> its left and right operand."""
BACKWARD = (*MATMULS["grad_input"], *MATMULS["grad_weight"])
_SAME = {"backward_weight": "weight", "backward_input": "input", "weight_grad": "grad"}
_SHORT = {"backward_weight": "w", "backward_input": "x", "weight_grad": "g for dW"}
_PRODUCT = {"forward": "Y", "grad_input": "dX", "grad_weight": "dW"}


@dataclass(frozen=True)
class LayerFormats:
    """Formats of the operands of one linear layer's three matmuls, by name. `fp32` means: left as it is.

    Blocks always lie along the contraction axis of the matmul, so an operand of two matmuls is cast twice, each time
    from high precision. Names are kept in full: `mxfp4` becomes `mxfp4/floor`.

    Args:
        weight: of W in the forward.
        input: of X in the forward.
        grad: of the output gradient, in the input-gradient matmul.
        backward_weight: of W in the input-gradient matmul; None: as `weight`.
        backward_input: of X in the weight-gradient matmul; None: as `input`.
        weight_grad: of the output gradient in the weight-gradient matmul; None: as `grad`.
        stochastic: operands of the backward pass that are rounded stochastically.
        hadamard: matmuls (`forward`, `grad_input`, `grad_weight`) both of whose operands are multiplied, along the
            contraction axis and before the cast, with one orthonormal matrix (random signs, then Hadamard): the product
            stays, outliers are spread over their neighbours.
        hadamard_size: of that matrix, a power of two.
        pre_scale: factor on the operands rounded stochastically, before the cast; the product is divided by it again.
            The scale rule sees the operand as multiplied, so only rules that never clip (`rceil`, `ceil`) go with it.

    Raises:
        ConfigError: no such format, operand or matmul, with the nearest; a size or factor that cannot be.
    """

    weight: str = "fp32"
    input: str = "fp32"
    grad: str = "fp32"
    backward_weight: str | None = None
    backward_input: str | None = None
    weight_grad: str | None = None
    stochastic: tuple[str, ...] = ()
    hadamard: tuple[str, ...] = ()
    hadamard_size: int = 16
    pre_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "input", "grad", *_SAME):
            said = getattr(self, name)
            if said is None and name in _SAME:
                continue
            try:
                found = by_name(said)
            except ConfigError as error:
                raise ConfigError(error.message, key=f"formats.{name}", value=said, hint=error.hint) from None
            full = str(found) if isinstance(found, BlockFormat) else found.name
            redundant = name in _SAME and full == getattr(self, _SAME[name])
            object.__setattr__(self, name, None if redundant else full)
        pairs = tuple(tuple(None if n == "fp32" else by_name(n) for n in pair) for pair in self.passes.values())
        object.__setattr__(self, "_pairs", pairs)  # parsed once, so that nothing is parsed in a training step
        self._check_names("stochastic", BACKWARD)
        self._check_names("hadamard", tuple(MATMULS))
        self._check_numbers()

    def _check_names(self, key: str, known: tuple[str, ...]) -> None:
        said = getattr(self, key)
        if isinstance(said, str) or not all(isinstance(name, str) for name in said):
            raise ConfigError(f"{key} is a tuple of names", key=f"formats.{key}", value=said, hint=f"{known[:1]}")
        for name in said:
            if key == "stochastic" and name in ("weight", "input"):
                raise ConfigError("the forward is rounded to nearest", key="formats.stochastic", value=name,
                                  hint="stochastic weights and activations were reported to diverge (arXiv "
                                       f"2509.25149); of the backward pass: {', '.join(known)}")  # fmt: skip
            if name not in known:
                what = "operand of the backward pass" if key == "stochastic" else "matmul"
                raise ConfigError(f"no such {what}", key=f"formats.{key}", value=name, hint=did_you_mean(name, known))
        object.__setattr__(self, key, tuple(name for name in known if name in said))  # in one order: equal is equal
        if key == "stochastic":
            for name in self.stochastic:
                if self.format_of(name) is None:
                    raise ConfigError("an operand that is not cast cannot be rounded", key="formats.stochastic",
                                      value=name, hint=f"give {name} a format, or leave it out")  # fmt: skip

    def _check_numbers(self) -> None:
        size, factor = self.hadamard_size, self.pre_scale
        if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size > 1024 or size & (size - 1):
            raise ConfigError("a Hadamard matrix has a power of two of rows, 2 to 1024", key="formats.hadamard_size",
                              value=size, hint="16 for NVFP4, 32 for MXFP4")  # fmt: skip
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise ConfigError("pre_scale lies in (0, 1]", key="formats.pre_scale", value=factor, hint="0.75")
        if factor == 1:
            return
        if not self.stochastic:
            raise ConfigError("pre_scale acts on operands rounded stochastically, and there are none",
                              key="formats.pre_scale", value=factor, hint=f"stochastic={BACKWARD}")  # fmt: skip
        for name in self.stochastic:
            found = self.format_of(name)
            if isinstance(found, BlockFormat) and found.scale_rule in ("floor", "even"):
                hint = f"{found.name}/rceil: on 3/4 of the operand it gives the scale that floor gives on the whole"
                raise ConfigError(f"{found} looks at the operand as multiplied, and clips it all the same",
                                  key="formats.pre_scale", value=factor, place=name, hint=hint)  # fmt: skip

    @property
    def passes(self) -> dict[str, tuple[str, str]]:
        """The formats of both operands of each matmul, in the order they are multiplied.

        `forward` (input, weight), `grad_input` (grad, weight), `grad_weight` (grad, input).
        """
        return {
            "forward": (self.input, self.weight),
            "grad_input": (self.grad, self.backward_weight or self.weight),
            "grad_weight": (self.weight_grad or self.grad, self.backward_input or self.input),
        }

    @property
    def pairs(self) -> tuple[tuple[Format | None, Format | None], ...]:
        """As `passes`, in that order, as formats; None where the operand is left as it is."""
        found: tuple[tuple[Format | None, Format | None], ...] = self.__dict__["_pairs"]
        return found

    def format_of(self, operand: str) -> Format | None:
        """The format of one of the six operands; None where it is left as it is."""
        for names, pair in zip(MATMULS.values(), self.pairs):
            if operand in names:
                return pair[names.index(operand)]
        raise KeyError(operand)

    @property
    def casts(self) -> bool:
        """Whether anything is cast at all."""
        return any(name != "fp32" for pair in self.passes.values() for name in pair)

    def to_dict(self) -> dict[str, Any]:
        """What was said, ready for JSON: overrides that are None, and treatments that are off, are left out."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        off = {field.name: field.default for field in fields(self) if field.name not in ("weight", "input", "grad")}
        if not self.hadamard:
            del told["hadamard_size"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()
                if key not in off or value != off[key]}  # fmt: skip

    def __str__(self) -> str:
        """`w e4m3, x e4m3, g e5m2`, what differs in the backward pass, and what is done to operands.

        `SR x3/4 g w in dX`: 3/4 of both operands of that matmul, rounded stochastically; `H16 in dW`: both through a
        Hadamard matrix of 16 rows.
        """
        text = f"w {self.weight}, x {self.input}, g {self.grad}"
        extra = ", ".join(f"{short} {value}" for name, short in _SHORT.items() if (value := getattr(self, name)))
        text = f"{text}; backward {extra}" if extra else text
        if self.stochastic:
            ratio = self.pre_scale.as_integer_ratio()
            factor = f"{ratio[0]}/{ratio[1]}" if ratio[1] < 100 else f"{self.pre_scale:g}"
            parts = [
                " ".join("g" if name in ("grad", "weight_grad") else _SHORT[name] for name in told) + f" in {product}"
                for matmul, product in _PRODUCT.items()
                if (told := [name for name in MATMULS[matmul] if name in self.stochastic])
            ]
            text += "; SR " + ("" if self.pre_scale == 1 else f"x{factor} ") + ", ".join(parts)
        if self.hadamard:
            text += f"; H{self.hadamard_size} in " + ", ".join(_PRODUCT[name] for name in self.hadamard)
        return text


def everywhere(name: str) -> LayerFormats:
    """One format for every operand."""
    return LayerFormats(name, name, name)


PLAIN = LayerFormats()
BF16 = everywhere("bf16")
FP8 = LayerFormats("e4m3", "e4m3", "e5m2")
