/**
 * The axis of an output that counts the samples, by the names of declared dimensions.
 *
 * `splitonnx/sample_axes.py` is the twin, and says why.
 */

import { describeSize, isMultiple } from "./expressions.js";
import { describe } from "./tensors.js";
import type { TensorSpec } from "./tensors.js";

type Dim = TensorSpec["shape"][number];

/** Return the names in a dimension; a number has none, and neither has what is unknown. */
function listNames(dim: Dim | undefined): string[] {
  const text = typeof dim === "string" ? describeSize(dim) : "?";
  return (text === "?" ? [] : text.match(/[^\s*+()/]+/g) ?? []).filter((word) => !/^-?\d+$/.test(word));
}

/** Return the axis along which an output's batches are joined; `undefined` where it is not known. */
export function findSampleAxis(
  { shape }: Pick<TensorSpec, "shape">,
  data: readonly Pick<TensorSpec, "shape">[],
  hasOwnBatches: boolean,
): number | undefined {
  if (shape.every((dim) => dim === 1)) return 0;
  const find = (fits: (dim: Dim) => boolean) => [...shape.keys()].filter((axis) => fits(shape[axis]!));
  const names = data.flatMap((spec) => listNames(spec.shape[0]));
  const [axis, ...more] = find((dim) => listNames(dim).some((name) => names.includes(name)));
  if (axis !== undefined) {
    return !more.length && isMultiple(String(shape[axis]), names) ? axis : undefined;
  }
  const fixed = data.map((spec) => spec.shape[0]).filter((dim) => typeof dim === "number");
  const first = shape[0]!;
  if (fixed.includes(first as number)) return 0;
  const known = data.flatMap((spec) => spec.shape.flatMap(listNames));
  if (typeof first !== "number" && (hasOwnBatches || !listNames(first).some((n) => known.includes(n)))) {
    return 0;
  }
  const equal = find((dim) => fixed.includes(dim as number));
  return equal.length === 1 ? equal[0] : undefined;
}

/** Say why an output's batches cannot be joined, and what to do; `size` counts the samples. */
export function explainUnjoinable(
  output: TensorSpec,
  specs: readonly TensorSpec[],
  size: number | null,
): string {
  const cause =
    `the output '${output.name}', ${describe(output)}, does not have exactly one axis that counts ` +
    "the samples, so several batches of it cannot be joined; ";
  if (size === null) return `${cause}take them one by one with predictBatches`;
  const fixed = specs.find((spec) => typeof spec.shape[0] === "number");
  if (!fixed) return `${cause}predict all rows in one, with batchSize ${size} or larger`;
  return (
    `${cause}predict ${fixed.shape[0]} rows at a time, as many as the model fixes, or cut the model ` +
    `with --dim ${fixed.name}:0=N, which frees its batch, and predict all rows in one`
  );
}
