/**
 * What a client runs for one task, or for one step of several micro-batches, piece by piece.
 *
 * A job decides what runs next and what is sent, and waits for nothing: its caller passes what the
 * server replies.
 */

import type { TaskWires } from "../channels/exchange_events.js";
import type { Executor } from "../engine/executors.js";
import { RemoteProtocolError } from "../errors.js";
import { UPDATE, findPhase } from "../manifests.js";
import { describeTask, nameTask } from "../messages.js";
import type { TaskKey } from "../messages.js";
import { listPieces, makeSchedule, sendsDataAlone } from "../pipelines.js";
import type { Operation } from "../pipelines.js";
import type { NdArrays } from "../tensors.js";

/** A task that is to run, with the client's data. */
export interface PlannedTask {
  readonly key: TaskKey;
  readonly data: NdArrays;
}

export interface JobOptions {
  /** Tasks that are unfinished at a time, at the most. */
  readonly inFlight: number;
  /** Keys the random masks. */
  readonly seed: number;
  readonly learningRate: number;
}

/**
 * The run of one task, or of the tasks of one step: micro-batches, and then the update.
 *
 * `results` has the results of each task that has ended, in order.
 */
export class Job {
  readonly results: NdArrays[] = [];
  readonly #executor: Executor;
  readonly #tasks: readonly PlannedTask[];
  readonly #options: JobOptions;
  readonly #pieces: readonly (readonly (readonly string[])[])[];
  readonly #operations: Operation[];
  readonly #received: readonly Set<string>[];

  constructor(executor: Executor, tasks: readonly PlannedTask[], options: JobOptions) {
    const { manifest } = executor;
    const pieces = tasks.map(({ key }) => {
      return listPieces(findPhase(manifest, key.phase), manifest.party);
    });
    this.#executor = executor;
    this.#tasks = tasks;
    this.#options = options;
    this.#pieces = pieces;
    this.#received = tasks.map(() => new Set());
    const [first, last] = [pieces[0]!, pieces.at(-1)!];
    this.#operations =
      tasks.length === 1
        ? first.map((_, piece) => ({ task: 0, piece }))
        : makeSchedule(first.length, tasks.length - 1, options.inFlight, {
            updatePieces: last.length,
            isUpdateEarly: sendsDataAlone(findPhase(manifest, UPDATE), manifest.party),
          });
  }

  /** Whether every task has ended. */
  get isDone(): boolean {
    return !this.#operations.length;
  }

  /** Whether the next piece can run; otherwise the job waits for replies, or is done. */
  get isReady(): boolean {
    const [next] = this.#operations;
    if (!next) return false;
    const received = this.#received[next.task]!;
    return this.#pieces[next.task]![next.piece]!.every((name) => received.has(name));
  }

  /**
   * Begin the first task, without running anything.
   *
   * @throws DataError, UsageError, LocalProtocolError, StageFailed: see {@link Executor.begin}.
   */
  async begin(): Promise<void> {
    await this.#begin(this.#tasks[0]!);
  }

  /**
   * Run the next piece, and yield what is to be sent as soon as it is computed; after its last piece,
   * yield the task that has ended, without wires.
   *
   * @throws StageFailed, NotFinite, ArrayMismatch: see {@link Executor.advance}.
   */
  async *work(): AsyncGenerator<{ readonly key: TaskKey; readonly wires?: NdArrays }, void> {
    const { task, piece } = this.#operations.shift()!;
    const planned = this.#tasks[task]!;
    const { key } = planned;
    if (task && !piece) await this.#begin(planned);
    for await (const wires of this.#executor.advance(key)) yield { key, wires };
    if (piece + 1 < this.#pieces[task]!.length) return;
    this.results.push(this.#executor.finish(key));
    yield { key };
  }

  /**
   * Pass a reply of the server to its task.
   *
   * @throws RemoteProtocolError, ArrayMismatch, ValueOutOfRange: see {@link Executor.deliver}.
   */
  deliver({ key, wires }: TaskWires): void {
    const task = this.#tasks.findIndex((one) => nameTask(one.key) === nameTask(key));
    if (task < 0) throw new RemoteProtocolError(`it answered ${describeTask(key)}, which is not open`);
    if (!wires.size) throw new RemoteProtocolError("its reply has no tensors");
    this.#executor.deliver(key, wires);
    for (const name of wires.keys()) this.#received[task]!.add(name);
  }

  /** Abort all tasks that have not ended, and of a step also those that have. */
  abandon(): void {
    for (const { key } of this.#tasks) this.#executor.abandon(key);
  }

  async #begin({ key, data }: PlannedTask): Promise<void> {
    const { seed, learningRate } = this.#options;
    await this.#executor.begin(key, { data, seed, learningRate });
  }
}
