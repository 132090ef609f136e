"""Export small models with PyTorch's two exporters, in every mode that users meet.

    python make_torch.py FOLDER

Needs torch, onnx and onnxscript; the README beside this file names the versions.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from strips import strip
from torch import nn

N = torch.export.Dim("N", min=2, max=4096)


class Convolutional(nn.Module):
    """Conv, BatchNorm, ReLU, pool, Dropout, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.block = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) to (N, 5)."""
        hidden = self.pool(self.block(self.features(image)))
        return self.classifier(self.dropout(hidden.flatten(1)))


class Attentive(nn.Module):
    """An embedding, an encoder layer, a mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, 6) integers below 20 to (N, 5)."""
        return self.classifier(self.encoder(self.embedding(tokens)).mean(1))


class Recurrent(nn.Module):
    """An LSTM and a GRU, and a linear layer on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(3, 6, batch_first=True, bidirectional=True)
        self.second = nn.GRU(12, 6, batch_first=True)
        self.classifier = nn.Linear(6, 5)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """(N, 4, 3) to (N, 5)."""
        hidden, _ = self.second(self.first(series)[0])
        return self.classifier(hidden[:, -1])


class Upsampling(nn.Module):
    """A U-Net in small: transposed convolution, resizing, a skip connection, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.1)
        )
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.Hardswish())
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.resize = nn.Upsample(scale_factor=2, mode="bilinear")
        self.last = nn.Conv2d(14, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) to (N, 3, 8, 8)."""
        high = self.down(image)
        low = self.deep(high)
        return self.last(torch.cat([high, self.up(low), self.resize(low)], 1))


SUBJECTS = {
    "cnn": (Convolutional, lambda: torch.randn(3, 1, 8, 8), "image"),
    "transformer": (Attentive, lambda: torch.randint(0, 20, (3, 6)), "tokens"),
    "recurrent": (Recurrent, lambda: torch.randn(3, 4, 3), "series"),
    "unet": (Upsampling, lambda: torch.randn(3, 1, 8, 8), "image"),
}


def export_legacy(model: nn.Module, example: torch.Tensor, name: str, path: Path) -> None:
    """Export as docs/exporting.md says: for training, nothing folded."""
    torch.onnx.export(
        model,
        (example,),
        str(path),
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.TRAINING,
        input_names=[name],
        output_names=["scores"],
        dynamic_axes={name: {0: "N"}, "scores": {0: "N"}},
    )


def export_legacy_default(model: nn.Module, example: torch.Tensor, name: str, path: Path) -> None:
    """Export for inference, as the legacy exporter does by default."""
    torch.onnx.export(
        model,
        (example,),
        str(path),
        dynamo=False,
        input_names=[name],
        output_names=["scores"],
        dynamic_axes={name: {0: "N"}, "scores": {0: "N"}},
    )


def export_dynamo(model: nn.Module, example: torch.Tensor, name: str, path: Path) -> None:
    """Export as docs/exporting.md says: in training mode, without the optimizer."""
    program = torch.onnx.export(
        model.train(),
        (example,),
        dynamo=True,
        optimize=False,
        input_names=[name],
        output_names=["scores"],
        dynamic_shapes=({0: N},),
    )
    program.save(str(path), external_data=False)


def export_dynamo_default(model: nn.Module, example: torch.Tensor, name: str, path: Path) -> None:
    """Export for inference, as the dynamo exporter does by default."""
    program = torch.onnx.export(
        model.eval(),
        (example,),
        dynamo=True,
        input_names=[name],
        output_names=["scores"],
        dynamic_shapes=({0: N},),
    )
    program.save(str(path), external_data=False)


EXPORTERS = {
    "legacy": export_legacy,
    "legacy-default": export_legacy_default,
    "dynamo": export_dynamo,
    "dynamo-default": export_dynamo_default,
}


def main(folder: Path) -> None:
    """Write every model by every exporter, with the same first weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject, (build, draw, name) in SUBJECTS.items():
        for exporter, export in EXPORTERS.items():
            torch.manual_seed(0)
            model, path = build(), folder / f"torch-{subject}-{exporter}.onnx"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    export(model, draw(), name, path)
                print(path.name, strip(path), flush=True)
            except Exception as error:  # noqa: BLE001 - an exporter's own failure is a finding
                print(path.name, "failed:", str(error).splitlines()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
