/**
 * The training loop: epochs, batches, records, checkpoints, and steps that are made again.
 *
 * It knows the phases by name, and neither what the stages compute nor how the server is reached.
 */

import { StepsLost } from "../errors.js";
import { EVALUATE, LOSS, PREDICT, TRAIN, findPhase } from "../manifests.js";
import { ONE_MODEL } from "../messages.js";
import type { DataPosition } from "../storage/checkpoints.js";
import type { StepDivision } from "../pipelines.js";
import type { NdArrays, TensorSpec } from "../tensors.js";
import { DatasetMeans } from "./metrics/dataset_means.js";
import { countSamples, dealInOrder, hasFixedRows } from "./datasets.js";
import type { Dataset } from "./datasets.js";
import { History } from "./histories.js";
import type { StepRecord } from "./histories.js";
import type { LearningRate, ResolvedFitOptions } from "./options.js";
import type { TaskRunner } from "./runners.js";

/** Times that a server may lose steps before one comes that was not made before. */
export const MOST_RETURNS = 100;

/** Trains and evaluates, one task of its runner after the other. */
export class TrainingLoop {
  readonly #runner: TaskRunner;
  #expected = 0; // the step after the last one of the fit that runs
  #hasLeft = false; // nothing more is shared in this fit

  constructor(runner: TaskRunner) {
    this.#runner = runner;
  }

  /**
   * Train from a position in the data until all epochs are made, and return what happened.
   *
   * Where the server lost steps, both sides go back and make them again, also those that were made
   * before the training was resumed here.
   *
   * @throws StepsLost: they are of an earlier training, or are lost again and again.
   * @throws SplitonnxError: see `SplitClient.fit`.
   */
  async fit(options: ResolvedFitOptions, start: DataPosition): Promise<History> {
    const history = new History();
    let first = this.#step;
    let position = start;
    let [farthest, returns] = [first, 0];
    const isAbsent = options.signal?.aborted ?? false; // it does not even begin
    for (;;) {
      this.#expected = this.#step;
      this.#hasLeft = isAbsent;
      try {
        if (!isAbsent) position = await this.#joinOthers(options, position);
        while (!this.#isOver(options, position)) {
          position = await this.#trainEpoch(options, position, history);
        }
        position = await this.#leave(options, position);
        this.#checkCourse();
        this.#runner.position = position;
        if (options.save) await this.#runner.publish();
        return history;
      } catch (error) {
        if (!(error instanceof StepsLost)) throw error;
        const reached = history.steps.at(-1)?.step ?? first;
        returns = reached > farthest ? 0 : returns + 1;
        farthest = Math.max(farthest, reached);
        if (returns === MOST_RETURNS) throw error;
        const kept = this.#runner.position;
        if (kept && isBefore(kept, start)) first = Math.min(first, error.step);
        if (error.step < first || (error.step > first && !kept)) throw error;
        position = kept ?? start;
        history.forget(error.step, position.epoch);
      }
    }
  }

  /**
   * Compute each metric's mean over all samples of a dataset.
   *
   * Batches weigh by what counted in them (`DatasetMeans`).
   */
  async evaluate(dataset: Dataset, batchSize: number): Promise<Record<string, number>> {
    const means = new DatasetMeans();
    for await (const batch of dataset.batches(dealInOrder(batchSize))) {
      const outputs = await this.perform(PREDICT, batch);
      const size = batch.get(this.#labels ?? "")?.data.length ?? this.#countSamples(PREDICT, batch);
      const metrics = await this.perform(EVALUATE, new Map([...batch, ...outputs]));
      means.add(new Map([...metrics].map(([name, { data }]) => [name, Number(data[0])])), size);
    }
    return means.compute();
  }

  /** Return the model's outputs, without what only an evaluation reads. */
  async predict(batch: NdArrays): Promise<NdArrays> {
    const results = await this.perform(PREDICT, batch);
    const names = new Set(this.#runner.executor.manifest.outputs.map(({ name }) => name));
    return names.size ? new Map([...results].filter(([name]) => names.has(name))) : results;
  }

  /**
   * Carry out one task on a batch and return the phase's results.
   *
   * `expected` is the step that a training step is to be made at.
   */
  async perform(
    phase: string,
    batch: NdArrays,
    { rate, expected }: { rate?: LearningRate | undefined; expected?: number } = {},
  ): Promise<NdArrays> {
    const learningRate = this.#chooseRate(rate, expected ?? this.#step);
    return this.#runner.perform(phase, batch, { learningRate, expected });
  }

  /** Make one training step divided so at the step `expected`. */
  async step(
    batch: NdArrays,
    division: StepDivision,
    { rate, expected }: { rate: LearningRate | undefined; expected: number },
  ): Promise<NdArrays> {
    const learningRate = this.#chooseRate(rate, expected);
    return this.#runner.train(batch, division, { learningRate, expected });
  }

  #chooseRate(given: LearningRate | undefined, step: number): number {
    const chosen = typeof given === "function" ? given(step) : given;
    return chosen ?? this.#runner.executor.manifest.learningRate;
  }

  /** Return the learning rate of the step that begins at a position in the data. */
  #findRate({ learningRate, rates }: ResolvedFitOptions, { epoch, batch }: DataPosition): number {
    return this.#chooseRate(learningRate, this.#expected) * (rates?.getFactor(epoch, batch) ?? 1);
  }

  get #step(): number {
    return this.#runner.executor.step;
  }

  /** The name of the labels: what is measured and not predicted. */
  get #labels(): string | undefined {
    const { results } = findPhase(this.#runner.executor.manifest, PREDICT);
    return this.#dataOf(EVALUATE).find((spec) => !results.includes(spec.name))?.name;
  }

  #countSamples(phase: string, batch: NdArrays): number {
    return countSamples(batch, this.#dataOf(phase), this.#labels);
  }

  #dataOf(phase: string): readonly TensorSpec[] {
    return findPhase(this.#runner.executor.manifest, phase).data;
  }

  /** Train to the end of the position's epoch, evaluate, and return where the next one begins. */
  async #trainEpoch(
    options: ResolvedFitOptions,
    position: DataPosition,
    history: History,
  ): Promise<DataPosition> {
    const dropLast = hasFixedRows(this.#dataOf(TRAIN));
    const { checkpointEvery, signal } = options;
    const { joins, policy } = this.#runner.terms;
    const every = ONE_MODEL.includes(policy) ? Infinity : (checkpointEvery ?? 1);
    let [number, skipped, isDue] = [0, position.batch, false];
    for await (const batch of options.training.batches({ ...position, dropLast })) {
      if (number++ < skipped) continue;
      if (isDue) await this.#keep(options, position);
      const rate = this.#findRate(options, position);
      position = { ...position, batch: position.batch + 1 };
      const record = await this.#recordStep(batch, position, [options.division, rate]);
      history.steps.push(record);
      await options.onStep?.(record);
      this.#checkCourse();
      if (joins) position = await this.#shareIfDue(position, record);
      const endsRound = joins && !position.unsharedSteps;
      isDue = endsRound || record.step % every === 0;
      // before a leaving share, none is written of its step: it would be taken for the one after it
      if (isDue && !joins) await this.#keep(options, position);
      if (this.#isComplete(position) || signal?.aborted) break;
    }
    if (this.#isComplete(position) || signal?.aborted || position.epoch + 1 === options.epochs) {
      position = await this.#leave(options, position);
    } else if (isDue && joins) await this.#keep(options, position);
    if (signal?.aborted) return position;
    if (options.heldOut) await this.#recordEvaluation(options, options.heldOut, position, history);
    return { ...position, epoch: position.epoch + 1, batch: 0 };
  }

  /**
   * Before a session's first step, receive the model that all clients continue from.
   *
   * A checkpoint comes first, if any are written: a client that is killed while it waits would
   * otherwise return as another one, and the others would wait for the one that is gone.
   */
  async #joinOthers(options: ResolvedFitOptions, position: DataPosition): Promise<DataPosition> {
    if (!this.#runner.terms.joins || !this.#runner.isAtStart) return position;
    await this.#keep(options, position);
    return this.#share({ ...position, unsharedSamples: 0 }, false);
  }

  /** Share after a step if a round of steps is over; return the position. */
  async #shareIfDue(position: DataPosition, { samples }: StepRecord): Promise<DataPosition> {
    const unsharedSteps = position.unsharedSteps + 1;
    const trained = { ...position, unsharedSteps, unsharedSamples: position.unsharedSamples + samples };
    return unsharedSteps < this.#runner.terms.localSteps ? trained : this.#share(trained, false);
  }

  /**
   * Share for the last time, so that the other clients stop waiting for this one.
   *
   * A checkpoint follows, if any are written, since the state is another now.
   */
  async #leave(options: ResolvedFitOptions, position: DataPosition): Promise<DataPosition> {
    if (this.#hasLeft || !this.#runner.terms.joins) return position;
    const left = await this.#share(position, true);
    this.#hasLeft = true;
    await this.#keep(options, left);
    return left;
  }

  /** Share, and return the position with the joined parameters' round. */
  async #share(position: DataPosition, leaves: boolean): Promise<DataPosition> {
    const expected = this.#expected;
    const round = await this.#runner.share(position.unsharedSamples, { leaves, expected });
    return { ...position, unsharedSteps: 0, unsharedSamples: 0, round };
  }

  /** Write a checkpoint, if any are written. */
  async #keep(options: ResolvedFitOptions, position: DataPosition): Promise<void> {
    this.#checkCourse();
    if (!options.checkpointEvery) return;
    await this.#runner.checkpoint(position, options.whenUnsaved ?? "stop");
  }

  /** Whether the rounds that the server asks for are over. */
  #isComplete({ round }: DataPosition): boolean {
    const { rounds } = this.#runner.terms;
    return rounds > 0 && rounds <= round;
  }

  /** Whether training ends at a position. */
  #isOver({ epochs, signal }: ResolvedFitOptions, position: DataPosition): boolean {
    return this.#isComplete(position) || position.epoch >= epochs || (signal?.aborted ?? false);
  }

  async #recordStep(
    batch: NdArrays,
    { epoch, batch: number }: DataPosition,
    [division, rate]: readonly [StepDivision, number],
  ): Promise<StepRecord> {
    const [up, down] = this.#runner.traffic;
    const begun = performance.now();
    const results = await this.step(batch, division, { rate, expected: this.#expected });
    this.#expected = this.#step;
    const seconds = (performance.now() - begun) / 1000;
    const [sent, received] = this.#runner.traffic;
    const scalars = [...results].filter(([, array]) => !array.shape.length);
    const numbers = scalars.map(([name, { data }]) => [name, Number(data[0])]);
    const { [LOSS]: loss = NaN, ...metrics } = Object.fromEntries(numbers);
    return {
      step: this.#step,
      epoch,
      batch: number,
      loss,
      metrics,
      learningRate: rate,
      samples: this.#countSamples(TRAIN, batch),
      seconds,
      bytesUp: sent - up,
      bytesDown: received - down,
    };
  }

  async #recordEvaluation(
    options: ResolvedFitOptions,
    dataset: Dataset,
    { epoch, batchSize, accumulate }: DataPosition,
    history: History,
  ): Promise<void> {
    const begun = performance.now();
    const metrics = await this.evaluate(dataset, Math.ceil(batchSize / accumulate));
    const evaluation = { epoch, metrics, seconds: (performance.now() - begun) / 1000 };
    history.evaluations.push(evaluation);
    await options.onEpoch?.(evaluation);
  }

  /** Another task, made between two steps of a fit, may have found that steps are lost. */
  #checkCourse(): void {
    if (this.#step !== this.#expected) throw new StepsLost(this.#step);
  }
}

/** Say whether a position comes before another one in the same data. */
function isBefore(one: DataPosition, other: DataPosition): boolean {
  if ((one.epoch - other.epoch || one.batch - other.batch) >= 0) return false;
  const keys = ["batchSize", "accumulate", "seed", "shuffle", "samples", "schedule"] as const;
  return keys.every((key) => one[key] === other[key]);
}
