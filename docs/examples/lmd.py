"""LMD on a small decoder whose forward runs in MXFP6: train on samples of the weights, evaluate in their mean."""

import torch

import isoscale as iso
from isoscale.train.data import TokenStream, load_corpus

corpus = load_corpus("builtin:austen", "bytes", val_fraction=0.1, seq_len=64)
batches = TokenStream(corpus.train, seq_len=64, batch=8, seed=0)
held = torch.from_numpy(corpus.val[:6401].astype("int64"))

model = iso.models.Decoder(iso.models.DecoderConfig(width=64, depth=2, scaling="plain"))
plan = iso.plan(model, "complete-d", base=model, optimizer="lmd", hps={"lr": 0.03}, recipe="mxfp6-forward")
plan.apply(model, seed=0)
iso.numerics.convert(model, "mxfp6-forward", plan=plan)
optimizer = iso.optim.LMD(plan.param_groups(model))  # matrices by LMD, the rest by AdamW
peaks = [group["lr"] for group in optimizer.param_groups]
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, 150, cycle_momentum=False)

for step in range(150):
    ids, targets = map(torch.from_numpy, batches.span(step * 8, 8))
    optimizer.zero_grad()
    model(ids, targets).backward()
    optimizer.step()
    schedule.step()

for weights in (optimizer.mean, optimizer.sampled):
    with torch.no_grad(), weights():
        loss = model(held[:-1].view(-1, 64), held[1:].view(-1, 64))
    print(f"{weights.__name__}: {loss:.3f} nats/byte on held-out text")
