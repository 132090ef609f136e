"""Export networks of ``keras.applications`` with their own first weights, in small images.

    python make_keras.py FOLDER [NAME...]

Needs keras, tensorflow-cpu and tf2onnx.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import applications

NETWORKS = {
    "resnet50": (applications.ResNet50, 64),
    "vgg19": (applications.VGG19, 64),
    "densenet121": (applications.DenseNet121, 64),
    "densenet201": (applications.DenseNet201, 64),
    "inception-v3": (applications.InceptionV3, 96),
    "inception-resnet-v2": (applications.InceptionResNetV2, 96),
    "mobilenet-v2": (applications.MobileNetV2, 64),
    "mobilenet-v3": (applications.MobileNetV3Small, 64),
    "efficientnet-b0": (applications.EfficientNetB0, 64),
}
"""Name -> how to build it, and the side of its images in pixels."""


def main(folder: Path, names: list[str]) -> None:
    """Write each network that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or NETWORKS:
        path = folder / f"{name}.onnx"
        if name not in NETWORKS or path.exists():
            continue
        build, side = NETWORKS[name]
        keras.utils.set_random_seed(0)
        model = build(weights=None, input_shape=(side, side, 3), classes=10)
        model(keras.ops.ones((2, side, side, 3)))
        model.export(str(path), format="onnx", verbose=False, opset_version=18)
        print(path.name, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
