"""TorchSlicer's side of pipeline_step.py: a coordinator and two workers, driven over a pipe.

Written from TorchSlicer's documentation alone: its page on PyPI, and the docstrings of its public
names.  EXPERIMENT_CONFIG names a file with its settings, which all three processes read.  The
coordinator holds the data, as our client does.  A line of its stdin is a number of steps.

    python benchmarks/pipeline_slicer.py worker PORT
    python benchmarks/pipeline_slicer.py train BLOCKS WIDTH BATCH PORT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torchslicer
from torch_networks import CLASSES, ResNet18

MOST_STEPS = 1 << 20
"""More than any run makes."""


class Steps:
    """The batches of an epoch that lasts until stdin ends.

    Training asks for a batch when it is done with the one before, so that is when a step ends.
    """

    def __init__(self, size: int) -> None:
        torch.manual_seed(1)
        self._batch = torch.randn(size, 3, 32, 32), torch.randint(0, CLASSES, (size,))

    def __len__(self) -> int:
        return MOST_STEPS

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                yield self._batch
            print(json.dumps(time.perf_counter() - start), flush=True)


def train(blocks: int, width: int, size: int, port: int) -> None:
    """Train until stdin ends, by the workers that the file of settings names."""
    from pipeline_torch import divide

    config = torchslicer.RunConfig.load()
    executor = torchslicer.DistributedExecutor(
        discovery=torchslicer.StaticDiscovery(peers=config.discovery.peers),
        coordinator_addr=f"127.0.0.1:{port}",
        run_config=config,
    )
    sliced = torchslicer.slice(
        ResNet18(width), n=2, executor=executor, pack=lambda network: divide(network, blocks)
    )
    sliced.train(Steps(size), run_config=config)


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    role, *rest = arguments
    numbers = [int(text) for text in rest]
    if role == "worker":
        address = f"127.0.0.1:{numbers[0]}"
        torchslicer.run_worker(port=numbers[0], coordinator_addr=None, worker_address=address)
    else:
        train(*numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
