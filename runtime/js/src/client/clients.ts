/**
 * The client: trains, evaluates and predicts with its part of a model and a server's.
 *
 * It brings together data, the executor and the connection; it knows the phases by name and nothing
 * of what the stages compute.
 */

import { loadBundle } from "../bundles.js";
import { Channel } from "../channels/channels.js";
import type { SharingTerms } from "../channels/greetings.js";
import { connect } from "../channels/websockets.js";
import { Engine, giveTensor } from "../engine/engines.js";
import type { TensorLike } from "../engine/engines.js";
import { Executor } from "../engine/executors.js";
import { SessionLost, UsageError } from "../errors.js";
import { EVALUATE, PREDICT, TRAIN, findPhase } from "../manifests.js";
import type { PartyManifest, Phase } from "../manifests.js";
import type { DataPosition } from "../storage/checkpoints.js";
import { explainUnjoinable, findSampleAxis } from "../sample_axes.js";
import { defaultStorage } from "../storage/storages.js";
import { concatenate } from "../tensors.js";
import type { NdArray, NdArrays, TensorSpec } from "../tensors.js";
import {
  checkBatch,
  checkFinite,
  dealInOrder,
  hasBatchStates,
  hasFixedRows,
  openFitting,
  takeBatch,
} from "./datasets.js";
import type { Batch, DataSource, Dataset } from "./datasets.js";
import type { History } from "./histories.js";
import { checkNumbers, chooseDivision, fitSchedule, requirePositive } from "./options.js";
import type {
  ConnectOptions,
  FitOptions,
  Outputs,
  ResolvedFitOptions,
  StepOptions,
} from "./options.js";
import { TaskRunner } from "./runners.js";
import { TrainingLoop } from "./training_loops.js";
import { TrainingRun } from "./training_runs.js";

/**
 * Trains and runs a bundle's client part against a server; made by {@link SplitClient.connect}.
 *
 * A lost connection is made again, and training continues unharmed.  After an error in
 * the middle of a task the client closes, and its own state is what it was before the task.
 * Several things may be asked for at a time: a prediction is made between two steps.
 */
export class SplitClient {
  readonly #runner: TaskRunner;
  readonly #channel: Channel;
  readonly #loop: TrainingLoop;
  readonly #seed: number;
  #isTraining = false;

  private constructor(runner: TaskRunner, channel: Channel, seed: number) {
    this.#runner = runner;
    this.#channel = channel;
    this.#loop = new TrainingLoop(runner);
    this.#seed = seed;
  }

  /**
   * Load the client's part and its saved state, and connect to the server at `url`.
   *
   * @throws BundleError, FormatError, ForbiddenGraph: the part or the state cannot be used.
   * @throws ConnectionLost: the server cannot be reached.
   * @throws BundleMismatch, ServerBusy, Unauthorized, SharingNotPermitted, RemoteFault: the server
   *   refuses.
   */
  static async connect(url: string, options: ConnectOptions): Promise<SplitClient> {
    const { seed = 0, resume = false, token, giveUpAfter, onReconnect, onWires } = options;
    checkNumbers(options);
    const party = await loadBundle(options.bundle ?? locateBundle(url), { token });
    if (!party.manifest.phases.some((phase) => phase.wires.length)) {
      throw new UsageError("this model was left whole and has no part for a server");
    }
    const trusted = options.trusted ?? false;
    const engine = new Engine(options.ort, options.sessionOptions, { trusted });
    const executor = new Executor(party, engine);
    const storage = options.storage ?? defaultStorage();
    const open = async (): Promise<[TrainingRun, Channel]> => {
      const run = await TrainingRun.open(executor, storage, { resume });
      const channel = await Channel.open({
        dial: () => connect(url, options),
        manifest: party.manifest,
        session: run.session,
        token,
        findResumePoint: () => run.findResumePoint(executor.step),
        giveUpAfter,
        isPatient: resume || giveUpAfter !== undefined,
        canShare: options.share ?? false,
        onReconnect,
      });
      await run.takeOver().catch((error: unknown) => {
        channel.close({ forGood: false });
        throw error;
      });
      return [run, channel];
    };
    const [run, channel] = await open().catch((error: unknown) => {
      // Another tab may have trained until this one's greeting ended that, and written meanwhile.
      if (error instanceof SessionLost && resume) return open();
      throw error;
    });
    if (channel.step !== executor.step) {
      run.position = await run.goBack(executor, channel.step).catch(async (error: unknown) => {
        channel.close({ forGood: false });
        await run.release();
        throw error;
      });
    }
    const runner = new TaskRunner({
      executor,
      run,
      channel,
      seed,
      onWires: onWires && ((way, phase, wires) => onWires(way, phase, giveAll(wires))),
    });
    return new SplitClient(runner, channel, seed);
  }

  /** Updates that this part has seen in its life. */
  get steps(): number {
    return this.#runner.executor.step;
  }

  /** The name of this client's session, the same at the server. */
  get session(): string {
    return this.#runner.run.session;
  }

  /** The steps of this run that can be gone back to, newest first. */
  get checkpoints(): readonly number[] {
    return this.#runner.run.findResumePoint(this.steps).kept;
  }

  /** Connections made after the first. */
  get reconnects(): number {
    return this.#channel.reconnects;
  }

  /** Whether and how the server joins what its clients learn. */
  get terms(): SharingTerms {
    return this.#runner.terms;
  }

  /** What the bundle declares: its phases, their data, the model's outputs. */
  get manifest(): PartyManifest {
    return this.#runner.executor.manifest;
  }

  /**
   * Train for some epochs and return what happened.
   *
   * A client that resumes begins at the position in the data where its run was interrupted, and
   * makes the rest of `epochs`.  Where the server lost steps, both sides go back to the newest
   * checkpoint, or to where this fit began, and make them again, as they were.  Where it joins what
   * its clients learn, this one shares its weights as {@link terms} say, and waits for the others.
   *
   * @throws DataError: the data do not fit, or hold NaN; a loss is not finite.
   * @throws StageFailed: a stage cannot be loaded or run.
   * @throws UnfinishedRun: a run was interrupted; resume it, or `restart`.
   * @throws StorageInUse: another client trains with the storage.
   * @throws UsageError: a number is out of its range; another fit of this client runs; a run would
   *   be resumed with other data, batches, seed or schedule.
   * @throws NotSaved: a checkpoint cannot be written.
   * @throws StepsLost: the server lost steps that were made before this fit began, or the same
   *   ones again and again.
   * @throws ConnectionLost, RemoteFault: the server went, or reported an error of its own.
   */
  async fit(data: DataSource, options: FitOptions = {}): Promise<History> {
    const { epochs = 1, batchSize = 32, evalData, checkpointEvery } = options;
    requirePositive({ epochs, batchSize, checkpointEvery });
    const specs = this.#phase(TRAIN).data;
    const division = chooseDivision(options);
    this.#runner.checkDivision(division);
    const training = this.#open(data, specs, batchSize, division.count);
    const rows = Math.ceil(batchSize / division.count);
    const heldOut = evalData && this.#open(evalData, this.#evaluationData(), rows);
    const rates = fitSchedule(options, training, hasFixedRows(specs));
    this.#requireIdle();
    this.#isTraining = true;
    try {
      const resolved = { ...options, epochs, training, heldOut, rates, division };
      const history = await this.#train(resolved, batchSize);
      if (options.save) await this.#runner.run.release();
      return history;
    } catch (error) {
      await this.#runner.run.release(); // another client can resume before close
      throw error;
    } finally {
      this.#isTraining = false;
    }
  }

  async #train(options: ResolvedFitOptions, batchSize: number): Promise<History> {
    const checkpoints = options.checkpointEvery !== undefined;
    if (options.save || checkpoints) { // now rather than after the work
      await this.#runner.beginRun({ checkpoints, restart: options.restart ?? false });
    }
    await this.#runner.prepareTraining(options.division);
    const start: DataPosition = {
      epoch: 0,
      batch: 0,
      batchSize,
      seed: this.#seed,
      shuffle: options.shuffle ?? true,
      samples: options.training.size,
      accumulate: options.division.count, // with whichever option: the results are the same
      schedule: options.rates?.description ?? "",
      unsharedSteps: 0,
      unsharedSamples: 0,
      round: 0,
    };
    return this.#loop.fit(options, this.#runner.run.takePosition(start));
  }

  /**
   * Train on one batch, one optimizer step, and return the phase's results, `loss` among them.
   *
   * @throws UsageError: a fit of this client runs.
   * @throws DataError, StageFailed, ConnectionLost, RemoteFault: see {@link fit}.
   */
  async step(batch: Batch, options: StepOptions = {}): Promise<Outputs> {
    const division = chooseDivision(options);
    const arrays = takeBatch(batch);
    this.#phase(TRAIN);
    checkBatch(arrays, this.#runner.checkDivision(division), this.#kept);
    checkFinite(arrays, "");
    this.#requireIdle();
    const expected = this.steps;
    return giveAll(await this.#loop.step(arrays, division, { rate: options.learningRate, expected }));
  }

  /**
   * Predict, compare with the labels, and return each metric's mean over all samples.
   *
   * @throws UsageError: the bundle has nothing to evaluate with.
   * @throws DataError, StageFailed, ConnectionLost, RemoteFault: see {@link fit}.
   */
  async evaluate(
    data: DataSource,
    { batchSize = 32 }: { batchSize?: number } = {},
  ): Promise<Record<string, number>> {
    requirePositive({ batchSize });
    const dataset = this.#open(data, this.#evaluationData(), batchSize);
    return this.#loop.evaluate(dataset, batchSize);
  }

  /**
   * Run the model and return its outputs, joined along the axis of the samples.  An output that is
   * a single number has one entry for each batch.
   *
   * `data` may be a single tensor where the model has a single input.
   *
   * @throws UsageError: there are several batches, and an output has no axis for the samples or more
   *   than one, or differs in another dimension, too; use {@link predictBatches}.
   * @throws DataError, StageFailed, ConnectionLost, RemoteFault: see {@link fit}.
   */
  async predict(
    data: DataSource | TensorLike,
    { batchSize = 32 }: { batchSize?: number } = {},
  ): Promise<Outputs> {
    const dataset = this.#openPredicting(data, batchSize);
    const specs = this.#phase(PREDICT).data;
    const axes = new Map(
      this.manifest.outputs.map((spec) => [spec.name, findSampleAxis(spec, specs, dataset.size === null)]),
    );
    const unjoinable = this.manifest.outputs.find(({ name }) => axes.get(name) === undefined);
    const parts = new Map<string, NdArray[]>();
    const perform = async (batch: NdArrays) => {
      for (const [name, array] of await this.#loop.predict(batch)) {
        parts.set(name, [...(parts.get(name) ?? []), array]);
      }
    };
    let only: NdArrays | undefined; // computed once it is known that no other follows
    for await (const batch of dataset.batches(dealInOrder(batchSize))) {
      if (!unjoinable) await perform(batch);
      else if (only) throw new UsageError(explainUnjoinable(unjoinable, specs, dataset.size));
      else only = batch;
    }
    if (only) await perform(only);
    return giveAll(new Map([...parts].map(([name, some]) => [name, join(name, some, axes.get(name))])));
  }

  /**
   * Run the model on the data, and yield the outputs of one batch after the other.
   *
   * @throws DataError, StageFailed, ConnectionLost, RemoteFault: see {@link fit}.
   */
  async *predictBatches(
    data: DataSource | TensorLike,
    { batchSize = 32 }: { batchSize?: number } = {},
  ): AsyncGenerator<Outputs, void> {
    const dataset = this.#openPredicting(data, batchSize);
    for await (const batch of dataset.batches(dealInOrder(batchSize))) {
      yield giveAll(await this.#loop.predict(batch));
    }
  }

  #openPredicting(data: DataSource | TensorLike, batchSize: number): Dataset {
    requirePositive({ batchSize });
    const { data: inputs } = this.#phase(PREDICT);
    const source = isTensor(data) ? { [inputs[0]?.name ?? ""]: data } : data;
    return this.#open(source, inputs, batchSize);
  }

  /** Return this part's state, the optimizer's included; it is not to be written to. */
  state(): Outputs {
    return giveAll(this.#runner.executor.state());
  }

  /**
   * Keep the state as the training's outcome, the server its own first and then this part here.
   *
   * @throws NotSaved: one of them could not.
   * @throws StepsLost: the server was lost, and steps with it, and both sides went back; {@link fit}
   *   with `save` makes them again.
   * @throws ConnectionLost, RemoteFault: the server went, or reported an error of its own.
   */
  async save(): Promise<void> {
    try {
      await this.#runner.publish();
    } finally {
      if (!this.#isTraining) await this.#runner.run.release(); // the fit that runs holds it
    }
  }

  /** End the session and release what ONNX Runtime holds; may be called twice. */
  async close(): Promise<void> {
    this.#runner.close();
    await this.#runner.waitUntilIdle();
    await this.#runner.executor.release();
  }

  #requireIdle(): void {
    if (this.#isTraining) throw new UsageError("this client is already training");
  }

  #open(
    source: DataSource,
    specs: readonly TensorSpec[],
    batchSize: number,
    accumulate?: number, // of data to train with
  ): Dataset {
    const isTraining = accumulate !== undefined;
    const more = { isTraining, kept: this.#kept, canFree: !hasBatchStates(this.manifest) };
    return openFitting(source, specs, batchSize, { ...more, accumulate: accumulate ?? 1 });
  }

  /** Names of the tensors that the model keeps itself. */
  get #kept(): string[] {
    const { state, remoteStates } = this.manifest;
    return [...state.map((spec) => spec.tensor.name), ...remoteStates];
  }

  #phase(name: string): Phase {
    const phase = findPhase(this.manifest, name);
    if (!phase.stages.length && !phase.wires.length) {
      throw new UsageError(`this bundle has nothing to ${name} with`);
    }
    return phase;
  }

  #evaluationData(): TensorSpec[] {
    const predicted = this.#phase(PREDICT);
    const measured = this.#phase(EVALUATE).data.filter((s) => !predicted.results.includes(s.name));
    return [...predicted.data, ...measured];
  }
}

/** Return the address under which a server serves its clients' part. */
function locateBundle(url: string): string {
  return new URL("client/", url.replace(/^ws/, "http").replace(/\/?$/, "/")).href;
}

function giveAll(arrays: NdArrays): Outputs {
  return Object.fromEntries([...arrays].map(([name, array]) => [name, giveTensor(array)]));
}

/** Join an output's batches along an axis. */
function join(name: string, parts: readonly NdArray[], axis = 0): NdArray {
  const shapes = parts.map(({ shape }) => shape.filter((_, index) => index !== axis).join());
  if (new Set(shapes).size > 1) {
    throw new UsageError(
      `the batches' outputs '${name}' differ in more than the dimension of the samples; ` +
        "take them one by one with predictBatches",
    );
  }
  return concatenate(parts, axis);
}

function isTensor(data: DataSource | TensorLike): data is TensorLike {
  return "dims" in data && Array.isArray(data.dims);
}
