/**
 * What belongs to one training step: its scalar inputs, and what its micro-batches have changed.
 *
 * A step of several micro-batches changes the state only as a whole: until its update is committed,
 * the sums of gradients, and what else each micro-batch replaces, are kept beside the state.
 */

import type { Tensor } from "onnxruntime-common";

import { LocalProtocolError, UsageError } from "../errors.js";
import { ACCUMULATE, KEY, LEARNING_RATE, STEP, STEP_PHASES, UPDATE, findPhase } from "../manifests.js";
import type { PartyManifest, Stage } from "../manifests.js";
import { describeTask } from "../messages.js";
import type { TaskKey } from "../messages.js";
import { makeZeros } from "../tensors.js";
import type { Dtype, NdArray, NdArrays, TensorSpec } from "../tensors.js";

const LARGEST_F32 = 3.4028234663852886e38;

/** Whether a task is a part of a step of several micro-batches. */
export function isPart({ phase }: Pick<TaskKey, "phase">): boolean {
  return phase === ACCUMULATE || phase === UPDATE;
}

/**
 * What the micro-batches of the running step have changed; nothing between two steps.
 *
 * Several of its tasks may be open at once, and each reads of the state that micro-batches replace
 * what the one before it made, whenever that ran: so what is computed does not depend on timing.
 */
export class OpenStep {
  #begun = 0;
  #finished = 0;
  #isEnding = false; // the update has begun
  readonly #manifest: PartyManifest;
  readonly #chained: ReadonlySet<string>; // the states that micro-batches replace
  readonly #sums: readonly TensorSpec[];
  /** What each task reads of those: first zeros, then what each micro-batch made. */
  #links: Map<string, Tensor>[] = [];

  constructor(manifest: PartyManifest) {
    this.#manifest = manifest;
    this.#sums = manifest.accumulators;
    this.#chained = new Set(findPhase(manifest, ACCUMULATE).commits.keys());
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
    const begun = this.#begun;
    const isNext = begun === (isPart(key) ? microBatch : 0) && !this.#isEnding;
    if (!isNext || (phase === UPDATE && !begun)) {
      throw new LocalProtocolError(
        `to ${phase} micro-batch ${microBatch} of step ${step}; ${begun} were begun`,
      );
    }
  }

  /** Begin the next task of the step. */
  begin({ phase }: TaskKey, fromArray: (array: NdArray) => Tensor): void {
    if (phase === UPDATE) this.#isEnding = true;
    else {
      if (!this.#begun++) {
        const zeros = this.#sums.map(({ name, dtype, shape }) => {
          const made = makeZeros(dtype as Dtype, shape as number[]); // those of a parameter
          return [name, fromArray(made)] as const;
        });
        this.#links = [new Map(zeros)];
      }
      this.#links.push(new Map());
    }
  }

  /** Return a state, `own` outside of the step, as a task of the step reads it. */
  read(key: TaskKey, name: string, own: Tensor | undefined): Tensor | undefined {
    if (!this.#chained.has(name)) return own;
    return this.#links[key.microBatch]!.get(name) ?? (key.microBatch ? undefined : own);
  }

  /**
   * Check whether the micro-batch before a task has made all that a stage of it reads; the update
   * reads nothing before all of them have ended.
   */
  hasState({ phase, microBatch }: TaskKey, stage: Stage): boolean {
    if (phase === UPDATE) return this.#finished === microBatch;
    const link = this.#links[microBatch]!;
    const isThere = (name: string) => !this.#chained.has(name) || link.has(name);
    return (
      !microBatch || stage.inputs.every(({ name, source }) => source !== "state" || isThere(name))
    );
  }

  /** Record values that a micro-batch has made, of those that replace a state. */
  note({ phase, microBatch }: TaskKey, values: ReadonlyMap<string, Tensor>): void {
    if (phase !== ACCUMULATE) return;
    for (const [name, value] of findPhase(this.#manifest, ACCUMULATE).commits) {
      const tensor = values.get(value);
      if (tensor) this.#links[microBatch + 1]!.set(name, tensor);
    }
  }

  /** Forget states that a task has read for the last time; those that the update commits are kept. */
  release({ phase, microBatch }: TaskKey, names: readonly string[]): void {
    const sums = new Set(this.#sums.map(({ name }) => name));
    for (const name of names) {
      if (phase === ACCUMULATE || sums.has(name)) this.#links[microBatch]!.delete(name);
    }
  }

  /**
   * End a micro-batch.
   *
   * @throws LocalProtocolError: one before it has not ended.
   */
  finish(key: TaskKey): void {
    if (key.microBatch !== this.#finished) {
      throw new LocalProtocolError(
        `to finish ${describeTask(key)}; ${this.#finished} micro-batches have ended`,
      );
    }
    if (key.phase === UPDATE) return;
    this.#links[this.#finished++]!.clear();
  }

  /** End the step, and return what its micro-batches have changed in the state. */
  close(): Map<string, Tensor> {
    const changed = new Map(this.#links.at(-1));
    for (const { name } of this.#sums) changed.delete(name);
    this.reset();
    return changed;
  }

  /** Forget what the step's micro-batches have changed. */
  reset(): void {
    this.#links = [];
    this.#begun = this.#finished = 0;
    this.#isEnding = false;
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
