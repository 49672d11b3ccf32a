"""Gloo ranks in processes: every check of a table runs on all of them, and what went wrong is told by name."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int, int], None]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, world: int, port: int, folder: str, checks: dict[str, Check]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=20))
    told, notes = {}, Path(folder, f"{rank}.json")
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(rank, world)
            told[name] = ""
        except Exception:
            told[name] = f"rank {rank}: {traceback.format_exc(limit=-4)}"
        notes.write_text(json.dumps(told))  # at once: ranks that no longer meet in a collective abort
        dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(world: int, folder: Path, checks: dict[str, Check]) -> dict[str, str]:
    """Name of each check -> what failed, empty where nothing did.

    Args:
        world: how many ranks.
        folder: for their notes.
        checks: functions of a module, called with (rank, world) on every rank.
    """
    try:
        mp.spawn(_rank, (world, _free_port(), str(folder), checks), nprocs=world)
        ended = "did not run"
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        ended = f"did not end: {str(error)[-300:]}"
    notes = [folder / f"{rank}.json" for rank in range(world)]
    told = [json.loads(note.read_text()) if note.exists() else {} for note in notes]
    return {name: "\n".join(filter(None, (part.get(name, ended) for part in told))) for name in checks}


def gathered(x: torch.Tensor) -> torch.Tensor:
    """A plain tensor of every rank: [world, ...]."""
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.contiguous())
    return torch.stack(out)


def same_everywhere(x: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    held = gathered(x.contiguous().view(torch.uint8) if x.dim() else x.view(1).view(torch.uint8))
    return bool((held == held[0]).all())


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """||x - y|| / ||y||."""
    return float((x.double() - y.double()).norm() / y.double().norm())
