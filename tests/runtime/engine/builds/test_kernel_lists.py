from onnx import helper

from splitonnx.runtime.engine.builds.kernel_lists import list_kernels
from splitonnx.runtime.engine.engines import Engine
from tests.runtime.engine.test_engines import ADD, graph


def test_each_operator_is_listed_once_with_its_version_and_types() -> None:
    engine = Engine(threads=1)
    both = graph(
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
        inputs="x w", outputs="y",
    )  # fmt: skip
    converted = [engine.convert("stage", content, training=False) for content in (ADD, both)]
    found = list_kernels(converted)
    assert [(kernel.domain, kernel.version, kernel.operator) for kernel in found] == [
        ("ai.onnx", 14, "Add"), ("ai.onnx", 14, "Relu"),
    ]  # fmt: skip
    assert all("float" in kernel.types for kernel in found)
