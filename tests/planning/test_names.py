from __future__ import annotations

from isoscale.planning import normalise, pattern


def test_wrappers_are_undone() -> None:
    assert normalise("_orig_mod.blocks.0._checkpoint_wrapped_module.attn.qkv.weight") == "blocks.0.attn.qkv.weight"
    assert normalise("module.embed.weight") == "module.embed.weight"
    assert normalise("module._orig_mod.embed.weight", ddp=True) == "embed.weight"


def test_pattern_folds_block_numbers() -> None:
    assert pattern("blocks.12.attn.qkv.weight") == "blocks.*.attn.qkv.weight"
    assert pattern("head2.weight") == "head2.weight"
