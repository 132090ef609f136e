/** What went out and came in of a task that a client has open; it sends and receives nothing. */

import { RemoteProtocolError } from "../errors.js";
import { ACCUMULATE, STEP_PHASES, TRAIN } from "../manifests.js";
import { describeTask, isSameTask } from "../messages.js";
import type { TaskKey, TensorsMessage } from "../messages.js";

/** A task, with what is sent again on a new connection. */
export interface OpenTask {
  readonly key: TaskKey;
  readonly sent: { message: TensorsMessage; content: Uint8Array<ArrayBuffer> }[];
  /** Replies that came, each counted once. */
  received: number;
  /**
   * The reply that comes next on this connection: on a new one all that went out goes out again,
   * and every reply comes again, in order and once.
   */
  due: number;
}

/** Return how many micro-batches of its step come before a task. */
export function countBefore(task: OpenTask | undefined): number {
  return task && STEP_PHASES.includes(task.key.phase) ? task.key.microBatch : 0;
}

/**
 * Check whether a task comes right before the next one of a client, which is at `step` and has
 * completed `microBatch` micro-batches of it.  An update is not repeated: the server confirmed it.
 */
export function isLast({ phase, step, microBatch }: TaskKey, now: number, done: number): boolean {
  if (!done) return phase === TRAIN && step === now - 1;
  return phase === ACCUMULATE && step === now && microBatch === done - 1;
}

/**
 * Receive a reply of a task.
 *
 * @throws RemoteProtocolError: it belongs to another task, came before, or comes too early.
 */
export function takeDue(task: OpenTask, message: TensorsMessage): void {
  if (!isSameTask(message, task.key)) {
    throw new RemoteProtocolError(
      `it answered ${describeTask(message)}, open is ${describeTask(task.key)}`,
    );
  }
  if (message.turn !== task.due) {
    throw new RemoteProtocolError(`it sent message ${message.turn} where ${task.due} was due`);
  }
  task.due += 1;
}
