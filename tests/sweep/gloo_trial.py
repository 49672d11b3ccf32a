"""A trial that is a torchrun job of its own: two ranks agree on a loss; rank 0 reports and writes it."""

import json
import os
import sys
import time
import tomllib
from pathlib import Path

import torch
import torch.distributed as dist

config = tomllib.loads(Path(sys.argv[1]).read_text())
out, pause = Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
assert Path(os.environ["ISOSCALE_TRIAL"]) == out
dist.init_process_group("gloo")
value = torch.tensor(config["hps"]["lr"] * (dist.get_rank() + 1))
dist.all_reduce(value)  # 3 lr
if dist.get_rank() == 0:
    (out / "ranks").write_text(str(dist.get_world_size()))
    with (out / "reports.jsonl").open("a") as file:
        file.write(json.dumps({"share": 0.3, "loss": float(value) + 1}) + "\n")
time.sleep(pause)
if config["hps"]["lr"] > 100:
    raise SystemExit("the rate is absurd")
if dist.get_rank() == 0:
    (out / "result.json").write_text(json.dumps({"val_loss": float(value)}))
dist.destroy_process_group()
