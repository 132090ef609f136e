/** What went out and came in of a client's newest tasks; it sends and receives nothing. */

import { RemoteProtocolError } from "../errors.js";
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
  readonly #open = new Map<string, OpenTask>(); // by name, in the order in which they began
  readonly #echoed = new Map<string, OpenTask>(); // ended, while replies come once more
  #last: OpenTask | undefined;
  #ended = 0; // counts the tasks of steps
  #done = 0; // micro-batches of the running step
  #sent = 0; // counts messages

  /** The number of open tasks. */
  get count(): number {
    return this.#open.size;
  }

  /** How many micro-batches of the step come before the oldest task that is not complete. */
  get microBatch(): number {
    const [oldest] = this.#open.values();
    if (!oldest) return this.#done;
    return STEP_PHASES.includes(oldest.key.phase) ? oldest.key.microBatch : 0;
  }

  /** Make the next message of a task, and keep it as `write` writes it; the first opens the task. */
  record(
    { session, phase, step, microBatch }: TaskKey,
    { seed, learningRate }: Pick<TensorsMessage, "seed" | "learningRate">,
    write: (message: TensorsMessage) => Uint8Array<ArrayBuffer>,
  ): SentMessage {
    const key = { session, phase, step, microBatch };
    const name = nameTask(key);
    const task = this.#open.get(name) ?? { key, sent: [], received: 0, due: 0, ended: this.#ended };
    const turn = task.sent.length;
    const message = { type: "Tensors", ...key, turn, seed, learningRate } as const;
    const sent = { message, content: write(message), number: this.#sent++ };
    task.sent.push(sent);
    this.#open.set(name, task);
    return sent;
  }

  /** Close a task that is complete; do nothing if it is not open. */
  end(key: TaskKey): void {
    const name = nameTask(key);
    const task = this.#open.get(name);
    if (!task) return;
    this.#open.delete(name);
    if (task.due < task.received) this.#echoed.set(name, task);
    if (!STEP_PHASES.includes(key.phase)) return;
    this.#last = task;
    this.#ended += 1;
    this.#done = key.phase === ACCUMULATE ? key.microBatch + 1 : 0;
  }

  /** Give up all open tasks, and the micro-batches of the running step. */
  endAll(): void {
    for (const { key } of [...this.#open.values()]) this.end(key);
    this.#done = 0;
  }

  /** Record that a new connection was opened, on which no reply comes again so far. */
  beginConnection(): void {
    this.#echoed.clear();
    for (const task of this.#open.values()) task.due = task.received;
  }

  /**
   * Return the messages of all open tasks in the order in which they were sent, to send them again;
   * the server may answer each again, from its first reply on.
   */
  repeat(): readonly SentMessage[] {
    const tasks = [...this.#open.values()];
    for (const task of tasks) task.due = 0;
    return tasks.flatMap(({ sent }) => sent).sort((a, b) => a.number - b.number);
  }

  /**
   * Receive a reply of an open task, or of one that ended after its messages were sent again; return
   * the task if the reply is new.
   *
   * @throws RemoteProtocolError: the task is not open, or the reply is out of order.
   */
  takeReply(message: TensorsMessage): OpenTask | undefined {
    const name = nameTask(message);
    const echoed = this.#echoed.get(name);
    const task = echoed && echoed.due < echoed.received ? echoed : this.#open.get(name);
    if (!task) {
      const open = [...this.#open.values()].map(({ key }) => describeTask(key));
      throw new RemoteProtocolError(
        `it answered ${describeTask(message)}, open is ${open.join(", ") || "no task"}`,
      );
    }
    if (!takeDue(task, message)) return undefined;
    // after a share, a repeated step is not enough
    const isOfStep = [...STEP_PHASES, SHARE].includes(message.phase);
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

/**
 * Receive a reply of a task; return whether it did not come before.
 *
 * @throws RemoteProtocolError: it belongs to another task, or is out of order.
 */
export function takeDue(task: OpenTask, message: TensorsMessage): boolean {
  if (nameTask(message) !== nameTask(task.key)) {
    throw new RemoteProtocolError(
      `it answered ${describeTask(message)}, open is ${describeTask(task.key)}`,
    );
  }
  if (message.turn !== task.due) {
    throw new RemoteProtocolError(`it sent message ${message.turn} where ${task.due} was due`);
  }
  task.due += 1;
  if (message.turn !== task.received) return false;
  task.received += 1;
  return true;
}
