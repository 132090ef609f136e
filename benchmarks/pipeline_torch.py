"""PyTorch's side of pipeline_step.py: one of two processes, driven over a pipe.

The ResNet-18 of torch_networks.py under torch.distributed.pipelining, 1F1B over gloo, with AdamW.
A line of stdin is the number of micro-batches and that of steps; 0 micro-batches is the unsplit
step, which one process makes alone.  All other lines are for both processes.

    python benchmarks/pipeline_torch.py RANK PORT BLOCKS WIDTH BATCH
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional
from torch_networks import CLASSES, ResNet18

LEARNING_RATE = 1e-3
"""That of AdamW, whose other settings are PyTorch's defaults, as are ours."""


def divide(network: ResNet18, blocks: int) -> list[nn.Module]:
    """Return the two parts of a network that is cut after so many residual blocks."""
    first = nn.Sequential(network.stem, network.norm, nn.ReLU(), *network.blocks[:blocks])
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.scores]
    return [first, nn.Sequential(*network.blocks[blocks:], *last)]


def make_step(part: nn.Module, compute: Callable[[], object]) -> Callable[[], None]:
    """Return a training step that ``compute`` makes the gradients of."""
    optimizer = torch.optim.AdamW(part.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        compute()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_steps(
    rank: int, blocks: int, width: int, size: int
) -> Callable[[int], Callable[[], None]]:
    """Return a function of the number of micro-batches, which returns this process's step."""
    torch.manual_seed(1)
    images, labels = torch.randn(size, 3, 32, 32), torch.randint(0, CLASSES, (size,))
    part = divide(ResNet18(width), blocks)[rank].train()
    whole = ResNet18(width).train()
    data = {"target": labels} if rank else {}
    inputs = () if rank else (images,)

    @cache
    def make(micro_batches: int) -> Callable[[], None]:
        if not micro_batches:
            return make_step(whole, lambda: _compute(whole, images, labels))
        stage = PipelineStage(part, rank, 2, torch.device("cpu"))
        kind = Schedule1F1B if micro_batches > 1 else ScheduleGPipe  # 1F1B wants two at least
        schedule = kind(stage, micro_batches, loss_fn=functional.cross_entropy)
        return make_step(part, partial(schedule.step, *inputs, **data))

    return make


def _compute(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    functional.cross_entropy(network(images), labels).backward()


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    rank, port, blocks, width, size = map(int, arguments)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    make = make_steps(rank, blocks, width, size)
    for line in sys.stdin:
        micro_batches, steps = map(int, line.split())
        step = make(micro_batches)
        if micro_batches:
            distributed.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if micro_batches:
            distributed.barrier()
        if not rank:
            print(json.dumps(time.perf_counter() - start), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
