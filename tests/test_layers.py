"""Weights that only scale or permute numbers are told from layers that mix them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from splitonnx.layers import LayerNode, Mixing, may_mix


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def permute(size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[::-1].copy()


def delta(channels: int) -> np.ndarray:
    """Make a kernel of size 3 that passes on each channel, as ``torch.nn.init.dirac_``."""
    kernel = np.zeros((channels, channels, 3, 3), np.float32)
    kernel[range(channels), range(channels), 1, 1] = 1
    return kernel


def measure(
    array: np.ndarray, operator: str, arguments: Sequence[str] = ("x", "w"), **options: Any
) -> tuple[bool, bool]:
    equation = options.pop("equation", "")
    node = LayerNode(
        operator=operator,
        arguments=tuple(arguments),
        results=("y",),
        integers=options,
        equation=equation,
    )
    mixing = Mixing([node], {"w": array}.get)
    return mixing.keeps_values("w"), mixing.keeps_gradients("w")


SCALING: dict[str, tuple[bool, bool]] = {
    "depthwise convolution of size 1": measure(draw(4, 1, 1, 1), "Conv", group=[4]),
    "convolution of one number": measure(draw(1, 1, 1, 1), "Conv"),
    "convolution by a diagonal": measure(np.diag(draw(4))[:, :, None, None], "Conv"),
    "convolution that passes on each channel": measure(delta(3), "Conv"),
    "transposed convolution, depthwise": measure(draw(4, 1, 1, 1), "ConvTranspose", group=[4]),
    "product with the identity": measure(np.eye(4), "MatMul"),
    "product with a permutation": measure(permute(4), "MatMul"),
    "product with a diagonal": measure(np.diag(draw(4)), "MatMul"),
    "product from the left": measure(permute(4), "MatMul", ("w", "x")),
    "Gemm by a permutation": measure(permute(4), "Gemm", ("x", "w", "b"), transB=[1]),
    "some of the columns": measure(np.eye(6)[:, :4], "MatMul"),
    "Einsum that scales": measure(draw(4), "Einsum", equation="nchw,c->nchw"),
    "Einsum by a diagonal": measure(np.diag(draw(4)), "Einsum", equation="nc,cd->nd"),
    "Einsum with an ellipsis": measure(permute(4), "Einsum", equation="...i,ij->...j"),
    "Einsum with an ellipsis in the middle": measure(
        permute(4), "Einsum", equation="b...i,ij->b...j"
    ),
    "Einsum whose weight has the ellipsis": measure(
        draw(3, 4), "Einsum", equation="n...,...->n..."
    ),
    "Einsum without an arrow": measure(permute(4), "Einsum", equation="ni, ij"),
    "Einsum that reads a diagonal": measure(draw(4, 4), "Einsum", equation="nc,cc->nc"),
    "Einsum that sums its weight": measure(draw(4, 3), "Einsum", equation="nc,cd->nc"),
    "table of unit vectors": measure(permute(5), "Gather", ("w", "x")),
}


@pytest.mark.parametrize("name", SCALING)
def test_weights_that_scale_or_permute_are_no_layer(name: str) -> None:
    assert SCALING[name] == (True, True)


BROADCASTING: dict[str, tuple[bool, bool]] = {
    "one number to many": measure(draw(1, 8), "MatMul"),
    "one number to many by Gemm": measure(draw(8, 1), "Gemm", transB=[1]),
    "a gray image to many channels": measure(draw(8, 1, 1, 1), "Conv"),
    "pixels apart": measure(draw(1, 2, 2, 2), "ConvTranspose", strides=[2, 2]),
    "the data beside a mixture of them": measure(np.hstack([np.eye(4), draw(4, 4)]), "MatMul"),
}


@pytest.mark.parametrize("name", BROADCASTING)
def test_copies_hand_on_values_but_sum_up_gradients(name: str) -> None:
    assert BROADCASTING[name] == (True, False)


MIXING: dict[str, tuple[bool, bool]] = {
    "convolution": measure(draw(4, 3, 3, 3), "Conv"),
    "convolution of size 1": measure(draw(4, 3, 1, 1), "Conv"),
    "depthwise convolution": measure(draw(4, 1, 3, 3), "Conv", group=[4]),
    "transposed convolution": measure(draw(3, 4, 2, 2), "ConvTranspose", strides=[2, 2]),
    "overlapping transposed convolution": measure(draw(1, 1, 3, 3), "ConvTranspose"),
    "product": measure(draw(4, 3), "MatMul"),
    "product with a vector": measure(draw(4), "MatMul"),
    "Gemm to one number": measure(draw(1, 4), "Gemm", transB=[1]),
    "Einsum": measure(draw(4, 3), "Einsum", equation="nc,cd->nd"),
    "Einsum without a result": measure(draw(4, 3), "Einsum", equation="nc,cd"),
    "Einsum with an ellipsis and a result": measure(draw(4, 3), "Einsum", equation="...c,cd->...d"),
    "Einsum whose sums mix": measure(draw(4, 3, 2), "Einsum", equation="nc,cde->nd"),
    "embedding": measure(draw(9, 4), "Gather", ("w", "x")),
    "embedding of one number": measure(draw(9, 1), "Gather", ("w", "x")),
    "recurrent layer": measure(draw(1, 16, 4), "LSTM", ("x", "w", "r")),
    "weights of zero, which pass on nothing": measure(np.zeros((4, 4)), "MatMul"),
    "a bias alone": measure(np.eye(4), "Gemm", ("x", "v", "w")),
}


@pytest.mark.parametrize("name", MIXING)
def test_other_weights_are_layers(name: str) -> None:
    assert MIXING[name] == (False, False)


def test_a_weight_is_followed_through_its_transposition() -> None:
    def follow(array: np.ndarray) -> bool:
        turn = LayerNode(
            operator="Transpose", arguments=("w",), results=("t",), integers={"perm": (1, 0)}
        )
        cast = LayerNode(operator="Cast", arguments=("t",), results=("c",))
        product = LayerNode(operator="MatMul", arguments=("x", "c"), results=("y",))
        return Mixing([turn, cast, product], {"w": array}.get).keeps_values("w")

    assert follow(draw(8, 1))
    assert not follow(draw(1, 8))


def test_a_weight_of_two_layers_must_scale_in_both() -> None:
    nodes = [
        LayerNode(operator="MatMul", arguments=("x", "w"), results=("y",)),
        LayerNode(operator="MatMul", arguments=("w", "y"), results=("z",)),
    ]
    assert Mixing(nodes, {"w": permute(3)}.get).keeps_values("w")
    assert not Mixing(nodes, {"w": np.array([[1, 1], [0, 0]])}.get).keeps_values("w")


def test_a_weight_mixes_only_at_its_place() -> None:
    assert may_mix("Conv", [1])
    assert not may_mix("Conv", [2])
    assert not may_mix("Gather", [1])
    assert not may_mix("Add", [0, 1])
    assert may_mix("ConvGrad", [2])
    assert not may_mix("ConvGrad", [])


def test_nodes_that_do_not_fit_their_weights_count_as_layers() -> None:
    turn = LayerNode(
        operator="Transpose", arguments=("w",), results=("t",), integers={"perm": (7, 0)}
    )
    product = LayerNode(operator="MatMul", arguments=("x", "t"), results=("y",))
    assert not Mixing([turn, product], {"w": np.eye(2)}.get).keeps_values("w")
    empty = LayerNode(operator="Cast", arguments=(), results=())
    assert not Mixing([empty], {"w": np.eye(2)}.get).keeps_values("w")
    unfit = {
        "group": measure(draw(4, 1, 1, 1), "Conv", group=[3]),
        "no group": measure(draw(4, 1, 1, 1), "ConvTranspose", group=[0]),
        "no elements": measure(np.zeros((0, 3)), "MatMul"),
        "no kernel": measure(draw(4, 4), "Conv"),
        "axes": measure(draw(4), "Einsum", equation="ab,bc->ac"),
        "terms": measure(draw(4), "Einsum", equation="a->a"),
        "two ellipses": measure(draw(4), "Einsum", equation="a,......->a"),
        "sizes": measure(draw(4, 3), "Einsum", equation="a,bb->a"),
    }
    assert set(unfit.values()) == {(False, False)}
    strides = [2] * 5
    assert measure(draw(4, 1, 1, 1), "ConvTranspose", group=[4], strides=strides) == (True, True)
