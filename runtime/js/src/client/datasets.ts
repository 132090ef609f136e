/**
 * The app's data: arrays by name, checked against what a phase declares, and cut into batches.
 *
 * What the arrays mean is not known here.
 */

import { takeTensor } from "../engine/engines.js";
import type { TensorLike } from "../engine/engines.js";
import { ArrayMismatch, KeptArray, MissingArray, NotFinite, UnusableData, UsageError } from "../errors.js";
import type { Sizes } from "../expressions.js";
import type { PartyManifest } from "../manifests.js";
import { enlarge } from "../micro_batches.js";
import { findSampleAxis } from "../sample_axes.js";
import { checkArray, describe, findNotFinite, takeRows } from "../tensors.js";
import type { NdArray, NdArrays, TensorSpec } from "../tensors.js";
import { shuffleRows } from "./shuffles.js";

/** Arrays by name; named as the model's inputs, the targets `labels`. */
export type Batch = Readonly<Record<string, TensorLike>>;

/**
 * Data: arrays that have the samples along their first dimension, or an iterable of batches, which
 * are taken as they are and in their own order.
 */
export type DataSource = Batch | Iterable<Batch> | AsyncIterable<Batch>;

/** How an epoch is cut into batches. */
export interface Dealing {
  readonly batchSize: number;
  readonly seed: number;
  readonly epoch: number;
  readonly shuffle: boolean;
  /** Leave a smaller last batch out. */
  readonly dropLast: boolean;
}

/** Deal in the data's own order, to the last row. */
export function dealInOrder(batchSize: number): Dealing {
  return { batchSize, seed: 0, epoch: 0, shuffle: false, dropLast: false };
}

/** Arrays by name that come in batches; made by {@link openDataset}. */
export interface Dataset {
  /** Number of samples, or `null` where it is not known in advance. */
  readonly size: number | null;

  /**
   * Throw unless the arrays are as declared, as far as is known in advance.
   *
   * @throws KeptArray, MissingArray, ArrayMismatch, ValueOutOfRange: see {@link checkBatch}.
   */
  check(specs: readonly TensorSpec[], kept?: readonly string[]): void;

  /**
   * Yield one epoch's batches, the same for the same arguments.
   *
   * @throws NotFinite: a floating-point array of the next batch holds NaN or infinity.
   * @throws UnusableData: there is no next epoch, or the next item is not a batch.
   */
  batches(dealing: Dealing): AsyncIterable<NdArrays>;
}

/** Open data as a dataset.
 *
 * @throws UnusableData: an array is none, or they differ in their number of rows.
 */
export function openDataset(source: DataSource): Dataset {
  if (Symbol.iterator in source || Symbol.asyncIterator in source) {
    return new BatchDataset(source as Iterable<Batch> | AsyncIterable<Batch>);
  }
  return new ArrayDataset(takeBatch(source));
}

/**
 * Return whether a state that the model hands itself may hold the fixed batch of the data.
 *
 * A state's shape is fixed, so such a model cannot be cut with a batch of any size. The client does
 * not know the shapes of the server's states, so each of them may hold the batch.
 */
export function hasBatchStates({
  phases,
  state,
  remoteStates,
}: Pick<PartyManifest, "phases" | "state" | "remoteStates">): boolean {
  const rows = new Set(phases.flatMap(({ data }) => data.map((spec) => spec.shape[0])));
  const held = state.filter(({ role }) => role === "buffer").flatMap(({ tensor }) => tensor.shape);
  return remoteStates.length > 0 || held.some((size) => typeof size === "number" && rows.has(size));
}

/** How data are opened; batches to train with are divided into `accumulate` micro-batches. */
export interface FittingOptions {
  readonly isTraining?: boolean;
  readonly kept?: readonly string[];
  readonly canFree?: boolean;
  readonly accumulate?: number;
}

/**
 * Open data, and check them and their division into batches.
 *
 * `kept` names tensors that the model keeps itself, which cannot be part of the data. `canFree` is
 * whether another cut of the model can free its batch, which errors advise then.
 *
 * @throws DataError: the data do not fit what is declared, or some batches of them do not.
 * @throws UsageError: the model fixes another batch size.
 */
export function openFitting(
  source: DataSource,
  specs: readonly TensorSpec[],
  batchSize: number,
  {
    isTraining = false,
    kept = [],
    canFree = true,
    accumulate = 1,
  }: FittingOptions = {},
): Dataset {
  const dataset = openDataset(source);
  const whole = enlarge(specs, accumulate);
  dataset.check(whole, kept);
  if (dataset.size !== null && (isTraining || dataset.size > batchSize)) checkAxes(specs);
  if (dataset.size !== null) checkRows(dataset.size, whole, batchSize, isTraining, canFree);
  return dataset;
}

/** Throw where an array has its samples on another axis than the first, which is divided. */
function checkAxes(specs: readonly TensorSpec[]): void {
  for (const spec of specs) {
    const axis = findSampleAxis(spec, specs, false);
    if (!axis || typeof spec.shape[0] !== "number") continue;
    throw new UnusableData(
      `the samples of '${spec.name}', ${describe(spec)}, are on axis ${axis}, but arrays are ` +
        "divided into batches along their first; pass each batch on its own, in an array of batches",
    );
  }
}

/**
 * Throw unless all batches have the number of rows that an array fixes, if one does.
 *
 * Training skips a smaller last batch, but needs at least one batch.
 */
function checkRows(
  size: number,
  specs: readonly TensorSpec[],
  batchSize: number,
  isTraining: boolean,
  canFree: boolean,
): void {
  const fixed = specs.find((spec) => typeof spec.shape[0] === "number");
  const rows = fixed?.shape[0];
  if (!fixed || typeof rows !== "number") return;
  if (size === rows && batchSize >= rows && !isTraining) return;
  const cause = `the model fixes its batch at ${rows} rows, in '${fixed.name}'`;
  const freeing = `, or cut the model with --dim ${fixed.name}:0=N, which frees its batch`;
  const advice = canFree ? freeing : "";
  if (size < rows) {
    throw new UnusableData(
      `${cause}, and there are only ${size} rows; give ${rows} or more${advice}`,
    );
  }
  if (batchSize !== rows) throw new UsageError(`${cause}; use batchSize ${rows}${advice}`);
  if (size % rows && !isTraining) {
    throw new UnusableData(
      `${cause}, and ${size} rows leave a last batch of ${size % rows}; give a multiple of ` +
        `${rows}${advice}`,
    );
  }
}

/** Convert a batch of the app. */
export function takeBatch(batch: Batch): NdArrays {
  const arrays = Object.entries(batch).map(([name, one]) => [name, takeTensor(name, one)] as const);
  return new Map(arrays);
}

/** Arrays that share their first dimension, one row a sample. */
class ArrayDataset implements Dataset {
  readonly size: number;
  readonly #arrays: NdArrays;

  constructor(arrays: NdArrays) {
    const rows = [...arrays].map(([name, { shape }]) => [name, shape[0] ?? 0] as const);
    if (!rows.length) throw new UnusableData("the data hold no arrays");
    if (new Set(rows.map(([, count]) => count)).size > 1) {
      const counts = rows.map(([name, count]) => `'${name}' ${count}`).join(", ");
      const advice = "pass each batch on its own, in an array of batches";
      throw new UnusableData(`the arrays differ in their number of rows: ${counts}; ${advice}`);
    }
    this.size = rows[0]![1];
    if (!this.size) throw new UnusableData("the data hold no samples");
    this.#arrays = arrays;
  }

  check(specs: readonly TensorSpec[], kept: readonly string[] = []): void {
    checkBatch(this.#arrays, specs.map(freeRows), kept);
  }

  async *batches(dealing: Dealing): AsyncGenerator<NdArrays, void> {
    const { batchSize, seed, epoch, shuffle, dropLast } = dealing;
    const order = shuffle
      ? shuffleRows(this.size, seed, epoch)
      : Uint32Array.from({ length: this.size }, (_, index) => index);
    for (let start = 0; start < this.size; start += batchSize) {
      const rows = order.subarray(start, start + batchSize);
      if (dropLast && rows.length < batchSize) return;
      const picked = [...this.#arrays].map(([name, array]) => [name, takeRows(array, rows)] as const);
      const batch = new Map(picked);
      checkFinite(batch, "", rows);
      yield batch;
    }
  }
}

/** Batches that an iterable yields; it decides on their size and order. */
class BatchDataset implements Dataset {
  readonly size = null;
  readonly #source: Iterable<Batch> | AsyncIterable<Batch>;
  #specs: readonly TensorSpec[] = [];
  #kept: readonly string[] = [];
  #spent = false;

  constructor(source: Iterable<Batch> | AsyncIterable<Batch>) {
    this.#source = source;
  }

  /** Check the batches of an array; others are checked when their turn comes. */
  check(specs: readonly TensorSpec[], kept: readonly string[] = []): void {
    this.#specs = specs;
    this.#kept = kept;
    if (!Array.isArray(this.#source)) return;
    for (const batch of this.#source as Batch[]) checkBatch(takeBatch(batch), specs, kept);
  }

  async *batches(): AsyncGenerator<NdArrays, void> {
    if (this.#spent) {
      throw new UnusableData("an iterator lasts for one epoch; pass a list");
    }
    this.#spent = "next" in this.#source;
    let number = 0;
    for await (const batch of this.#source) {
      const arrays = takeBatch(batch);
      checkBatch(arrays, this.#specs, this.#kept);
      checkFinite(arrays, `batch ${number++}, `);
      yield arrays;
    }
  }
}

/**
 * Raise unless `batch` has every array that is declared, and each as declared.
 *
 * Nothing is converted.  `kept` names tensors that the model keeps itself.
 *
 * @throws KeptArray: there is an array for one of those.
 * @throws MissingArray: an array is not there.
 * @throws ArrayMismatch: element type or shape differ.
 * @throws ValueOutOfRange: an integer, usually a label, is outside its bounds.
 */
export function checkBatch(
  batch: NdArrays,
  specs: readonly TensorSpec[],
  kept: readonly string[] = [],
): void {
  const held = kept.find((name) => batch.has(name));
  if (held !== undefined) throw new KeptArray(held);
  const sizes: Sizes = new Map();
  for (const spec of specs) {
    const array = batch.get(spec.name);
    if (!array) throw new MissingArray(spec.name, [...batch.keys()]);
    if (array.dtype !== spec.dtype) {
      const advice = array.dtype === "U8" && spec.dtype === "BOOL" ? "; set its type: 'bool'" : "";
      throw new ArrayMismatch(spec.name, describe(spec), describe(array) + advice);
    }
    checkArray(array, spec, sizes);
  }
}

/**
 * Raise where a floating-point array holds NaN or infinity.
 *
 * `where` goes before the row in the error; `rows` are the rows' numbers, else they are counted
 * within the batch.
 *
 * @throws NotFinite: it names the array and its first such row.
 */
export function checkFinite(batch: NdArrays, where: string, rows?: ArrayLike<number>): void {
  for (const [name, array] of batch) {
    const index = findNotFinite(array);
    if (index < 0) continue;
    const row = Math.floor(index / (array.data.length / (array.shape[0] ?? 1)));
    throw new NotFinite(name, `${where}row ${rows?.[row] ?? row}`);
  }
}

function freeRows(spec: TensorSpec): TensorSpec {
  if (typeof spec.shape[0] !== "number") return spec;
  return { ...spec, shape: [null, ...spec.shape.slice(1)] };
}

/** Count a batch's samples: the rows of the labels, or of its first declared array without any. */
export function countSamples(
  batch: NdArrays,
  specs: readonly TensorSpec[],
  labels: string | undefined,
): number {
  const array: NdArray | undefined = batch.get(labels ?? specs[0]?.name ?? "");
  return array?.shape[0] ?? 1;
}

/** Return whether an array has a fixed number of rows, so that smaller batches do not fit. */
export function hasFixedRows(specs: readonly TensorSpec[]): boolean {
  return specs.some((spec) => typeof spec.shape[0] === "number");
}
