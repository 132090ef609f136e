/**
 * What belongs to one training step: its scalar inputs, and what its micro-batches have changed.
 *
 * A step of several micro-batches changes the state only as a whole: until its update is committed,
 * the sums of gradients, and what else each micro-batch replaces, are kept beside the state.
 */

import type { Tensor } from "onnxruntime-common";

import { LocalProtocolError, UsageError } from "../errors.js";
import { ACCUMULATE, KEY, LEARNING_RATE, STEP, STEP_PHASES, UPDATE } from "../manifests.js";
import type { PartyManifest } from "../manifests.js";
import type { TaskKey } from "../messages.js";
import { makeZeros } from "../tensors.js";
import type { Dtype, NdArray, NdArrays } from "../tensors.js";

const LARGEST_F32 = 3.4028234663852886e38;

/** Whether a task is a part of a step of several micro-batches. */
export function isPart({ phase }: Pick<TaskKey, "phase">): boolean {
  return phase === ACCUMULATE || phase === UPDATE;
}

/** What the micro-batches of the running step have changed; nothing between two steps. */
export class OpenStep {
  microBatches = 0;
  readonly #manifest: PartyManifest;
  readonly #changed = new Map<string, Tensor>();

  constructor(manifest: PartyManifest) {
    this.#manifest = manifest;
  }

  /**
   * Check that a task is the next one of a party that is at `step`, or belongs to no step.
   *
   * @throws LocalProtocolError: it belongs to another step, or is not its next micro-batch.
   */
  checkNext(key: TaskKey, step: number): void {
    const { phase, microBatch } = key;
    if (!STEP_PHASES.includes(phase)) return;
    if (key.step !== step) {
      throw new LocalProtocolError(`to ${phase} at step ${key.step}; the next is ${step}`);
    }
    const done = this.microBatches;
    if (done !== (isPart(key) ? microBatch : 0) || (phase === UPDATE && !done)) {
      throw new LocalProtocolError(
        `to ${phase} micro-batch ${microBatch} of step ${step}; ${done} were accumulated`,
      );
    }
  }

  /** Return a state as the step's micro-batches left it; sums begin at zero. */
  overlay(
    state: ReadonlyMap<string, Tensor>,
    fromArray: (array: NdArray) => Tensor,
  ): ReadonlyMap<string, Tensor> {
    const sums = this.microBatches ? [] : this.#manifest.accumulators;
    const zeros = sums.map(({ name, dtype, shape }) => {
      const made = makeZeros(dtype as Dtype, shape as number[]); // those of a parameter
      return [name, fromArray(made)] as const;
    });
    return new Map([...state, ...zeros, ...this.#changed]);
  }

  /** Record what a micro-batch has changed. */
  add(changes: ReadonlyMap<string, Tensor>): void {
    for (const [name, tensor] of changes) this.#changed.set(name, tensor);
    this.microBatches += 1;
  }

  /** End the step, and return what its micro-batches have changed in the state. */
  close(): Map<string, Tensor> {
    const changed = new Map(this.#changed);
    for (const { name } of this.#manifest.accumulators) changed.delete(name);
    this.reset();
    return changed;
  }

  /** Forget what the step's micro-batches have changed. */
  reset(): void {
    this.#changed.clear();
    this.microBatches = 0;
  }
}

/**
 * Make the scalar inputs of stages.
 *
 * @throws UsageError: one of them is out of range for its tensor.
 */
export function makeScalars(key: TaskKey, seed: number, learningRate: number): NdArrays {
  const numbers = [seed, key.step, key.microBatch];
  if (!numbers.every((value) => Number.isSafeInteger(value) && value >= 0)) {
    throw new UsageError(`seed, step and micro-batch must be below 2^53, not ${numbers}`);
  }
  if (!(learningRate >= 0 && learningRate <= LARGEST_F32)) {
    throw new UsageError(
      `the learning rate must be finite and not negative, not ${learningRate}`,
    );
  }
  const integers = (values: number[], shape: number[]): NdArray => ({
    dtype: "I64",
    shape,
    data: BigInt64Array.from(values, BigInt),
  });
  return new Map<string, NdArray>([
    [KEY, integers(numbers, [3])],
    [LEARNING_RATE, { dtype: "F32", shape: [], data: Float32Array.of(learningRate) }],
    [STEP, integers([key.step + 1], [])],
  ]);
}
