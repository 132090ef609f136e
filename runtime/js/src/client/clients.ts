/**
 * The client: trains, evaluates and predicts with its part of a model and a server's.
 *
 * It brings together data, the executor and the connection; it knows the phases by name and nothing
 * of what the stages compute.
 */

import { loadBundle } from "../bundles.js";
import { Link } from "../channels/channels.js";
import { connect } from "../channels/websockets.js";
import { Engine, giveTensor } from "../engine/engines.js";
import type { TensorLike } from "../engine/engines.js";
import { Executor, LOSS } from "../engine/executors.js";
import { SessionLost, StepsLost, UsageError } from "../errors.js";
import { EVALUATE, PREDICT, TRAIN, findPhase } from "../manifests.js";
import type { PartyManifest, Phase } from "../manifests.js";
import type { Position } from "../storage/checkpoints.js";
import { defaultStorage } from "../storage/storages.js";
import { concatenate } from "../tensors.js";
import type { NdArray, NdArrays, TensorSpec } from "../tensors.js";
import { checkBatch, checkFinite, countSamples, openDataset, takeBatch } from "./datasets.js";
import type { Batch, DataSource, Dataset } from "./datasets.js";
import { History } from "./histories.js";
import type { StepRecord } from "./histories.js";
import type { ConnectOptions, FitOptions, FitPlan, LearningRate, Outputs } from "./options.js";
import { Half } from "./runners.js";
import { Journal } from "./training_runs.js";

/**
 * Trains and runs a bundle's client part against a server; made by {@link SplitClient.connect}.
 *
 * A connection that breaks is made again, and training goes on as if it had not.  After an error in
 * the middle of a task the client closes, and its own state is what it was before the task.
 * Several things may be asked for at a time: a prediction is made between two steps.
 */
export class SplitClient {
  readonly #half: Half;
  readonly #link: Link;
  readonly #seed: number;
  #expected = 0; // where a fit that runs left the state

  private constructor(half: Half, link: Link, seed: number) {
    this.#half = half;
    this.#link = link;
    this.#seed = seed;
  }

  /**
   * Load the client's part, take up its state, and connect to the server at `url`.
   *
   * @throws BundleError, FormatError, ForbiddenGraph: the part or the state cannot be used.
   * @throws ConnectionLost: the server cannot be reached.
   * @throws BundleMismatch, ServerBusy, Unauthorized, RemoteFault: the server refuses.
   */
  static async connect(url: string, options: ConnectOptions): Promise<SplitClient> {
    const { seed = 0, resume = false, token, giveUpAfter, onReconnect, onWires } = options;
    if (!Number.isSafeInteger(seed) || seed < 0) {
      throw new UsageError(`the seed must be an integer from 0 to 2^53, not ${seed}`);
    }
    const party = await loadBundle(options.bundle ?? locateBundle(url), { token });
    if (!party.manifest.phases.some((phase) => phase.wires.length)) {
      throw new UsageError("this model was left whole and has no part for a server");
    }
    const trusted = options.trusted ?? false;
    const engine = new Engine(options.ort, options.sessionOptions, { trusted });
    const executor = new Executor(party, engine);
    const storage = options.storage ?? defaultStorage();
    const open = async (): Promise<[Journal, Link]> => {
      const journal = await Journal.open(executor, storage, { resume });
      const link = await Link.open({
        dial: () => connect(url, options),
        manifest: party.manifest,
        session: journal.session,
        token,
        stand: () => journal.stand(executor.step),
        giveUpAfter,
        isPatient: resume || giveUpAfter !== undefined,
        onReconnect,
      });
      await journal.takeOver().catch((error: unknown) => {
        link.close({ forGood: false });
        throw error;
      });
      return [journal, link];
    };
    const [journal, link] = await open().catch((error: unknown) => {
      // Another tab may have trained until this one's greeting ended that, and written meanwhile.
      if (error instanceof SessionLost && resume) return open();
      throw error;
    });
    if (link.step !== executor.step) journal.position = await journal.goBack(executor, link.step);
    const half = new Half({
      executor,
      journal,
      link,
      seed,
      onWires: onWires && ((way, phase, wires) => onWires(way, phase, giveAll(wires))),
    });
    return new SplitClient(half, link, seed);
  }

  /** Updates that this part has seen in its life. */
  get steps(): number {
    return this.#half.executor.step;
  }

  /** The name of this client's session, the same at the server. */
  get session(): string {
    return this.#half.journal.session;
  }

  /** The steps of this run that can be gone back to, newest first. */
  get checkpoints(): readonly number[] {
    return this.#half.journal.stand(this.steps).kept;
  }

  /** Connections made after the first. */
  get reconnects(): number {
    return this.#link.reconnects;
  }

  /** What the bundle declares: its phases, their data, the model's outputs. */
  get manifest(): PartyManifest {
    return this.#half.executor.manifest;
  }

  /**
   * Train for some epochs and return what happened.
   *
   * A client that resumes begins at the place in the data where its run was broken off, and makes
   * the rest of `epochs`.  Where the server lost steps, both sides go back to the newest
   * checkpoint, or to where this fit began, and make them again, as they were.
   *
   * @throws DataError: the data do not fit, or hold NaN; a loss is not finite.
   * @throws StageFailed: a stage cannot be loaded or run.
   * @throws UnfinishedRun: a run was broken off; resume it, or `restart`.
   * @throws StorageInUse: another client trains with the storage.
   * @throws UsageError: a run would be resumed with other data, batches or seed.
   * @throws NotSaved: a checkpoint cannot be written.
   * @throws StepsLost: the server lost steps that were made before this fit began, or the same
   *   ones again and again.
   * @throws ConnectionLost, RemoteFault: the server went, or reported an error of its own.
   */
  async fit(data: DataSource, options: FitOptions = {}): Promise<History> {
    const { epochs = 1, batchSize = 32, shuffle = true, evalData, checkpointEvery } = options;
    requirePositive({ epochs, batchSize });
    const training = openDataset(data);
    training.check(this.#phase(TRAIN).data);
    const heldOut = evalData && openDataset(evalData);
    heldOut?.check(this.#evaluationData());
    const { executor, journal } = this.#half;
    if (options.save) await journal.hold(); // now rather than after the work
    if (checkpointEvery !== undefined) {
      requirePositive({ checkpointEvery });
      await journal.beginRun({ restart: options.restart ?? false });
    }
    await executor.prepare(TRAIN);
    const start: Position = {
      epoch: 0,
      batch: 0,
      batchSize,
      seed: this.#seed,
      shuffle,
      samples: training.size,
    };
    const plan = { ...options, epochs, training, heldOut };
    return this.#carryOut(plan, journal.takePosition(start));
  }

  /**
   * Take one optimizer step on one batch and return the phase's results, `loss` among them.
   *
   * @throws DataError, StageFailed, ConnectionLost, RemoteFault: see {@link fit}.
   */
  async step(
    batch: Batch,
    { learningRate }: { learningRate?: LearningRate } = {},
  ): Promise<Outputs> {
    const arrays = takeBatch(batch);
    checkBatch(arrays, this.#phase(TRAIN).data);
    checkFinite(arrays, "");
    return giveAll(await this.#train(arrays, learningRate));
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
    const dataset = openDataset(data);
    dataset.check(this.#evaluationData());
    return this.#evaluate(dataset, batchSize);
  }

  /**
   * Run the model and return its outputs, the samples along the first dimension.
   *
   * `data` may be a single tensor where the model has a single input.
   *
   * @throws DataError, StageFailed, ConnectionLost, RemoteFault: see {@link fit}.
   */
  async predict(
    data: DataSource | TensorLike,
    { batchSize = 32 }: { batchSize?: number } = {},
  ): Promise<Outputs> {
    requirePositive({ batchSize });
    const { data: inputs } = this.#phase(PREDICT);
    const dataset = openDataset(isTensor(data) ? { [inputs[0]?.name ?? ""]: data } : data);
    dataset.check(inputs);
    const parts = new Map<string, NdArray[]>();
    for await (const batch of dataset.batches(this.#inOrder(batchSize))) {
      for (const [name, array] of await this.#run(PREDICT, batch)) {
        parts.set(name, [...(parts.get(name) ?? []), array]);
      }
    }
    return giveAll(new Map([...parts].map(([name, arrays]) => [name, concatenate(arrays)])));
  }

  /** Return this part's state, the optimizer's included; it is not to be written to. */
  state(): Outputs {
    return giveAll(this.#half.executor.state());
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
    await this.#half.publish();
  }

  /** Say good-bye to the server and let go of what ONNX Runtime holds; may be called twice. */
  async close(): Promise<void> {
    this.#half.close();
    await this.#half.settle();
    await this.#half.executor.release();
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

  async #carryOut(plan: FitPlan, start: Position): Promise<History> {
    const history = new History();
    const first = this.steps;
    const returns = new Returns(first);
    let place = start;
    for (;;) {
      this.#expected = this.steps;
      try {
        while (place.epoch < plan.epochs && !plan.signal?.aborted) {
          place = await this.#trainEpoch(plan, place, history);
        }
        this.#checkCourse();
        this.#half.place = place;
        if (plan.save) await this.#half.publish();
        return history;
      } catch (error) {
        if (!(error instanceof StepsLost)) throw error;
        returns.count(error, history.steps.at(-1)?.step ?? first);
        const kept = this.#half.place;
        if (error.step < first || (error.step > first && !kept)) throw error;
        place = kept ?? start;
        history.forget(error.step, place.epoch);
      }
    }
  }

  /** Train from a place to the end of its epoch and evaluate; return the next place. */
  async #trainEpoch(plan: FitPlan, place: Position, history: History): Promise<Position> {
    const { data } = this.#phase(TRAIN);
    const dropLast = data.some((spec) => typeof spec.shape[0] === "number");
    let [number, skipped] = [0, place.batch];
    for await (const batch of plan.training.batches({ ...place, dropLast })) {
      if (number++ < skipped) continue;
      place = { ...place, batch: place.batch + 1 };
      const record = await this.#recordStep(plan, batch, place);
      history.steps.push(record);
      await plan.onStep?.(record);
      this.#checkCourse();
      if (plan.checkpointEvery && record.step % plan.checkpointEvery === 0) {
        await this.#half.checkpoint(place, plan.whenUnsaved ?? "stop");
      }
      if (plan.signal?.aborted) return place;
    }
    if (plan.heldOut) await this.#recordEvaluation(plan, plan.heldOut, place, history);
    return { ...place, epoch: place.epoch + 1, batch: 0 };
  }

  async #recordStep(plan: FitPlan, batch: NdArrays, place: Position): Promise<StepRecord> {
    const [up, down] = this.#half.traffic;
    const begun = performance.now();
    const results = await this.#train(batch, plan.learningRate, this.#expected);
    this.#expected = this.steps;
    const seconds = (performance.now() - begun) / 1000;
    const [sent, received] = this.#half.traffic;
    const scalars = [...results].filter(([, array]) => !array.shape.length);
    const numbers = scalars.map(([name, { data }]) => [name, Number(data[0])]);
    const { [LOSS]: loss = NaN, ...metrics } = Object.fromEntries(numbers);
    return {
      step: this.steps,
      epoch: place.epoch,
      batch: place.batch,
      loss,
      metrics,
      samples: countSamples(batch, this.#phase(TRAIN).data),
      seconds,
      bytesUp: sent - up,
      bytesDown: received - down,
    };
  }

  async #recordEvaluation(
    plan: FitPlan,
    dataset: Dataset,
    { epoch, batchSize }: Position,
    history: History,
  ): Promise<void> {
    const begun = performance.now();
    const metrics = await this.#evaluate(dataset, batchSize);
    const evaluation = { epoch, metrics, seconds: (performance.now() - begun) / 1000 };
    history.evaluations.push(evaluation);
    await plan.onEpoch?.(evaluation);
  }

  async #evaluate(dataset: Dataset, batchSize: number): Promise<Record<string, number>> {
    const totals = new Map<string, number>();
    let samples = 0;
    for await (const batch of dataset.batches(this.#inOrder(batchSize))) {
      const outputs = await this.#run(PREDICT, batch);
      const size = countSamples(batch, this.#phase(PREDICT).data);
      for (const [name, { data }] of await this.#run(EVALUATE, new Map([...batch, ...outputs]))) {
        totals.set(name, (totals.get(name) ?? 0) + Number(data[0]) * size);
      }
      samples += size;
    }
    return Object.fromEntries([...totals].map(([name, total]) => [name, total / samples]));
  }

  #inOrder(batchSize: number) {
    return { batchSize, seed: this.#seed, epoch: 0, shuffle: false, dropLast: false };
  }

  /** Another task, made between two steps of a fit, may have found that steps are lost. */
  #checkCourse(): void {
    if (this.steps !== this.#expected) throw new StepsLost(this.steps);
  }

  async #train(
    batch: NdArrays,
    rate?: LearningRate,
    expected = this.steps,
  ): Promise<NdArrays> {
    const chosen = typeof rate === "function" ? rate(expected) : rate;
    const learningRate = chosen ?? this.manifest.learningRate;
    return this.#half.perform(TRAIN, batch, { learningRate, expected });
  }

  async #run(phase: string, data: NdArrays): Promise<NdArrays> {
    return this.#half.perform(phase, data, { learningRate: this.manifest.learningRate });
  }
}

/** The server gives its clients' part away at its own address. */
function locateBundle(url: string): string {
  return new URL("client/", url.replace(/^ws/, "http").replace(/\/?$/, "/")).href;
}

function giveAll(arrays: NdArrays): Outputs {
  return Object.fromEntries([...arrays].map(([name, array]) => [name, giveTensor(array)]));
}

function isTensor(data: DataSource | TensorLike): data is TensorLike {
  return "dims" in data && Array.isArray(data.dims);
}
