/** What went out and came in of a client's newest tasks; it sends and receives nothing. */

import { LocalProtocolError, RemoteProtocolError } from "../errors.js";
import { ACCUMULATE, SHARE, STEP_PHASES, TRAIN } from "../manifests.js";
import { describeTask, nameTask } from "../messages.js";
import type { TaskKey, TensorsMessage } from "../messages.js";

/** A message of a task; `number` counts all that the client sent. */
export interface SentMessage {
  readonly message: TensorsMessage;
  readonly content: Uint8Array<ArrayBuffer>;
  readonly number: number;
}

/** A task, with what is sent again on a new connection. */
export interface OpenTask {
  readonly key: TaskKey;
  readonly sent: SentMessage[];
  /** Replies that came, each counted once. */
  received: number;
  /**
   * The reply that comes next on this connection: on a new one all that went out goes out again,
   * and every reply comes again, in order and once.
   */
  due: number;
  /** How many tasks of steps had ended when it began. */
  readonly ended: number;
}

/**
 * A client's open tasks, and its last task of a step, which is kept as the server may not have
 * received all of it: until a reply comes to a task that began after it.
 */
export class SentTasks {
  #open: OpenTask[] = []; // in the order in which they began
  #last: OpenTask | undefined;
  #ended = 0; // counts the tasks of steps
  #done = 0; // micro-batches of the running step
  #sent = 0; // counts messages

  /** The number of open tasks. */
  get count(): number {
    return this.#open.length;
  }

  /** Whether something was sent of a task that is not complete. */
  get isOpen(): boolean {
    return this.#open.some(({ sent }) => sent.length);
  }

  /** How many micro-batches of the step come before the oldest task that is not complete. */
  get microBatch(): number {
    const [oldest] = this.#open;
    if (!oldest) return this.#done;
    return STEP_PHASES.includes(oldest.key.phase) ? oldest.key.microBatch : 0;
  }

  begin({ session, phase, step, microBatch }: TaskKey): void {
    const key = { session, phase, step, microBatch };
    this.#open.push({ key, sent: [], received: 0, due: 0, ended: this.#ended });
  }

  find(key: TaskKey): OpenTask | undefined {
    return this.#open.find((task) => nameTask(task.key) === nameTask(key));
  }

  /**
   * Make the next message of an open task, and record it as `write` writes it.
   *
   * @throws LocalProtocolError: the task is not open.
   */
  add(
    key: TaskKey,
    { seed, learningRate }: Pick<TensorsMessage, "seed" | "learningRate">,
    write: (message: TensorsMessage) => Uint8Array<ArrayBuffer>,
  ): SentMessage {
    const task = this.find(key);
    if (!task) throw new LocalProtocolError(`${describeTask(key)} is not open`);
    const turn = task.sent.length;
    const message = { type: "Tensors", ...task.key, turn, seed, learningRate } as const;
    const sent = { message, content: write(message), number: this.#sent++ };
    task.sent.push(sent);
    return sent;
  }

  /** Close a task that is complete. */
  end(key: TaskKey): void {
    const task = this.find(key);
    this.#open = this.#open.filter((one) => one !== task);
    if (!task || !STEP_PHASES.includes(key.phase)) return;
    this.#last = task;
    this.#ended += 1;
    this.#done = key.phase === ACCUMULATE ? key.microBatch + 1 : 0;
  }

  /** Give up all open tasks, and the micro-batches of the running step. */
  endAll(): void {
    this.#open = [];
    this.#done = 0;
  }

  /** Return the messages of all open tasks in the order in which they were sent, to send them again. */
  repeat(): readonly SentMessage[] {
    for (const task of this.#open) task.due = 0;
    return this.#open.flatMap(({ sent }) => sent).sort((a, b) => a.number - b.number);
  }

  /**
   * Receive a reply of an open task, or of `last`, which is repeated; return the task if it is new.
   *
   * @throws RemoteProtocolError: it belongs to another task, came before, or comes too early.
   */
  takeReply(message: TensorsMessage, last?: OpenTask): OpenTask | undefined {
    const open = last ? [last] : this.#open;
    const task = open.find(({ key }) => nameTask(key) === nameTask(message));
    if (!task) {
      const names = open.map(({ key }) => describeTask(key)).join(", ") || "nothing";
      throw new RemoteProtocolError(`it answered ${describeTask(message)}, open is ${names}`);
    }
    if (message.turn !== task.due) {
      throw new RemoteProtocolError(`it sent message ${message.turn} where ${task.due} was due`);
    }
    task.due += 1;
    if (last || message.turn < task.received) return undefined;
    task.received += 1;
    // after a share, a repeated step is not enough
    const isOfStep = [...STEP_PHASES, SHARE].includes(task.key.phase);
    if (isOfStep && task.ended === this.#ended) this.#last = undefined;
    return task;
  }

  /**
   * Return the last task of a step, if it was kept and comes right before the next one of a client
   * at `step`.  An update is not repeated: the server confirmed it.
   */
  findLast(step: number): OpenTask | undefined {
    const done = this.microBatch;
    const before = done ? [ACCUMULATE, step, done - 1] : [TRAIN, step - 1, 0];
    const { phase, step: own, microBatch } = this.#last?.key ?? {};
    return [phase, own, microBatch].join() === before.join() ? this.#last : undefined;
  }
}
