"""GPT-2 from a config, in FP8 matmuls with FP16 weights and FP16 optimiser state, on the text of this very file."""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import isoscale as iso

text = torch.tensor(list(Path(__file__).read_bytes()))
ids = text[: len(text) // 64 * 64].view(-1, 64)

torch.manual_seed(0)
config = GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

model, optimizer = iso.scalify.scalify(model, optimizer, recipe="fp8-fp16")

for step in range(20):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}")

print(model.transformer.h[0].attn.c_attn.weight)
print(f"{optimizer.bytes_per_parameter()['all']:.2f} bytes a parameter, weights and state")
