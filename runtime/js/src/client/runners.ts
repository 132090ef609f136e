/**
 * Runs tasks with the client's part of a split model: its executor, training run and channel.
 *
 * It runs one task after the other, makes both sides write their checkpoints, and goes back with
 * the server where that one lost steps.  Data, epochs and records belong to the training loop.
 */

import type { Channel } from "../channels/channels.js";
import type { SharingTerms } from "../channels/greetings.js";
import { canOverlap } from "../engine/dataflows.js";
import type { Executor } from "../engine/executors.js";
import { LocalProtocolError, NotSaved, StepRestarted, StepsLost, UsageError } from "../errors.js";
import { ACCUMULATE, SHARE, TRAIN, UPDATE, WEIGH, findPhase } from "../manifests.js";
import {
  MICRO_BATCHES,
  MICRO_BATCH_WEIGHT,
  checkAccumulating,
  enlarge,
  findWeights,
  splitBatch,
} from "../micro_batches.js";
import type { StepDivision } from "../pipelines.js";
import { LEAVES, ROUND, SAMPLES, listJoined, nameOwn } from "../sharing.js";
import type { DataPosition } from "../storage/checkpoints.js";
import type { NdArray, NdArrays, TensorSpec } from "../tensors.js";
import { averageResults, readNumbers } from "./metrics/dataset_means.js";
import { Job } from "./jobs.js";
import type { PlannedTask } from "./jobs.js";
import type { TrainingRun } from "./training_runs.js";

/** Times in a row that a step of several micro-batches may begin again. */
export const MOST_RESTARTS = 100;

/** What training does where a checkpoint cannot be written. */
export type WhenUnsaved = "stop" | "continue";

/** Called with all tensors that leave the device and come to it. */
export type OnWires = (direction: "sent" | "received", phase: string, wires: NdArrays) => void;

export interface TaskRunnerOptions {
  readonly executor: Executor;
  readonly run: TrainingRun;
  readonly channel: Channel;
  /** Keys the random masks. */
  readonly seed: number;
  readonly onWires?: OnWires | undefined;
}

/**
 * Runs one task after the other, in the order in which they are asked for.
 *
 * `position` is where in its data the state is, as far as that is known: the caller sets it, and
 * it changes where steps are lost.
 */
export class TaskRunner {
  position: DataPosition | null = null;
  readonly executor: Executor;
  readonly run: TrainingRun;
  readonly #channel: Channel;
  readonly #seed: number;
  readonly #onWires: OnWires | undefined;
  #closed = false;
  #isHalfPublished = false;
  #released: Promise<void> | undefined;
  #inFlight = 1; // tasks of a step that are open at once
  #others = 0; // numbers the tasks other than training steps
  #last: Promise<unknown> = Promise.resolve();

  constructor({ executor, run, channel, seed, onWires }: TaskRunnerOptions) {
    this.executor = executor;
    this.run = run;
    this.#channel = channel;
    this.#seed = seed;
    this.#onWires = onWires;
  }

  /** How the server joins what its clients learn. */
  get terms(): SharingTerms {
    return this.#channel.terms;
  }

  /** Whether the session has not made a step since it began or was published. */
  get isAtStart(): boolean {
    const { start, step } = this.run.findResumePoint(this.executor.step);
    return start === step;
  }

  /** Bytes sent and received so far. */
  get traffic(): readonly [sent: number, received: number] {
    return this.#channel.traffic;
  }

  /**
   * Carry one task through, from its data to its commit, and return the phase's results.
   *
   * `expected` is the step that a training step is to be made at.
   *
   * @throws StepsLost: the server lost steps; both sides are at an earlier one, and can continue.
   * @throws DataError, StageFailed, ProtocolError: the task is given up, and the runner is closed.
   */
  async perform(
    phase: string,
    data: NdArrays,
    { learningRate, expected }: { learningRate: number; expected?: number | undefined },
  ): Promise<NdArrays> {
    return this.#inTurn(async () => {
      this.#checkStep(expected);
      const step = [TRAIN, SHARE].includes(phase) ? this.executor.step : this.#others++;
      const key = { ...this.#own, phase, step, microBatch: 0 };
      return (await this.#perform([{ key, data }], learningRate))[0]!;
    });
  }

  /**
   * Check that a step may consist of so many micro-batches, and return the declarations of a step's
   * arrays.
   *
   * @throws UsageError: the bundle or the server does not permit it.
   */
  checkDivision({ count: number }: StepDivision): readonly TensorSpec[] {
    const { manifest } = this.executor;
    if (number > 1) {
      checkAccumulating(manifest);
      const { canAccumulate, policy } = this.terms;
      if (!canAccumulate) {
        throw new UsageError(
          `the server's policy '${policy}' does not let a step consist of several micro-batches, ` +
            `or the server is of an earlier version; train without them`,
        );
      }
    }
    return enlarge(findPhase(manifest, TRAIN).data, number);
  }

  /** Load the stages of training now instead of in its first step. */
  async prepareTraining(division: StepDivision): Promise<void> {
    for (const phase of division.count === 1 ? [TRAIN] : [WEIGH, ACCUMULATE, UPDATE]) {
      await this.executor.prepare(phase);
    }
  }

  /**
   * Make one training step of at most so many micro-batches, and return its results.
   *
   * @throws UnusableData: the batch cannot be divided.
   * @throws StepRestarted: the server lost the step's micro-batches again and again.
   * @throws StepsLost, DataError, StageFailed, ProtocolError: as {@link perform}.
   */
  async train(
    batch: NdArrays,
    division: StepDivision,
    { learningRate, expected }: { learningRate: number; expected: number },
  ): Promise<NdArrays> {
    if (division.count === 1) return this.perform(TRAIN, batch, { learningRate, expected });
    const parts = splitBatch(batch, findPhase(this.executor.manifest, TRAIN).data, division.count);
    const counts: ReadonlyMap<string, number>[] = [];
    for (const part of parts) {
      counts.push(readNumbers(await this.perform(WEIGH, part, { learningRate: 0 })));
    }
    const weights = findWeights(counts);
    const weighed = parts.map((part, index): NdArrays => {
      const data = Float32Array.of(weights[index]!);
      return new Map([...part, [MICRO_BATCH_WEIGHT, { dtype: "F32", shape: [], data }]]);
    });
    return this.#inTurn(async () => {
      this.#checkStep(expected);
      await this.#goingBack(() => this.#widen(division));
      for (let restarts = 0; ; restarts++) {
        try {
          return await this.#accumulate(weighed, counts, learningRate);
        } catch (error) {
          if (!(error instanceof StepRestarted) || restarts === MOST_RESTARTS) throw error;
        }
      }
    });
  }

  /** Add up the gradients of micro-batches, and update; return the means of the results. */
  async #accumulate(
    parts: readonly NdArrays[],
    counts: readonly ReadonlyMap<string, number>[],
    learningRate: number,
  ): Promise<NdArrays> {
    const { step } = this.executor;
    const all = [...parts, new Map([[MICRO_BATCHES, count(parts.length)]])];
    const tasks = all.map((data, microBatch) => {
      const phase = microBatch < parts.length ? ACCUMULATE : UPDATE;
      return { key: { ...this.#own, phase, step, microBatch }, data };
    });
    const results = await this.#perform(tasks, learningRate);
    return averageResults(results, counts);
  }

  /** Have as many tasks of a step open at once as the division says, and both sides permit. */
  async #widen({ inFlight }: StepDivision): Promise<void> {
    const { manifest } = this.executor;
    const accumulate = findPhase(manifest, ACCUMULATE);
    this.#inFlight = canOverlap(accumulate, manifest.party) ? inFlight : 1;
    await this.#channel.widen(this.#inFlight);
  }

  /** Another task that ran meanwhile may have found that steps are lost. */
  #checkStep(expected: number | undefined): void {
    if (expected !== undefined && expected !== this.executor.step) {
      throw new StepsLost(this.executor.step);
    }
  }

  get #own(): { session: string } {
    return { session: this.run.session };
  }

  /** Run one task, or the tasks of one step, and return the results of each. */
  async #perform(tasks: readonly PlannedTask[], learningRate: number): Promise<readonly NdArrays[]> {
    const inFlight = Math.min(this.#inFlight, this.#channel.inFlight);
    const job = new Job(this.executor, tasks, { inFlight, seed: this.#seed, learningRate });
    try {
      await job.begin();
      try {
        await this.#goingBack(() => this.#exchange(job, learningRate));
        return job.results;
      } catch (error) {
        const isLost = error instanceof StepsLost || error instanceof StepRestarted;
        if (!isLost) this.close();
        throw error;
      }
    } finally {
      if (job.results.length < tasks.length) {
        this.#channel.endAll();
        job.abandon(); // with the micro-batches that ended
      }
    }
  }

  /**
   * Share this part's parameters, replace them by the joined ones, and return the round.
   *
   * This waits until the server has joined what the clients of the round learned.  `samples` is the
   * number of samples trained with since the last time, and `leaves` means that the client will not
   * share again.  `expected` is the step that the client is to be at.
   *
   * @throws StepsLost, ProtocolError: as {@link perform}.
   */
  async share(
    samples: number,
    { leaves, expected }: { leaves: boolean; expected: number },
  ): Promise<number> {
    const state = this.executor.state();
    const own = listJoined(this.executor.manifest).map((name) => {
      return [nameOwn(name), state.get(name)!] as const;
    });
    const counts = [[SAMPLES, count(samples)], [LEAVES, count(Number(leaves))]] as const;
    const data = new Map<string, NdArray>([...counts, ...own]);
    const results = await this.perform(SHARE, data, { learningRate: 0, expected });
    return Number(results.get(ROUND)!.data[0]);
  }

  /**
   * Hold the storage for a training that begins, and with `checkpoints` look for another run.
   *
   * @throws UnfinishedRun, StorageInUse: see {@link TrainingRun.beginRun}.
   */
  async beginRun(options: { checkpoints: boolean; restart: boolean }): Promise<void> {
    return this.#inTurn(async () => {
      await (options.checkpoints ? this.run.beginRun(options) : this.run.hold());
    });
  }

  /**
   * Let both sides write a checkpoint, one after the other.
   *
   * Each side keeps two, so there is one that both have as long as neither is two ahead: the one
   * whose last was not written goes first.
   *
   * @throws NotSaved: one could not, and `whenUnsaved` is to stop.
   * @throws StepsLost, ProtocolError: as {@link perform}.
   */
  async checkpoint(position: DataPosition, whenUnsaved: WhenUnsaved): Promise<void> {
    return this.#inTurn(async () => {
      try {
        if (this.run.isBehind) {
          await this.run.write(this.executor, position);
          await this.#saveRemotely(false);
        } else {
          await this.#saveRemotely(false);
          await this.run.write(this.executor, position);
        }
      } catch (error) {
        if (!(error instanceof NotSaved) || whenUnsaved === "stop") throw error;
      }
    });
  }

  /**
   * Make both sides write their state as the outcome of the training, the server first.
   *
   * @throws NotSaved: one could not, or is not finite.
   * @throws StepsLost, ProtocolError: as {@link perform}.
   */
  async publish(): Promise<void> {
    return this.#inTurn(async () => {
      this.run.checkOutcome(this.executor);
      await this.run.hold();
      this.#isHalfPublished = true; // unknown from now on, until the server answers
      await this.#saveRemotely(true);
      await this.run.publish(this.executor, this.position);
      this.#isHalfPublished = false;
    });
  }

  /**
   * End the session; may be called twice.
   *
   * Where the run has checkpoints and is not finished, or the server published its state and this
   * side did not, it only hangs up: the server would forget what a resumed run begins from.
   */
  close(): void {
    const { kept } = this.run.findResumePoint(this.executor.step);
    const isUnfinished = this.#isHalfPublished || kept.length > 0;
    if (!this.#closed) this.#channel.close({ forGood: !isUnfinished });
    this.#closed = true;
    this.#released = this.run.release();
    this.#released.catch(() => {}); // waitUntilIdle throws it
  }

  /** Wait until nothing is under way. */
  async waitUntilIdle(): Promise<void> {
    await this.#last;
    await this.#released;
  }

  /** One thing at a time, in the order of asking. */
  #inTurn<T>(act: () => Promise<T>): Promise<T> {
    const mine = this.#last.then(() => {
      if (this.#closed) throw new LocalProtocolError("the client is closed");
      return act();
    });
    this.#last = mine.catch(() => {}); // whoever asked hears of it
    return mine;
  }

  async #exchange(job: Job, learningRate: number): Promise<void> {
    const channel = this.#channel;
    while (!job.isDone) {
      if (!job.isReady) {
        const reply = await channel.receiveWires();
        this.#onWires?.("received", reply.key.phase, reply.wires);
        job.deliver(reply);
        continue;
      }
      for await (const { key, wires } of job.work()) {
        if (wires) {
          this.#onWires?.("sent", key.phase, wires);
          channel.sendWires(key, wires, this.#seed, learningRate);
        } else channel.end(key);
      }
    }
  }

  async #saveRemotely(publish: boolean): Promise<void> {
    const { step } = this.executor;
    const reason = await this.#goingBack(() => this.#channel.save(step, { publish }));
    if (reason) throw new NotSaved("the server's folder", reason);
  }

  /** Restore this part to the step to which the server fell back, and the position in the data. */
  async #goingBack<T>(act: () => Promise<T>): Promise<T> {
    try {
      return await act();
    } catch (error) {
      if (error instanceof StepsLost) {
        this.position = await this.run.goBack(this.executor, error.step);
      }
      throw error;
    }
  }
}

function count(value: number): NdArray {
  return { dtype: "I64", shape: [], data: BigInt64Array.of(BigInt(value)) };
}
