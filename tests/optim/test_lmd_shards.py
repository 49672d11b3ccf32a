"""LMD on several processes: the same noise on every replica, the right noise on every shard, another world size later."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from isoscale._base.errors import ConfigError
from isoscale.optim import LMD

pytestmark = pytest.mark.slow
STATES = [("fp32", "split"), ("int8-log", "split"), ("bf16", "hypentropy")]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 10), nn.LayerNorm(10), nn.Linear(10, 7))


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=draw), torch.randn(8, 7, generator=draw)


def steps(net: nn.Module, optimizer: LMD, first: int, last: int, rank: int = 0, world: int = 1, bad: int | None = None) -> None:
    """Each rank takes its share of the batch; gradients are averaged by the wrapper."""
    for step in range(first, last):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        if bad == step and rank == 1:
            grad = next(iter(net.parameters())).grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[0] = float("nan")
        optimizer.step()


def whole(state: str, form: str, last: int, skip: int | None = None) -> list[Tensor]:
    """The same on one process."""
    net = model()
    optimizer = LMD(net.parameters(), state=state, form=form)
    for step in range(last):
        if step != skip:
            steps(net, optimizer, step, step + 1)
    return [p.detach() for p in net.parameters()]


def full(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def close(got: list[Tensor], want: list[Tensor], what: str) -> None:
    """Sums of gradients in another order may turn a sign or a rounding here and there; other noise would turn all."""
    for a, b in zip(got, want):
        off = float(((a - b).abs() > 1e-4 * b.abs() + 1e-6).float().mean())
        assert off < 0.02, (what, off)


def ddp(rank: int, folder: str) -> None:
    for state, form in STATES:
        net = DistributedDataParallel(model(seed=rank))  # the wrapper hands rank 0's weights round
        optimizer = LMD(net.parameters(), state=state, form=form)
        steps(net, optimizer, 0, 4, rank, 2)
        mine = torch.cat([p.detach().flatten() for p in net.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both), (state, form)
        close([p.detach() for p in net.parameters()], whole(state, form, 4), f"{state} {form}")


def ddp_control(rank: int, folder: str) -> None:
    """With noise of its own on every rank replicas part."""
    net = DistributedDataParallel(model())
    optimizer = LMD(net.parameters(), seed=rank)
    steps(net, optimizer, 0, 4, rank, 2)
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert not torch.equal(*both)


def fsdp(rank: int, folder: str) -> None:
    for state, form in STATES:
        net = model()
        for module in (net[0], net[2], net):
            fully_shard(module)
        optimizer = LMD(net.parameters(), state=state, form=form)
        steps(net, optimizer, 0, 4, rank, 2)
        close([full(p) for p in net.parameters()], whole(state, form, 4), f"{state} {form}")
        before = [p.to_local().clone() for p in net.parameters()]
        with optimizer.mean():
            assert not torch.equal(net[0].weight.to_local(), before[0])
        assert all(torch.equal(p.to_local(), old) for p, old in zip(net.parameters(), before))


def fsdp_skips_together(rank: int, folder: str) -> None:
    """A gradient that is not finite on one rank's shard: every rank leaves the step out."""
    net = model()
    fully_shard(net)
    optimizer = LMD(net.parameters())
    steps(net, optimizer, 0, 4, rank, 2, bad=2)
    assert optimizer.skipped == 1
    close([full(p) for p in net.parameters()], whole("fp32", "split", 4, skip=2), "skip")


def fsdp_saves(rank: int, folder: str) -> None:
    """Saved by two, for one to go on."""
    import torch.distributed.checkpoint as dcp

    net = model()
    fully_shard(net)
    optimizer = LMD(net.parameters(), state="int8-log")
    steps(net, optimizer, 0, 3, rank, 2)
    saved = {"optimizer": get_optimizer_state_dict(net, optimizer)}
    with optimizer.mean():
        saved["model"] = dict(net.state_dict())
        dcp.save(saved, checkpoint_id=folder)


def columns(rank: int, folder: str) -> None:
    """A tensor cut along its columns has the noise of its columns."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values, grads = torch.randn(6, 8), [torch.randn(6, 8) for _ in range(3)]
    p, q = nn.Parameter(distribute_tensor(values, mesh, [Shard(1)])), nn.Parameter(values.clone())
    a, b = LMD([p]), LMD([q])
    for grad in grads:
        p.grad, q.grad = distribute_tensor(grad, mesh, [Shard(1)]), grad.clone()
        a.step()
        b.step()
    close([full(p)], [q.detach()], "columns")
    three = nn.Parameter(distribute_tensor(torch.randn(2, 4, 4), mesh, [Shard(2)]))
    three.grad = distribute_tensor(torch.randn(2, 4, 4), mesh, [Shard(2)])
    LMD([three]).step()
    square = init_device_mesh("cpu", (1, 2))
    odd = nn.Parameter(distribute_tensor(torch.randn(2, 4, 4), square, [Shard(1), Shard(1)]))
    odd.grad = distribute_tensor(torch.randn(2, 4, 4), square, [Shard(1), Shard(1)])
    LMD([odd]).step()


def _main(rank: int, port: int, folder: str, body: Callable[[int, str], None]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    body(rank, folder)
    dist.destroy_process_group()


def spawn(body: Callable[[int, str], None], folder: str = "") -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(_main, args=(port, folder, body), nprocs=2)


@pytest.mark.parametrize("body", [ddp, ddp_control, fsdp, fsdp_skips_together, columns], ids=lambda body: body.__name__)
def test_two_processes(body: Callable[[int, str], None]) -> None:
    spawn(body)


def test_a_run_of_two_goes_on_alone(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    spawn(fsdp_saves, str(tmp_path))
    net = model(seed=9)
    optimizer = LMD(net.parameters(), state="int8-log")
    steps(net, optimizer, 0, 1)  # so that there is a state to load into
    saved: dict[str, Any] = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(saved, checkpoint_id=str(tmp_path))
    net.load_state_dict(saved["model"])
    set_optimizer_state_dict(net, optimizer, saved["optimizer"])
    assert optimizer.state[net[0].weight]["log_pos"].dtype == torch.int8
    steps(net, optimizer, 3, 5)
    close([p.detach() for p in net.parameters()], whole("int8-log", "split", 5), "another world size")


def test_pieces_that_are_no_regular_part_are_refused() -> None:
    from isoscale.optim.lmd_state import place_of

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{29471 + os.getpid() % 1000}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        from torch.distributed.tensor import Partial

        partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
        with pytest.raises(ConfigError, match="rows and at most one"):
            place_of(partial)
    finally:
        dist.destroy_process_group()
