"""Export scikit-learn's multilayer perceptrons with skl2onnx.

    python make_sklearn.py FOLDER

Needs scikit-learn and skl2onnx; the README beside this file names the versions.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from sklearn.datasets import load_diabetes, load_iris
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from strips import strip


def main(folder: Path) -> None:
    """Fit briefly, so that there are weights, and write what skl2onnx makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    flowers, kinds = load_iris(return_X_y=True)
    people, progress = load_diabetes(return_X_y=True)
    two = kinds < 2
    sizes = {"hidden_layer_sizes": (8, 6), "max_iter": 3, "random_state": 0}
    models = {
        "classifier": (MLPClassifier(**sizes), flowers, kinds, {}),
        "classifier-plain": (MLPClassifier(**sizes), flowers, kinds, {"zipmap": False}),
        "binary": (MLPClassifier(activation="tanh", **sizes), flowers[two], kinds[two], {}),
        "pipeline": (
            make_pipeline(StandardScaler(), MLPClassifier(activation="logistic", **sizes)),
            flowers, kinds, {"zipmap": False},
        ),
        "regressor": (MLPRegressor(**sizes), people, progress, None),
    }  # fmt: skip
    for name, (model, inputs, targets, options) in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(inputs, targets)
        chosen = {} if options is None else {"options": options and {id(model): options}}
        proto = to_onnx(model, inputs[:1].astype(np.float32), **chosen)
        path = folder / f"sklearn-{name}.onnx"
        path.write_bytes(proto.SerializeToString())
        print(path.name, strip(path), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
