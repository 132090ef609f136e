"""Small networks of PyTorch, for tests where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Tied(nn.Module):
    """An embedding tied to the output layer, BatchNormalization and Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(6, 12, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, tokens: Any) -> Any:
        """(N, 5) integers below 12 to (N, 12)."""
        hidden = self.linear(self.embedding(tokens).mean(1))
        return self.last(self.dropout(torch.relu(self.norm(hidden))))


class Convolutional(nn.Module):
    """A BatchNormalization that exporters fold into a convolution, and a buffer that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(4, 5)
        self.register_buffer("table", torch.randn(4))

    def forward(self, image: Any) -> Any:
        """(N, 1, 6, 6) to (N, 5)."""
        hidden = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        return self.last(self.dropout(hidden + self.table))


class Recurrent(nn.Module):
    """Two layers of a GRU with dropout between them, and BatchNormalization."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.GRU(3, 4, num_layers=2, dropout=0.3, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 5)

    def forward(self, series: Any) -> Any:
        """(N, 3, 3) to (N, 5)."""
        return self.last(self.norm(self.layers(series)[0][:, -1]))


class Masked(nn.Module):
    """An encoder with dropout in its attention, a second input, two outputs, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.last = nn.Linear(8, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, data: Any, mask: Any) -> Any:
        """(N, 6, 8) and (N, 6) to a dictionary of (N, 4) and (N, 8)."""
        hidden = self.encoder(data, src_key_padding_mask=mask)
        return {"scores": self.last(hidden.mean(1)), "sums": data.sum(1)}


class Counting(nn.Module):
    """A network whose result depends on the number of samples, which exporters write as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, rows: Any) -> Any:
        """(N, 3) to (N, 2)."""
        return self.linear(rows) * float(rows.shape[0])


class Channelwise(nn.Module):
    """Dropout of whole channels, which no exporter writes as a Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout1d(0.5)
        self.linear = nn.Linear(3, 2)

    def forward(self, rows: Any) -> Any:
        """(N, 4, 3) to (N, 4, 2)."""
        return self.linear(self.dropout(rows))


class Gated(nn.Module):
    """A layer that is read by two paths; the gate reads what ``stop`` makes of it."""

    def __init__(self, stop: Callable[[Any], Any]) -> None:
        super().__init__()
        self.enc, self.gate, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.stop = stop

    def forward(self, rows: Any) -> Any:
        """(N, 4) to (N, 3)."""
        hidden = torch.tanh(self.enc(rows))
        return self.out(torch.sigmoid(self.gate(self.stop(hidden))) * hidden)


class Rounding(torch.autograd.Function):
    """Round to thirds, with the gradient of the identity (straight through)."""

    @staticmethod
    def forward(ctx: Any, hidden: Any) -> Any:
        """Round."""
        return torch.round(3 * hidden) / 3

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Pass the gradient on."""
        return gradient


class Padded(nn.Module):
    """An embedding with a row for padding, which PyTorch does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=2)
        self.last = nn.Linear(6, 3)

    def forward(self, tokens: Any) -> Any:
        """(N, 5) integers below 7 to (N, 3)."""
        return self.last(torch.tanh(self.embedding(tokens)).mean(1))


class Attention(nn.Module):
    """Self-attention of two heads, with a Linear for each of its four matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Any) -> Any:
        """(N, T, width) to (N, T, width)."""
        parts = [
            project(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, hidden: Any) -> Any:
        """(N, T, width) to (N, T, width)."""
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.fc2(nn.functional.gelu(self.fc1(self.norm2(hidden))))


class Transformer(nn.Module):
    """A transformer of two layers that classifies sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(12, 16), nn.Parameter(torch.randn(5, 16))
        self.layers = nn.ModuleList([Block(16), Block(16)])
        self.last = nn.Linear(16, 12)

    def forward(self, tokens: Any) -> Any:
        """(N, 5) integers below 12 to (N, 12)."""
        hidden = self.embedding(tokens) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return self.last(hidden.mean(1))


class Adapted(nn.Module):
    """A Linear with a low-rank adapter, as PEFT writes it: base(x) + B(A(x)) * scale."""

    def __init__(self, base: nn.Linear, first: Any, second: Any, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Parameter(torch.tensor(first))  # (r, in)
        self.lora_B = nn.Parameter(torch.tensor(second))  # (out, r)

    def forward(self, data: Any) -> Any:
        """(..., in) to (..., out)."""
        linear = nn.functional.linear
        return self.base(data) + linear(linear(data, self.lora_A), self.lora_B) * self.scale
