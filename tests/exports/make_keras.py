"""Export small Keras models: by ``Model.export(format="onnx")``, and by tf2onnx directly.

    python make_keras.py FOLDER

Needs keras, tensorflow-cpu and tf2onnx; the README beside this file names the versions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
import tf2onnx
from keras import layers
from strips import strip


def gelu(value: tf.Tensor) -> tf.Tensor:
    """The tanh form: tf2onnx 1.17 has no Erfc, which TensorFlow uses for the exact one."""
    return keras.activations.gelu(value, approximate=True)


def build_cnn() -> keras.Model:
    """Conv, BatchNormalization, ReLU, depthwise and transposed convolution, Dropout, Dense."""
    image = keras.Input((8, 8, 1), name="image")
    hidden = layers.Conv2D(4, 3, padding="same")(image)
    hidden = layers.BatchNormalization()(hidden)
    hidden = layers.MaxPooling2D()(layers.ReLU()(hidden))
    hidden = layers.DepthwiseConv2D(3, padding="same", activation="elu")(hidden)
    hidden = layers.Conv2DTranspose(6, 2, strides=2, activation=gelu)(hidden)
    hidden = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(hidden)
    hidden = layers.Activation("silu")(layers.BatchNormalization()(hidden))
    hidden = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(hidden))
    return keras.Model(image, layers.Dense(5)(hidden))


def build_mlp() -> keras.Model:
    """Dense layers with other activations and a LayerNormalization, ending in a softmax."""
    rows = keras.Input((6,), name="rows")
    hidden = layers.Dense(8, activation="selu")(rows)
    hidden = layers.LayerNormalization()(hidden)
    hidden = layers.Dense(8, activation="softplus")(hidden)
    hidden = layers.Dense(7, activation="tanh")(hidden)
    return keras.Model(rows, layers.Dense(5, activation="softmax")(hidden))


def build_attentive() -> keras.Model:
    """An embedding and a block of attention."""
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    hidden = layers.Embedding(20, 8)(tokens)
    mixed = layers.MultiHeadAttention(2, 4)(hidden, hidden)
    hidden = layers.LayerNormalization()(layers.Add()([hidden, mixed]))
    wide = layers.Dense(8)(layers.Dense(16, activation="relu")(hidden))
    hidden = layers.LayerNormalization()(layers.Add()([hidden, wide]))
    return keras.Model(tokens, layers.Dense(5)(layers.GlobalAveragePooling1D()(hidden)))


def build_recurrent() -> keras.Model:
    """An LSTM and a GRU, unrolled over 4 steps: TensorFlow writes a loop otherwise."""
    series = keras.Input((4, 3), name="series")
    hidden = layers.LSTM(6, return_sequences=True, unroll=True)(series)
    return keras.Model(series, layers.Dense(5)(layers.GRU(6, unroll=True)(hidden)))


def build_looping() -> keras.Model:
    """The same as Keras builds it by default."""
    series = keras.Input((4, 3), name="series")
    hidden = layers.LSTM(6, return_sequences=True)(series)
    return keras.Model(series, layers.Dense(5)(layers.GRU(6)(hidden)))


SUBJECTS: dict[str, Callable[[], keras.Model]] = {
    "cnn": build_cnn,
    "mlp": build_mlp,
    "transformer": build_attentive,
    "recurrent": build_recurrent,
    "recurrent-loop": build_looping,
}


def export_keras(model: keras.Model, path: Path) -> None:
    """Export as Keras 3 does; a model that was never called has no shapes to export."""
    model(keras.ops.ones((2, *model.inputs[0].shape[1:]), model.inputs[0].dtype))
    model.export(str(path), format="onnx", verbose=False, opset_version=18)


def export_tf2onnx(model: keras.Model, path: Path) -> None:
    """Export the traced function with tf2onnx, in inference mode."""
    signature = [
        tf.TensorSpec([None, *source.shape[1:]], source.dtype, source.name)
        for source in model.inputs
    ]
    call = tf.function(lambda rows: model(rows, training=False), input_signature=signature)
    tf2onnx.convert.from_function(call, signature, opset=18, output_path=str(path))


def export_training(model: keras.Model, path: Path) -> None:
    """Export the function in training mode: BatchNormalization and Dropout stay."""
    signature = [
        tf.TensorSpec([None, *source.shape[1:]], source.dtype, source.name)
        for source in model.inputs
    ]
    call = tf.function(lambda rows: model(rows, training=True), input_signature=signature)
    tf2onnx.convert.from_function(call, signature, opset=18, output_path=str(path))


EXPORTERS = {"keras": export_keras, "tf2onnx": export_tf2onnx, "tf2onnx-training": export_training}


def main(folder: Path) -> None:
    """Write every model by both exporters, with the same first weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject, build in SUBJECTS.items():
        for exporter, export in EXPORTERS.items():
            keras.utils.set_random_seed(0)
            path = folder / f"{exporter}-{subject}.onnx"
            try:
                export(build(), path)
                print(path.name, strip(path), flush=True)
            except Exception as error:  # noqa: BLE001 - an exporter's own failure is a finding
                print(path.name, "failed:", repr(error)[:300])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
