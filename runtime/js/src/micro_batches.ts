/**
 * Steps that consist of several micro-batches: their names, their rows, and their weights.
 *
 * `splitonnx/micro_batches.py` is the twin, and says why.
 */

import { UnusableData, UsageError } from "./errors.js";
import { ACCUMULATE, COUNTED, LOSS, UPDATE } from "./manifests.js";
import type { PartyManifest } from "./manifests.js";
import { findSampleAxis } from "./sample_axes.js";
import { describe, sliceAxis } from "./tensors.js";
import type { NdArrays, TensorSpec } from "./tensors.js";

/** Names of arrays of the client: a micro-batch's weight, F32[], and their number, I64[]. */
export const [MICRO_BATCH_WEIGHT, MICRO_BATCHES] = ["splitonnx.weight", "splitonnx.micro_batches"];
/** Tasks of a step that may be open at once, at the most. */
export const MOST_IN_FLIGHT = 16;
/** How much the weights that two losses give the same micro-batch may differ. */
const LARGEST_DIFFERENCE = 1e-6;

/**
 * Check that a step of this part can consist of several micro-batches.
 *
 * @throws UsageError: the bundle was cut by an earlier version, or its loss cannot be weighed.
 */
export function checkAccumulating({ phases, unweighable }: PartyManifest): void {
  if (unweighable) throw new UsageError(`this bundle cannot accumulate: ${unweighable}`);
  if (![ACCUMULATE, UPDATE].every((name) => phases.some((phase) => phase.name === name))) {
    throw new UsageError(
      "this bundle cannot accumulate: it was cut by an earlier version; cut the model again with " +
        "this version, or train without accumulate",
    );
  }
}

/** Return the declarations of a step's arrays: a fixed number of rows is `count` times as large. */
export function enlarge(specs: readonly TensorSpec[], count: number): readonly TensorSpec[] {
  if (count === 1) return specs;
  return specs.map((spec) => {
    const axis = isUndivided(spec, specs) ? undefined : findSampleAxis(spec, specs, false);
    const scale = (dim: TensorSpec["shape"][number], index: number) =>
      index === axis && typeof dim === "number" ? dim * count : dim;
    return { ...spec, shape: spec.shape.map(scale) };
  });
}

/**
 * Divide a batch into at most `count` micro-batches, whose numbers of rows differ by 1.
 *
 * @throws UnusableData: the number of samples differs, or an array has no axis of samples.
 */
export function splitBatch(
  batch: NdArrays,
  specs: readonly TensorSpec[],
  count: number,
): NdArrays[] {
  const axes = new Map<string, number>();
  for (const spec of specs.filter((one) => !isUndivided(one, specs))) {
    const axis = findSampleAxis(spec, specs, false);
    if (axis === undefined) {
      throw new UnusableData(
        `'${spec.name}', ${describe(spec)}, has no axis that counts the samples, so a batch of it ` +
          "cannot be divided into micro-batches; train without accumulate",
      );
    }
    axes.set(spec.name, axis);
  }
  const rows = [...axes].map(([name, axis]) => [name, batch.get(name)!.shape[axis]!] as const);
  const size = rows[0]?.[1] ?? 0;
  if (!size || rows.some(([, other]) => other !== size)) {
    const sizes = rows.map(([name, other]) => `'${name}' ${other}`).join(", ");
    throw new UnusableData(
      "a batch is divided into micro-batches by its samples, and its arrays have different " +
        `numbers of them: ${sizes || "none"}; train without accumulate`,
    );
  }
  const number = Math.min(count, size);
  const [least, larger] = [Math.floor(size / number), size % number];
  return Array.from({ length: number }, (_, index) => {
    const start = index * least + Math.min(index, larger);
    const end = start + least + (index < larger ? 1 : 0);
    return new Map(
      [...batch].map(([name, array]) => {
        const axis = axes.get(name);
        return [name, axis === undefined ? array : sliceAxis(array, axis, start, end)];
      }),
    );
  });
}

/** Whether an array is one number for the whole batch, and has no row for each sample. */
function isUndivided({ shape }: TensorSpec, specs: readonly TensorSpec[]): boolean {
  const isSingle = (dims: TensorSpec["shape"]) => dims.every((dim) => dim === 1);
  if (!isSingle(shape)) return false;
  return !shape.length || specs.some((one) => !isSingle(one.shape) && one.shape[0] !== 1);
}

/**
 * Return the weight of each micro-batch of a step; they are all 0 if nothing counts.
 *
 * `counts` has the results of the phase `weigh` for each micro-batch.
 *
 * @throws UnusableData: there are several losses, and they weigh a micro-batch differently.
 */
export function findWeights(counts: readonly ReadonlyMap<string, number>[]): readonly number[] {
  const names = [...counts[0]!.keys()].filter((n) => n.startsWith(LOSS) && n.endsWith(COUNTED));
  const found = names.map((name) => {
    const own = counts.map((count) => count.get(name)!);
    const total = own.reduce((sum, value) => sum + value);
    return own.map((value) => (total ? value / total : 0));
  });
  const weights = found[0]!;
  for (const [index, others] of found.entries()) {
    const number = others.findIndex((w, k) => Math.abs(w - weights[k]!) > LARGEST_DIFFERENCE);
    if (number < 0) continue;
    const [first, second] = [names[0]!, names[index]!].map((n) => n.slice(0, -COUNTED.length));
    throw new UnusableData(
      `micro-batch ${number + 1} of ${counts.length} counts ${weights[number]} of the batch in ` +
        `'${first}', and ${others[number]} in '${second}'; gradients can be added up only if it ` +
        "counts as much in each loss; train without accumulate",
    );
  }
  return weights;
}
