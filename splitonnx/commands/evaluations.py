"""The command ``evaluate``, which compares a model's predictions with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import splitonnx
from splitonnx.commands import printing
from splitonnx.commands.groups import spread
from splitonnx.commands.options import (
    BatchSizeOption,
    DataOption,
    GiveUpAfterOption,
    JsonOption,
    MetricOption,
    ProviderOption,
    ServerOption,
    ThreadsOption,
    TrustedOption,
    choose_batch_size,
)
from splitonnx.commands.security import ClientSecurity


@spread
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The client's folder.")],
    data: DataOption,
    metric: MetricOption = None,
    server: ServerOption = None,
    give_up_after: GiveUpAfterOption = None,
    batch_size: BatchSizeOption = None,
    threads: ThreadsOption = None,
    provider: ProviderOption = "cpu",
    trusted: TrustedOption = False,
    as_json: JsonOption = False,
    *,
    security: ClientSecurity,
) -> None:
    """Evaluate the split model on data with labels, and print its loss and metrics.

    Predictions are computed as for predict; the labels stay with the client.
    """
    from splitonnx.runtime.client.datasets import open_dataset

    dataset = open_dataset(data)
    samples = choose_batch_size(batch_size, dataset)
    with splitonnx.Client(
        bundle,
        server,
        threads=threads,
        provider=provider,
        credentials=security.make_credentials(server),
        give_up_after=give_up_after,
        share=True,  # only training shares anything
        trusted=trusted,
    ) as client:
        results = client.evaluate(dataset, batch_size=samples, metrics=metric or ())
        if client.placement is not None:
            printing.print_remark(client.placement.describe())
    if as_json:
        printing.print_json(results)
        return
    width = max(map(len, results), default=0)
    for name, value in results.items():
        typer.echo(f"{name:<{width}}  {value:.6f}")
