/**
 * One party's work: its state, and the tasks it has open, run as the manifest says.
 *
 * The executor feeds stages with state, data, scalars, stash and received wires, and commits a
 * task's outcome to the state all at once.  It knows no network and no neural network: who carries
 * the wires is the caller's business.
 */

import type { Tensor } from "onnxruntime-common";

import type { PartyBundle } from "../bundles.js";
import {
  BundleError,
  LocalProtocolError,
  MissingArray,
  NotFinite,
  RemoteProtocolError,
  quote,
} from "../errors.js";
import type { Sizes } from "../expressions.js";
import { ACCUMULATE, LOSS, STEP_PHASES, TRAIN, UPDATE, findPhase } from "../manifests.js";
import type { PartyManifest, Phase, Stage } from "../manifests.js";
import { describeTask, nameTask } from "../messages.js";
import type { TaskKey } from "../messages.js";
import { checkArray, findNotFinite } from "../tensors.js";
import type { NdArray, NdArrays } from "../tensors.js";
import { checkFinite } from "../wire/validation.js";
import { Dataflow } from "./dataflows.js";
import type { Progress } from "./dataflows.js";
import type { Engine, LoadedStage } from "./engines.js";
import { OpenStep, isPart, makeScalars } from "./steps.js";

interface Task {
  readonly key: TaskKey;
  readonly phase: Phase;
  readonly flow: Dataflow;
  readonly progress: Progress;
  readonly values: Map<string, Tensor>;
  /** What the data and the wires of either direction bind. */
  readonly sizes: Sizes;
  /** The state that a stage reads again later, as it was when it was first read. */
  readonly reread: Map<string, Tensor>;
}

/** What a task begins with, beside its key. */
export interface Beginning {
  readonly data: NdArrays;
  /** Keys the random masks. */
  readonly seed: number;
  readonly learningRate: number;
}

/**
 * Runs one party's stages and keeps its state.
 *
 * `step` is the number of updates committed so far.  One thing at a time: what is called must have
 * ended before the next is.
 */
export class Executor {
  step = 0;
  readonly party: PartyBundle;
  readonly #engine: Engine;
  readonly #state = new Map<string, Tensor>();
  readonly #flows = new Map<string, Dataflow>();
  readonly #loaded = new Map<string, LoadedStage>();
  readonly #tasks = new Map<string, Task>();
  readonly #shared = new Map<string, LoadedStage>(); // by file, as phases share graphs
  readonly #open: OpenStep;

  /** The state is what training starts from. */
  constructor(party: PartyBundle, engine: Engine) {
    this.party = party;
    this.#engine = engine;
    this.#open = new OpenStep(party.manifest);
    this.restore(party.state, 0);
  }

  get manifest(): PartyManifest {
    return this.party.manifest;
  }

  /**
   * Load the stages of a phase now instead of at its first task.
   *
   * @throws ForbiddenGraph, StageFailed: a stage cannot be used.
   */
  async prepare(phase: string): Promise<void> {
    if (this.#flows.has(phase)) return;
    const declared = findPhase(this.manifest, phase);
    for (const stage of declared.stages) {
      const loaded =
        this.#shared.get(stage.graph) ??
        (await this.#engine.load(stage.name, this.party.graphs.get(stage.graph)!));
      this.#shared.set(stage.graph, loaded);
      const own = { ...loaded, outputs: stage.outputs };
      this.#loaded.set(JSON.stringify([phase, stage.name]), own);
    }
    this.#flows.set(phase, new Dataflow(declared, this.manifest.party));
  }

  /**
   * Open a task with this party's data; arrays beyond what the phase declares are ignored.
   *
   * @throws MissingArray, ArrayMismatch, ValueOutOfRange: the data do not fit the phase.
   * @throws LocalProtocolError: the task is open already, or is not the next of its step.
   * @throws UsageError: seed or learning rate are out of the range of their tensors.
   */
  async begin(key: TaskKey, { data, seed, learningRate }: Beginning): Promise<void> {
    const name = nameTask(key);
    if (this.#tasks.has(name)) throw new LocalProtocolError(`${describeTask(key)} is open already`);
    this.#open.checkNext(key, this.step);
    const scalars = makeScalars(key, seed, learningRate);
    await this.prepare(key.phase);
    const flow = this.#flows.get(key.phase)!;
    const phase = findPhase(this.manifest, key.phase);
    const task: Task = {
      key,
      phase,
      flow,
      progress: flow.start(),
      values: new Map(),
      sizes: new Map(),
      reread: new Map(),
    };
    const own = new Map(phase.data.map((spec) => [spec.name, take(data, spec.name)]));
    for (const spec of phase.data) checkArray(own.get(spec.name)!, spec, task.sizes);
    if (isPart(key)) this.#open.begin(key, (array) => this.#engine.fromArray(array));
    this.#supply(task, own);
    this.#supply(task, scalars);
    this.#tasks.set(name, task);
  }

  /**
   * Hand wires from the other party to an open task.
   *
   * @throws RemoteProtocolError: a tensor is not a wire towards this party, or came before.
   * @throws ArrayMismatch, ValueOutOfRange: a tensor is not as its wire declares.
   */
  deliver(key: TaskKey, tensors: NdArrays): void {
    const task = this.#find(key);
    const missing = task.progress.missing;
    const unexpected = [...tensors.keys()].filter((name) => !missing.includes(name));
    if (unexpected.length) {
      throw new RemoteProtocolError(`it sent ${quote(unexpected)}, not expected now`);
    }
    this.#checkWires(task, tensors);
    this.#supply(task, tensors);
  }

  /**
   * Run every stage that can run; after each, yield the wires that can be sent now.
   *
   * Data that travel go with the first group.  After an error the task should be abandoned.
   *
   * @throws StageFailed: an operator failed.
   * @throws NotFinite: the training loss, or what was decoded to train with, is NaN or infinite;
   *   nothing that follows is sent.
   * @throws ArrayMismatch: what was computed or decoded is not as it is declared.
   */
  async *advance(key: TaskKey): AsyncGenerator<NdArrays, void> {
    const task = this.#find(key);
    const hasState = (one: Stage) => !isPart(key) || this.#open.hasState(key, one);
    for (let stage; (stage = task.progress.nextStage(hasState)); ) {
      await this.#run(task, stage);
      const wires = task.progress.nextWires();
      if (wires.length) yield this.#collectWires(task, wires);
    }
    const wires = task.progress.nextWires();
    if (wires.length) yield this.#collectWires(task, wires); // data alone: no stage was ready
  }

  /** Whether every stage of the task ran and every wire was received and handed out. */
  isFinished(key: TaskKey): boolean {
    return this.#find(key).progress.isFinished;
  }

  /**
   * Close a finished task: commit its state all at once, and return the phase's results.
   *
   * A task of the phase `train` counts as one step; one of the phase `accumulate` changes the state
   * only with the one of the phase `update` that ends its step.
   *
   * @throws LocalProtocolError: the task is not finished, or a micro-batch before it is not.
   */
  finish(key: TaskKey): Map<string, NdArray> {
    const { progress, phase, values } = this.#find(key);
    if (!progress.isFinished) throw new LocalProtocolError(`${describeTask(key)} is not finished`);
    const results = new Map(
      phase.results.map((name) => [name, this.#engine.toArray(values.get(name)!)]),
    );
    const changes = new Map(
      [...phase.commits].map(([name, value]) => {
        const tensor = values.get(value);
        if (!tensor) throw new BundleError(`phase '${phase.name}'`, `nothing gives the new '${name}'`);
        return [name, tensor];
      }),
    );
    if (isPart(key)) this.#open.finish(key);
    this.#tasks.delete(nameTask(key));
    if (key.phase === ACCUMULATE) return results;
    const earlier = key.phase === UPDATE ? this.#open.close() : [];
    for (const [name, value] of [...earlier, ...changes]) this.#state.set(name, value);
    if (key.phase === TRAIN || key.phase === UPDATE) this.step += 1;
    return results;
  }

  /**
   * Forget a task, open or not; the state is as it was before it.  Of a step of several micro-batches
   * the whole step is forgotten, with its other open tasks.
   */
  abandon(key: TaskKey): void {
    this.#tasks.delete(nameTask(key));
    if (!isPart(key) || key.step !== this.step) return;
    for (const [name, task] of this.#tasks) if (isPart(task.key)) this.#tasks.delete(name);
    this.#open.reset();
  }

  /** Return the whole state, optimizer's included; the arrays stay as they are. */
  state(): Map<string, NdArray> {
    return new Map([...this.#state].map(([name, value]) => [name, this.#engine.toArray(value)]));
  }

  /** Replace the state by another, as the manifest declares it; open tasks are aborted. */
  restore(tensors: NdArrays, step: number): void {
    this.#tasks.clear();
    this.#open.reset();
    for (const { tensor } of this.manifest.state) {
      this.#state.set(tensor.name, this.#engine.fromArray(tensors.get(tensor.name)!));
    }
    this.step = step;
  }

  /** Release what ONNX Runtime holds. */
  async release(): Promise<void> {
    await this.#engine.release();
  }

  #find(key: TaskKey): Task {
    const task = this.#tasks.get(nameTask(key));
    if (!task) throw new LocalProtocolError(`${describeTask(key)} is not open`);
    return task;
  }

  #supply(task: Task, arrays: NdArrays): void {
    const entries = [...arrays].map(([name, a]) => [name, this.#engine.fromArray(a)] as const);
    this.#keep(task, new Map(entries));
  }

  #keep(task: Task, tensors: ReadonlyMap<string, Tensor>): void {
    for (const [name, tensor] of tensors) {
      if (task.progress.wants(name)) task.values.set(name, tensor);
    }
    if (isPart(task.key)) this.#open.note(task.key, tensors);
    task.progress.arrive(tensors.keys());
  }

  async #run(task: Task, stage: Stage): Promise<void> {
    const readState = (name: string): Tensor | undefined => {
      const own = this.#state.get(name);
      return isPart(task.key) ? this.#open.read(task.key, name, own) : own;
    };
    const feeds = new Map(
      stage.inputs.map(({ name, source }) => {
        let value = source === "state" ? readState(name) : task.values.get(name);
        if (!value) throw new BundleError(`stage '${stage.name}'`, `nothing provides its '${name}'`);
        if (source === "state" && task.flow.reread.has(name)) {
          if (stage.after.length) value = task.reread.get(name) ?? value;
          else if (!task.reread.has(name)) task.reread.set(name, value);
        }
        return [name, value];
      }),
    );
    const loaded = this.#loaded.get(JSON.stringify([task.phase.name, stage.name]))!;
    const outputs = await this.#engine.run(loaded, feeds);
    const loss = STEP_PHASES.includes(task.phase.name) ? outputs.get(LOSS) : undefined;
    if (loss && findNotFinite(this.#engine.toArray(loss)) >= 0) {
      throw new NotFinite(LOSS, `${loss.data} at step ${this.step + 1}`);
    }
    this.#checkDecoded(task, outputs);
    this.#keep(task, outputs);
    this.#drop(task, task.flow.needs.get(stage.name)!);
    if (!isPart(task.key)) return;
    const read = stage.inputs.filter(({ source }) => source === "state").map(({ name }) => name);
    this.#open.release(task.key, read.filter((name) => !task.progress.willRead(name)));
  }

  /** Check what a stage decoded as a received tensor that was not encoded is checked. */
  #checkDecoded(task: Task, outputs: ReadonlyMap<string, Tensor>): void {
    for (const { tensor, receiver } of task.phase.encoded) {
      const decoded = receiver === this.manifest.party ? outputs.get(tensor.name) : undefined;
      if (!decoded) continue;
      const array = this.#engine.toArray(decoded);
      checkArray(array, tensor, task.sizes);
      if (STEP_PHASES.includes(task.phase.name))
        checkFinite(tensor.name, array, `step ${this.step + 1}`);
    }
  }

  #collectWires(task: Task, wires: readonly string[]): NdArrays {
    const arrays = wires.map(
      (name) => [name, this.#engine.toArray(task.values.get(name)!)] as const,
    );
    const collected = new Map(arrays);
    this.#checkWires(task, collected);
    this.#drop(task, wires);
    return collected;
  }

  /** What one wire binds holds for every later one: a gradient has its activation's shape. */
  #checkWires(task: Task, tensors: NdArrays): void {
    for (const { tensor, kind } of task.phase.wires) {
      const array = tensors.get(tensor.name);
      if (array) checkArray(array, tensor, task.sizes, kind === "output");
    }
  }

  #drop(task: Task, names: readonly string[]): void {
    for (const name of task.progress.release(names)) task.values.delete(name);
  }
}

function take(data: NdArrays, name: string): NdArray {
  const array = data.get(name);
  if (!array) throw new MissingArray(name, [...data.keys()]);
  return array;
}
