"""Networks in PyTorch that benchmarks compare with: images of 3x32x32, or 64 tokens, ten classes.

Weights are random: time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

CLASSES, TOKENS, WORDS = 10, 64, 5000


class Perceptron(nn.Module):
    """Three full layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
            nn.Linear(1024, CLASSES),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class _Block(nn.Module):
    """Two convolutions and a shortcut (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = functional.relu(self.first_norm(self.first(x)))
        value = self.second_norm(self.second(value)) + self.shortcut(x)
        return functional.relu(value)


class ResNet18(nn.Module):
    """A ResNet-18 whose first stage has ``width`` channels, for small images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [
                _Block(inputs, outputs, 1 if stage == 0 else 2),
                _Block(outputs, outputs, 1),
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.scores = nn.Linear(inputs, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.scores(value.mean((2, 3)))


class _Inverted(nn.Module):
    """An inverted residual (arXiv 1801.04381): widen, convolve each channel, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = inputs * factor
        layers: list[nn.Module] = []
        if factor != 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(), nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.layers(x)
        return x + value if self.is_residual else value


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381, table 2), the first stride 1 for small images."""

    ROWS = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip
    """Factor, channels, repetitions and first stride of each row."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        ]  # fmt: skip
        inputs = 32
        for factor, outputs, repetitions, stride in self.ROWS:
            for index in range(repetitions):
                layers.append(_Inverted(inputs, outputs, stride if index == 0 else 1, factor))
                inputs = outputs
        layers += [nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.layers = nn.Sequential(*layers)
        self.scores = nn.Linear(1280, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.layers(x).mean((2, 3)))


class _Encoder(nn.Module):
    """Transformer layers (arXiv 1706.03762) and the mean over the positions."""

    def __init__(self, width: int, depth: int, heads: int, *, norm_first: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, TOKENS, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=norm_first,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.scores = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.layers(x + self.positions).mean(1))


class Bert(nn.Module):
    """A small encoder of words, like BERT (arXiv 1810.04805)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 256)
        self.encoder = _Encoder(256, 4, 4, norm_first=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.words(x))


class ViT(nn.Module):
    """A small vision transformer (arXiv 2010.11929) with patches of 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 4, 4)
        self.encoder = _Encoder(192, 6, 3, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.patches(x).flatten(2).transpose(1, 2))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network, its batch, and the largest ratio to PyTorch's step that is wanted."""

    make: Callable[[], nn.Module]
    batch: int
    most: float
    reads_words: bool = False

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch and its labels."""
        torch.manual_seed(1)
        shape = (self.batch, TOKENS)
        images = torch.randn(self.batch, 3, 32, 32)
        x = torch.randint(0, WORDS, shape) if self.reads_words else images
        return x, torch.randint(0, CLASSES, (self.batch,))


NETWORKS = {
    "mlp": Entry(make=Perceptron, batch=128, most=1.0),
    "resnet18-16": Entry(make=lambda: ResNet18(16), batch=32, most=1.05),
    "resnet18-64": Entry(make=lambda: ResNet18(64), batch=16, most=1.2),
    "mobilenet-v2": Entry(make=MobileNetV2, batch=32, most=0.85),
    "vit": Entry(make=ViT, batch=32, most=1.15),
    "bert": Entry(make=Bert, batch=16, most=1.1, reads_words=True),
}
"""The networks by name, with the ratios that issue 18 of the project asks for."""
