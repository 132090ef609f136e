/**
 * Schedules of a pipelined step: which piece of which task a client runs, one after the other.
 *
 * Several tasks of a step are under way at once, so that client, network and server work at the same
 * time.  A schedule is data; which piece computes what, the executor knows.
 */

/** The tasks of a step that a client has under way at once, if nothing else is said. */
export const IN_FLIGHT = 4;

/**
 * One piece of one task of a step.  `task` is the number of a micro-batch, or that of all of them for
 * the update; `piece` counts the arrivals of wires before it.
 */
export interface Move {
  readonly task: number;
  readonly piece: number;
}

/** A step's pieces in the order in which a client runs them. */
export interface Schedule {
  readonly pieces: number;
  readonly microBatches: number;
  readonly moves: readonly Move[];
}

/**
 * Make the schedule of a step whose micro-batches have so many pieces each.
 *
 * While fewer than `inFlight` tasks are unfinished, the next one begins.  Otherwise the task goes on
 * that has waited longest since it sent something.
 */
export function makeSchedule(pieces: number, microBatches: number, inFlight: number): Schedule {
  const moves: Move[] = [];
  const waiting: Move[] = []; // the next piece of each unfinished task
  for (let begun = 0; begun <= microBatches || waiting.length > 1; ) {
    const isNew = begun <= microBatches && waiting.length < inFlight;
    const move = isNew ? { task: begun++, piece: 0 } : waiting.shift()!;
    const { task, piece } = move;
    const isUpdate = task === microBatches;
    if (isNew || !isUpdate) moves.push(move); // the update ends last, when all others have
    if (isUpdate || piece + 1 < pieces) waiting.push({ task, piece: piece + 1 });
  }
  return { pieces, microBatches, moves };
}

/**
 * Write a schedule as text, such as `F0 F1 B0 U B1`: `F` is a micro-batch's first piece, `B` its last
 * one, `T` the one between them (`T1.`, `T2.`, ... if there are several), and `U` the update.
 */
export function spellSchedule({ pieces, microBatches, moves }: Schedule): string {
  const words = moves.map(({ task, piece }) => {
    if (task === microBatches) return "U";
    if (!piece) return `F${task}`;
    if (piece === pieces - 1) return `B${task}`;
    return pieces === 3 ? `T${task}` : `T${piece}.${task}`;
  });
  return words.join(" ");
}
