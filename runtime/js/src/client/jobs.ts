/**
 * The tasks of one step, or a single task: their pieces, run in the order of a schedule.
 *
 * A job sends and receives nothing: it says what is to be sent, and is told what came.
 */

import { listPieces } from "../engine/dataflows.js";
import type { Executor } from "../engine/executors.js";
import { findPhase } from "../manifests.js";
import type { TaskKey } from "../messages.js";
import type { Move } from "../pipelines.js";
import type { NdArrays } from "../tensors.js";

/** A task with the client's data for it. */
export interface TaskData {
  readonly key: TaskKey;
  readonly data: NdArrays;
}

/** Wires of a task. */
export interface TaskWires {
  readonly key: TaskKey;
  readonly tensors: NdArrays;
}

export interface JobOptions {
  readonly executor: Executor;
  /** In the order in which they begin. */
  readonly tasks: readonly TaskData[];
  /** What comes before the last piece of the last task; nothing where there is one task. */
  readonly moves?: readonly Move[];
  /** Keys the random masks. */
  readonly seed: number;
  readonly learningRate: number;
  /** Called with each task that begins. */
  readonly onBegin: (key: TaskKey) => void;
  /** Called with each task that is complete. */
  readonly onEnd: (key: TaskKey) => void;
}

/** Runs tasks to their end; `results` are those of the complete ones, in order. */
export class Job {
  readonly results: NdArrays[] = [];
  readonly #options: JobOptions;
  readonly #moves: Move[];
  #begun = 0;
  #running: AsyncGenerator<NdArrays, void> | undefined;

  constructor(options: JobOptions) {
    this.#options = options;
    const last = { task: options.tasks.length - 1, piece: Infinity };
    this.#moves = [...(options.moves ?? []), last];
  }

  /** Whether all tasks are complete. */
  get isDone(): boolean {
    return !this.#moves.length;
  }

  /**
   * Begin the next task; called first, it checks the data of the first one.
   *
   * @throws DataError, UsageError, LocalProtocolError, StageFailed: see {@link Executor.begin}.
   */
  async begin(): Promise<void> {
    const { executor, tasks, seed, learningRate, onBegin } = this.#options;
    const { key, data } = tasks[this.#begun]!;
    await executor.begin(key, { data, seed, learningRate });
    this.#begun += 1;
    onBegin(key);
  }

  /**
   * Compute on in the order of the schedule until there is something to send, and return it; nothing
   * if wires have to arrive first, or all tasks are complete.
   *
   * @throws StageFailed, NotFinite, ArrayMismatch: see {@link Executor.advance}.
   */
  async work(): Promise<TaskWires | undefined> {
    const { executor, tasks } = this.#options;
    for (let move; (move = this.#moves[0]); ) {
      while (this.#begun <= move.task) await this.begin();
      const { key } = tasks[move.task]!;
      this.#running ??= executor.advance(key);
      const { value, done } = await this.#running.next();
      if (!done) return { key, tensors: value };
      this.#running = undefined;
      if (!this.#isOver(key, move.piece)) return undefined;
      this.#moves.shift();
    }
    return undefined;
  }

  /**
   * Hand over wires of an open task that arrived.
   *
   * @throws RemoteProtocolError, ArrayMismatch, ValueOutOfRange: see {@link Executor.deliver}.
   */
  deliver({ key, tensors }: TaskWires): void {
    this.#options.executor.deliver(key, tensors);
  }

  /** Check whether a piece of a task has run; after its last one the task is complete. */
  #isOver(key: TaskKey, piece: number): boolean {
    const { executor, onEnd } = this.#options;
    const { manifest } = executor;
    const pieces = listPieces(findPhase(manifest, key.phase), manifest.party);
    if (piece && piece >= pieces.length - 1) {
      if (!executor.isFinished(key)) return false;
      this.results.push(executor.finish(key));
      onEnd(key);
      return true;
    }
    const missing = executor.listMissing(key);
    const awaited = pieces.slice(0, piece + 1).flatMap(({ wires }) => wires);
    return !awaited.some((name) => missing.includes(name));
  }
}
