/**
 * The order in which a client runs the pieces of a step's micro-batches, as data with a text form.
 *
 * A *piece* of a task is what a client can run between two replies.  While a micro-batch is at the
 * server, the client runs pieces of others, so that both compute at once; the order never changes a
 * result.  `splitonnx/pipelines.py` is the twin, and says more.
 */

import type { Phase } from "./manifests.js";

/** Tasks of a step that are unfinished at a time: one at each side, and one on its way. */
export const USUAL_IN_FLIGHT = 3;

/** How a step's batch is divided, and how many of its tasks are unfinished at a time, at the most. */
export interface StepDivision {
  readonly count: number;
  readonly inFlight: number;
}

/** One piece of one task of a step; `task` counts the micro-batches, and the update is last. */
export interface Operation {
  readonly task: number;
  readonly piece: number;
}

/**
 * Make the schedule of a step in which at most `inFlight` tasks are unfinished at a time.
 *
 * A task begins as soon as that permits it; the update, when all messages of micro-batches were sent.
 * Otherwise, the next piece runs of the task whose message was sent first, as the server answers in
 * that order.  `isUpdateEarly` means that the server can be asked for the update while the client
 * still computes gradients, as it needs nothing of them.
 */
export function makeSchedule(
  pieces: number,
  microBatches: number,
  inFlight: number,
  { updatePieces = 2, isUpdateEarly = true } = {},
): Operation[] {
  const operations: Operation[] = [];
  const waiting: Operation[] = []; // the next piece of each unfinished task
  for (let begun = 0; begun <= microBatches || waiting.length; ) {
    const isSent = waiting.every(({ piece }) => isUpdateEarly && piece === pieces - 1);
    const mayBegin = begun < microBatches || (begun === microBatches && isSent);
    const begins = mayBegin && waiting.length < inFlight;
    const { task, piece } = begins ? { task: begun++, piece: 0 } : waiting.shift()!;
    operations.push({ task, piece });
    const count = task === microBatches ? updatePieces : pieces;
    if (piece + 1 < count) waiting.push({ task, piece: piece + 1 });
  }
  return operations;
}

/**
 * Write a schedule as text: `F3` is the first piece of micro-batch 3, `B3` its last one, and `T3` a
 * piece between them (`T1.3` and `T2.3` if there are several); `U` begins the update, and `E` ends it.
 */
export function spellSchedule(operations: readonly Operation[]): string {
  const last = Math.max(...operations.map(({ task }) => task));
  const words = operations.map(({ task, piece }) => {
    const count = operations.filter((one) => one.task === task).length;
    if (!piece) return task === last ? "U" : `F${task}`;
    if (piece === count - 1) return task === last ? "E" : `B${task}`;
    return count === 3 ? `T${task}` : `T${piece}.${task}`;
  });
  return words.join(" ");
}

/** Find the received wires behind each stage of a party's phase, by its name, and behind each value. */
export function traceWires(phase: Phase, party: string): {
  readonly stages: ReadonlyMap<string, ReadonlySet<string>>;
  readonly values: ReadonlyMap<string, ReadonlySet<string>>;
} {
  const received = phase.wires.filter(({ receiver }) => receiver === party);
  const values = new Map(received.map(({ tensor: { name } }) => [name, new Set([name])]));
  const stages = new Map<string, ReadonlySet<string>>();
  for (const { name, inputs, outputs, after } of phase.stages) {
    const read = inputs.filter(({ source }) => source !== "state").map((input) => input.name);
    const needed = new Set([...read, ...after].flatMap((one) => [...(values.get(one) ?? [])]));
    stages.set(name, needed);
    for (const output of outputs) values.set(output, needed);
  }
  return { stages, values };
}

/**
 * Return, for each piece of a party's tasks of a phase, the received wires that it needs.
 *
 * The first piece needs none.  What no stage needs, such as the loss, is needed to end a task, and
 * so by the last piece.
 */
export function listPieces(phase: Phase, party: string): readonly (readonly string[])[] {
  const { stages } = traceWires(phase, party);
  const pieces: string[][] = [[]];
  const findNew = (wires: Iterable<string>) => {
    return [...wires].filter((name) => !pieces.some((piece) => piece.includes(name)));
  };
  for (const needed of stages.values()) {
    const more = findNew(needed);
    if (more.length) pieces.push(more);
  }
  const received = phase.wires.filter(({ receiver }) => receiver === party);
  const unread = findNew(received.map(({ tensor }) => tensor.name));
  if (unread.length && pieces.length === 1) pieces.push(unread);
  else pieces.at(-1)!.push(...unread);
  return pieces;
}

/** Check whether a party sends nothing in a phase that its stages compute. */
export function sendsDataAlone(phase: Phase, party: string): boolean {
  const sent = phase.wires.filter(({ sender }) => sender === party);
  return sent.every(({ tensor }) => phase.data.some(({ name }) => name === tensor.name));
}
