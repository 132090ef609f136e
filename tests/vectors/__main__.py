"""Write the test vectors anew: ``python -m tests.vectors``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from splitonnx.codecs import encode_tensors
from tests.support import tiny
from tests.vectors import builders

HERE = Path(__file__).parent


def write(folder: Path) -> None:
    """Write every file into ``folder``; what stands there is replaced."""
    for name, build in builders.BUILDERS.items():
        indent = (
            None if name in ("exchanges", "sample_axes", "schedules", "shapes") else 1
        )  # many are small
        text = json.dumps(build(), indent=indent, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    tiny.sharing_bundle().save(folder / "whole", overwrite=True)
    shutil.rmtree(folder / "tiny", ignore_errors=True)
    (folder / "whole" / "client").rename(folder / "tiny")
    shutil.rmtree(folder / "whole")
    bundle = builders.build_bundle()
    bundle.save(folder / "dropout", overwrite=True)
    stages = encode_tensors(builders.record_stages(bundle))
    (folder / "stages.safetensors").write_bytes(b"".join(stages))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
