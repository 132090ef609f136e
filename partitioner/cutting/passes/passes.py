"""The table of preparation passes, with the facts that each pass requires, ensures or invalidates.

The passes build a training form and an inference form.  Tensors have the same names in both forms,
so that one cut fits both.  Weights become graph inputs, so that the graph stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.carried_states.declarations import finish_states, store_inputs
from splitonnx.partitioner.cutting.passes.batch_decisions import (
    decide_by_batch,
    refuse_batch_of_1,
)
from splitonnx.partitioner.cutting.passes.batches import MOST_ROUNDS, free_batches
from splitonnx.partitioner.cutting.passes.equal_sizes import join_sizes
from splitonnx.partitioner.cutting.passes.forms import (
    keep_data_outputs,
    lift_integers,
    make_inference_form,
    name_nodes,
    name_outputs,
    refuse_unkept_statistics,
)
from splitonnx.partitioner.cutting.passes.given_names import list_names
from splitonnx.partitioner.cutting.passes.gradient_stops import stop_gradients
from splitonnx.partitioner.cutting.passes.joined_statistics import separate_statistics
from splitonnx.partitioner.cutting.passes.resized_batches import refuse_resized_batches
from splitonnx.partitioner.cutting.passes.ties import tie_weights
from splitonnx.partitioner.cutting.passes.work import Fact, Pass, Work
from splitonnx.partitioner.differentiation.control_flow import obstacles
from splitonnx.partitioner.differentiation.derived.kept_outputs import name_kept_outputs
from splitonnx.partitioner.graphs.random_numbers import correct_draws, seed_random_operators
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.tables import refuse_tables
from splitonnx.partitioner.inference.declared_shapes import drop_declared_shapes
from splitonnx.partitioner.inference.folds import fold, note_shapes
from splitonnx.partitioner.inference.sequences import flatten_sequences
from splitonnx.partitioner.inference.shapes import check_ranks, infer_shapes
from splitonnx.partitioner.lowerings.fusions import prevent_wrong_fusions
from splitonnx.partitioner.normalization.batchnorms import (
    find_inner_statistics,
    freeze_batchnorms,
    train_batchnorms,
    write_out_own_statistics,
)
from splitonnx.partitioner.normalization.constants.kept import find_kept, find_numbers
from splitonnx.partitioner.normalization.dropouts import seed_dropouts
from splitonnx.partitioner.normalization.explicit_operands import (
    make_axes_vectors,
    make_reductions_explicit,
)
from splitonnx.partitioner.normalization.explicit_padding import make_all_paddings_explicit
from splitonnx.partitioner.normalization.fused.replacements import replace_foreign
from splitonnx.partitioner.normalization.opsets import adapt_opset, inline_functions
from splitonnx.partitioner.normalization.precisions import replace_null_casts, widen
from splitonnx.partitioner.normalization.quantizations import pass_gradients, refuse_integer_model
from splitonnx.partitioner.normalization.recurrence_layouts import normalize_layouts
from splitonnx.partitioner.normalization.weights import (
    assign_roles,
    lift_weights,
    pin_names,
    return_weights,
)
from splitonnx.partitioner.rewrites import rewrite
from splitonnx.partitioner.rewrites.recurrent_activations import complete_activations


def _on_graph(*changes: Callable[[ir.Graph], object]) -> Callable[[Work], object]:
    return lambda work: [change(work.model.graph) for change in changes]


def _name_nodes(work: Work) -> None:
    name_nodes(work.model.graph)
    work.given = list_names(work.model.graph)
    name_outputs(work.model.graph)


def _separate_statistics(work: Work) -> None:
    work.separations = separate_statistics(work.model.graph)


def _lift_weights(work: Work) -> None:
    work.weights = lift_weights(work.model.graph, work.train)
    work.constants = [kept for kept in find_kept(work.model.graph) if kept.name in work.given]


def _flatten_sequences(work: Work) -> None:
    if flatten_sequences(work.model.graph):
        infer_shapes(work.model)


def _flatten_sequences_of_loops(work: Work) -> None:
    if flatten_sequences(work.model.graph):
        infer_shapes(work.model)
        fold(work.model, work.weights)


def _infer(work: Work) -> None:
    infer_shapes(work.model)
    if make_axes_vectors(work.model.graph) | obstacles.note_carried_shapes(work.model.graph):
        infer_shapes(work.model)


def _type(work: Work) -> None:
    drop_declared_shapes(work.model)
    _infer(work)


def _make_paddings_explicit(work: Work) -> None:
    if make_all_paddings_explicit(work.model):
        _infer(work)  # also what leaves a body whose shapes were corrected


def _join_sizes(work: Work) -> None:
    if join_sizes(work.model.graph, work.weights):
        _infer(work)


def _free_batches(work: Work) -> None:
    for _ in range(MOST_ROUNDS):
        freed = free_batches(work.model.graph, work.weights, work.chosen_sizes)
        if not freed:
            return
        work.freed += freed
        _infer(work)


def _decide_by_batch(work: Work) -> None:
    work.decided = decide_by_batch(work.model.graph, work.weights)
    if work.decided:
        _infer(work)


def _check_sizes(work: Work) -> None:
    check_ranks(work.model.graph)
    refuse_resized_batches(work.model.graph)


def _write_out_own_statistics(work: Work) -> None:
    work.has_own_statistics = write_out_own_statistics(work.model.graph, work.weights)
    if work.has_own_statistics:
        infer_shapes(work.model)


def _part_forms(work: Work) -> None:
    replace_null_casts(work.model.graph)
    work.forms = (copy_model(work.model), copy_model(work.model))
    if work.decided:  # the parties' declarations refuse a batch of 1 already
        refuse_batch_of_1(work.model.graph, work.weights)


def _stop_gradients(work: Work) -> None:
    graph, names = work.model.graph, work.stop_gradients
    work.stored, found = stop_gradients(graph, work.weights, names, work.given, work.stored)
    missing = (*work.ignored.missing, *found.missing)
    work.ignored = replace(work.ignored, missing=missing, stops=found.stops)


def _widen(work: Work) -> None:
    work.masters = widen(work.forms, work.weights)


def _fold_forms(work: Work) -> None:
    """Fold constants again if the forms were widened: bfloat16 could not be folded before."""
    for form in work.forms if work.masters is not work.weights else ():
        fold(form, work.weights)


def _set_modes(work: Work) -> None:
    work.buffers = train_batchnorms(
        work.training.graph, mode=work.batchnorm, has_others=work.has_own_statistics
    )
    work.frozen_statistics = find_inner_statistics(work.training.graph)
    work.frozen_statistics |= freeze_batchnorms(work.training.graph)
    seed_dropouts(work.training.graph, mode=work.dropout)
    make_inference_form(work.inference.graph)


def _assign_roles(work: Work) -> None:
    refuse_unkept_statistics(work.buffers, work.weights)
    statistics, trained = {*work.buffers, *work.frozen_statistics}, set(work.buffers)
    bound = pin_names([name for name in work.bound if name in work.weights])
    work.roles = assign_roles(
        work.model.graph,
        work.weights,
        statistics,
        trained,
        train=work.train,
        freeze=[*work.freeze, *bound],
        kept=work.stored.freeze,
        constants=[*(kept.name for kept in work.constants), *find_numbers(work.model.graph)],
        states=[source for _, source in work.states],
    )


def _make_differentiable(work: Work) -> None:
    """Replace nodes that depend on trained weights but have no gradient by nodes with gradients."""
    training = work.training
    trained = {name for name, role in work.roles.items() if role is Role.PARAMETER}
    if not trained:
        refuse_integer_model(training.graph)
    if pass_gradients(training.graph, trained):
        infer_shapes(training)
    rewrite(training, trained)


def _infer_forms(work: Work) -> None:
    for form in work.forms:
        infer_shapes(form)


def _finish_forms(work: Work) -> None:
    for form in work.forms:
        note_shapes(form.graph)
        refuse_tables(form.graph)
        keep_data_outputs(form.graph, work.weights)
    finish_states(work)


_F = Fact
PASSES: Sequence[Pass] = (
    Pass(
        work="written without functions",
        run=lambda work: inline_functions(work.model),
        ensures=_F.INLINED,
    ),
    Pass(work="relieved of inputs with stored values", run=store_inputs, ensures=_F.STORED),
    Pass(work="given names", run=_name_nodes, requires=_F.INLINED, ensures=_F.NAMED),
    Pass(
        work="given running statistics that are no parameters",
        run=_separate_statistics,
        requires=_F.INLINED | _F.STORED | _F.NAMED,
    ),
    Pass(
        work="given float weights for integers",
        run=lift_integers,
        requires=_F.INLINED | _F.STORED | _F.NAMED,
        ensures=_F.QUANTIZED,
    ),
    Pass(
        work="relieved of its weights",
        run=_lift_weights,
        requires=_F.INLINED | _F.STORED | _F.QUANTIZED,
        ensures=_F.LIFTED,
    ),
    Pass(
        work="brought to opset 18 to 21",
        run=lambda work: adapt_opset(work.model),
        requires=_F.INLINED | _F.NAMED,
        ensures=_F.ADAPTED,
    ),
    Pass(
        work="given the usual layout and parameters of recurrences",
        run=_on_graph(normalize_layouts, complete_activations),
        requires=_F.ADAPTED,
    ),
    Pass(
        work="relieved of operators of other domains",
        run=lambda work: replace_foreign(work.model),
        requires=_F.ADAPTED,
        ensures=_F.USUAL,
    ),
    Pass(
        work="given its ties",
        run=lambda work: tie_weights(work.model.graph, work.weights, work.ties),
        requires=_F.LIFTED,
    ),
    Pass(work="typed", run=_type, requires=_F.ADAPTED | _F.USUAL, ensures=_F.TYPED),
    Pass(work="given one name for equal sizes", run=_join_sizes, requires=_F.LIFTED | _F.TYPED),
    Pass(work="freed of a batch of 1", run=_free_batches, requires=_F.LIFTED | _F.TYPED),
    Pass(
        work="given the branches of larger batches",
        run=_decide_by_batch,
        requires=_F.LIFTED | _F.TYPED,
    ),
    Pass(
        work="given explicit padding",  # before a shape that it corrects becomes a constant
        run=_make_paddings_explicit,
        requires=_F.TYPED,
        ensures=_F.PADDED,
    ),
    Pass(work="relieved of sequences", run=_flatten_sequences, requires=_F.TYPED, ensures=_F.FLAT),
    Pass(
        work="folded",
        run=lambda work: fold(work.model, work.weights),
        requires=_F.LIFTED | _F.TYPED | _F.PADDED | _F.FLAT,
        ensures=_F.FOLDED,
        spoils=_F.FLAT | _F.PADDED,  # by unrolling loops and inferring more shapes
    ),
    Pass(
        work="relieved of the sequences of loops",
        run=_flatten_sequences_of_loops,
        requires=_F.FOLDED,
        ensures=_F.FLAT,
    ),
    Pass(
        work="given back the weights of bodies that no gradient can pass through",
        run=lambda work: return_weights(work.model.graph, work.weights, obstacles.has_gradient),
        requires=_F.LIFTED | _F.FOLDED | _F.FLAT,
    ),
    Pass(
        work="checked for its sizes",
        run=_check_sizes,
        requires=_F.TYPED | _F.FOLDED,
        ensures=_F.CHECKED,
    ),
    Pass(
        work="given explicit padding where shapes were folded",
        run=_make_paddings_explicit,
        requires=_F.TYPED | _F.FOLDED,
        ensures=_F.PADDED,
    ),
    Pass(
        work="given formulas of normalizations with statistics of their own",
        run=_write_out_own_statistics,
        requires=_F.TYPED | _F.LIFTED,
    ),
    Pass(
        work="relieved of gradients",
        run=_stop_gradients,
        requires=_F.TYPED | _F.LIFTED | _F.FOLDED,
    ),
    Pass(
        work="kept from wrong fusions and wrong draws",
        run=_on_graph(prevent_wrong_fusions, correct_draws),
        requires=_F.TYPED | _F.PADDED,
    ),
    Pass(
        work="given explicit axes of reductions",
        run=_on_graph(make_reductions_explicit),
        requires=_F.TYPED | _F.FOLDED,
        ensures=_F.REDUCED,
    ),
    Pass(
        work="parted into two forms",
        run=_part_forms,
        requires=_F.NAMED | _F.LIFTED | _F.FLAT | _F.CHECKED | _F.PADDED | _F.REDUCED,
        ensures=_F.FORMS,
    ),
    Pass(
        work="brought to float32",
        run=_widen,
        requires=_F.FORMS | _F.TYPED,
        ensures=_F.WIDE,
        spoils=_F.FOLDED,
    ),
    Pass(work="folded in float32", run=_fold_forms, requires=_F.WIDE, ensures=_F.FOLDED),
    Pass(
        work="given the modes of its forms",
        run=_set_modes,
        requires=_F.FORMS | _F.WIDE | _F.FOLDED | _F.NAMED,
        ensures=_F.MODES,
        spoils=_F.TYPED,
    ),
    Pass(
        work="given seeds",
        run=lambda work: seed_random_operators(work.training.graph),
        requires=_F.MODES | _F.NAMED,
        ensures=_F.SEEDED,
        spoils=_F.TYPED,
    ),
    Pass(
        work="given the outputs that gradients read",
        run=lambda work: name_kept_outputs(work.training.graph),
        requires=_F.FORMS,
        ensures=_F.OUTPUTS,
        spoils=_F.TYPED,
    ),
    Pass(
        work="typed in both forms",
        run=_infer_forms,
        requires=_F.MODES | _F.SEEDED | _F.OUTPUTS,
        ensures=_F.TYPED,
    ),
    Pass(
        work="given the roles of its weights",
        run=_assign_roles,
        requires=_F.LIFTED | _F.MODES,
        ensures=_F.ROLES,
    ),
    Pass(
        work="written in operators that have a gradient",
        run=_make_differentiable,
        requires=_F.TYPED | _F.FOLDED | _F.ROLES | _F.SEEDED | _F.OUTPUTS,
        ensures=_F.SMOOTH,
    ),
    Pass(
        work="finished in both forms",
        run=_finish_forms,
        requires=_F.TYPED | _F.SMOOTH,
        ensures=_F.SHAPED,
    ),
)
"""The preparation passes in order: what a pass requires is ensured by an earlier pass."""
