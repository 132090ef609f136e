"""Export transformers of Hugging Face with PyTorch, for training, with their own first weights.

    python make_torch.py FOLDER [NAME...]

Needs torch, onnx, onnxscript and transformers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)


class Scores(nn.Module):
    """A network that returns its scores alone."""

    def __init__(self, network: nn.Module, argument: str) -> None:
        super().__init__()
        self.network, self.argument = network, argument

    def more(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give language models a mask: without one they look for packed sequences (aten::diff)."""
        return {"attention_mask": torch.ones_like(data)} if data.dtype == torch.int64 else {}

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Call the network; a language model's classes are moved to axis 1."""
        scores = self.network(**{self.argument: data}, **self.more(data)).logits
        return scores.transpose(1, 2) if scores.dim() == 3 else scores


def build_vit() -> nn.Module:
    """4 of the 12 blocks of ViT-Tiny, for 32 x 32 images in patches of 8."""
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768,
        image_size=32, patch_size=8, num_labels=10, attn_implementation="eager",
    )  # fmt: skip
    return Scores(ViTForImageClassification(config), "pixel_values")


def build_bert() -> nn.Module:
    """The 4 layers of BERT-Mini, with a smaller vocabulary."""
    config = BertConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=64, num_labels=10,
        attn_implementation="eager",
    )  # fmt: skip
    return Scores(BertForSequenceClassification(config), "input_ids")


def build_gpt() -> nn.Module:
    """4 layers of GPT-2, its output matrix tied to its embedding."""
    config = GPT2Config(
        vocab_size=2000, n_embd=128, n_layer=4, n_head=4, n_positions=64, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    return Scores(GPT2LMHeadModel(config), "input_ids")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], str]] = {
    "vit": (build_vit, lambda: torch.randn(2, 3, 32, 32), "image"),
    "bert": (build_bert, lambda: torch.randint(0, 2000, (2, 16)), "tokens"),
    "gpt2": (build_gpt, lambda: torch.randint(0, 2000, (2, 16)), "tokens"),
}


def main(folder: Path, names: list[str]) -> None:
    """Write each network that is not there yet, by both exporters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or NETWORKS:
        if name not in NETWORKS:
            continue
        build, draw, source = NETWORKS[name]
        path = folder / f"{name}.onnx"
        if path.exists():
            continue
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                build(),
                (draw(),),
                str(path),
                dynamo=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.TRAINING,
                input_names=[source],
                output_names=["scores"],
                dynamic_axes={source: {0: "N"}, "scores": {0: "N"}},
            )
        print(path.name, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
