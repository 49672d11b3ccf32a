"""Unit-scaled ops and modules on one device. `functional` holds the ops, the other modules their parts."""

from isoscale.nn import constraints, factors, functional, scale
from isoscale.nn.activations import GELU, CrossEntropyLoss, Dropout, MSELoss, SiLU, Softmax
from isoscale.nn.factors import Factors
from isoscale.nn.linear import Embedding, Linear, LinearReadout
from isoscale.nn.modules import Conv1d, Conv2d, LayerNorm, RMSNorm
from isoscale.nn.mxnorm import MXNorm, MXNormed
from isoscale.nn.mxnorm_estimate import mxnorm_bound, mxnorm_constant
from isoscale.nn.mxnorm_linear import MXNormLinear

__all__ = [
    "GELU",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Factors",
    "LayerNorm",
    "Linear",
    "LinearReadout",
    "MSELoss",
    "MXNorm",
    "MXNormLinear",
    "MXNormed",
    "RMSNorm",
    "SiLU",
    "Softmax",
    "constraints",
    "factors",
    "functional",
    "mxnorm_bound",
    "mxnorm_constant",
    "scale",
]
