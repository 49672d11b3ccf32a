from __future__ import annotations

from torch import nn

from isoscale.planning import infer
from isoscale.planning.roles import depth_stack


class Plain(nn.Module):
    """Torch's own modules, as users have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3))
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10)


def test_torch_modules_by_type() -> None:
    model = Plain()
    infos = infer(model, {"*.in_proj_weight": "hidden", "*.in_proj_bias": "bias"})
    roles = {name: info.role for name, info in infos.items()}
    assert roles["embed.weight"] == "embedding"
    assert roles["layers.1.linear1.weight"] == "hidden"
    assert roles["layers.1.norm1.weight"] == "gain"
    assert roles["lm_head.weight"] == "readout"
    assert roles["lm_head.bias"] == "bias"
    assert infos["conv.weight"].fan_in == 2 * 9
    assert (infos["embed.weight"].fan_in, infos["embed.weight"].fan_out) == (10, 8)
    assert infos["layers.2.linear2.weight"].in_stack
    assert not infos["norm.weight"].in_stack


def test_depth_stack() -> None:
    assert depth_stack(Plain()) == ("layers", 3)
    assert depth_stack(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ("", 0)
