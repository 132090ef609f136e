"""Check whether a model still keeps samples separate if its fixed batch is freed.

No cut is made: only the prepared model is compared with the model in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from splitonnx.errors import SplitonnxError
from splitonnx.partitioner.cutting.conformance.comparisons import USUAL_BYTES
from splitonnx.partitioner.cutting.conformance.dataflow import (
    Made,
    NotRun,
    run_prepared,
    run_session,
)
from splitonnx.partitioner.cutting.conformance.expectations import describe_single, draw_accepted
from splitonnx.partitioner.cutting.conformance.freed_batches import list_freed
from splitonnx.partitioner.cutting.conformance.originals import (
    name_source,
    read_comparable,
    set_inference_modes,
)
from splitonnx.partitioner.cutting.conformance.sample_comparisons import (
    Subject,
    compare_samples,
    describe_unchecked,
)
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Trials that show whether the fixed batch of a model can be freed.

    ``source`` is the original model.  If ``has_loss`` is true, the model computes its own loss.  A
    model with many weights is not compared.
    """

    source: ModelSource
    has_loss: bool = False

    @attribute_errors_to_pass("compared with the model given")
    def compare(self, prepared: PreparedModel) -> list[str]:
        """Compare a prepared model whose batch was freed with the original, sample by sample.

        Return remarks about small differences and about what was not compared.

        Raises:
            MixedSamples: samples influence each other in a model whose batch the user freed.
            BatchNotFreed: a model whose batch the user freed does not run on several samples.
            DifferentResult: a mistake of splitonnx makes samples influence each other.
        """
        batches = list_freed(self.source, prepared)
        if not batches:
            return []
        try:
            original = read_comparable(self.source, prepared, USUAL_BYTES)
        except NotRun as error:
            return describe_unchecked(batches, str(error))
        set_inference_modes(original)
        subject = Subject(
            name=name_source(self.source),
            original=original,
            freed=prepared.freed,
            has_loss=self.has_loss,
        )
        run = partial(run_prepared, prepared.inference, prepared.weights, subject=subject.name)
        made = Made(label="the prepared model", run=run, trace=partial(run, is_traced=True))
        return [note for batch in batches for note in compare_samples(batch, subject, [made])]

    @attribute_errors_to_pass("tried with two samples")
    def explain_single(self, prepared: PreparedModel) -> str:
        """Return why the model takes one sample only, though it leaves its batch size open.

        Return an empty string if it takes more, if its batch was freed, or if it was not tried.
        """
        if list_freed(self.source, prepared):
            return ""
        try:
            original = read_comparable(self.source, prepared, USUAL_BYTES)
        except NotRun:
            return ""
        set_inference_modes(original)
        subject = name_source(self.source)
        run = partial(run_session, original, subject=subject, level="none")
        return describe_single(original, draw_accepted(original, subject, 0), run, subject)

    def free(self, adjustments: Adjustments, inputs: Sequence[str]) -> list[str] | SplitonnxError:
        """Free the first axis of each input in ``inputs``, as ``--dim`` would, and compare.

        ``adjustments`` are the user's own changes to the inputs, which are also made.  Return
        remarks as :meth:`compare` does, or the error that ``cut`` would raise.
        """
        dims = {**adjustments.dims, **{f"{name}:0": "N" for name in inputs}}
        freed = replace(adjustments, dims=dims)
        try:
            return self.compare(prepare(open_model(self.source, freed), adjustments=freed))
        except SplitonnxError as error:
            return error
