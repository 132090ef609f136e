import sys

import pytest
from onnx import TensorProto, helper

from splitonnx.errors import MissingExtra, WrongRuntime
from splitonnx.runtime.engine.builds import installed
from splitonnx.runtime.engine.engines import Engine


def test_the_installed_runtime_is_told_apart_by_what_it_can_do() -> None:
    grad = helper.make_node("ReluGrad", ["x", "x"], ["y"], domain="com.microsoft")
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([grad], "g", [info], [out]), opset_imports=opsets, ir_version=10
    )
    if installed.installed_runtime().training:
        Engine(threads=1).load("relu", model.SerializeToString(), training=True)
    else:
        with pytest.raises(WrongRuntime):
            Engine(threads=1).load("relu", model.SerializeToString(), training=True)


def test_without_any_runtime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed.import_onnxruntime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"splitonnx\[portable\]"):
        Engine()
