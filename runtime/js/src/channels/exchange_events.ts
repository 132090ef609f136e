/** What an exchange wants done outside, what its caller has waited for, and its states. */

import type { TaskKey } from "../messages.js";
import type { NdArrays } from "../tensors.js";

/** To be done outside: open a connection, send a message, or close the connection, if there is one. */
export type Effect =
  | { readonly type: "Connect" | "HangUp" }
  | { readonly type: "Transmit"; readonly content: Uint8Array<ArrayBuffer> };

/** Wires of a task. */
export interface TaskWires {
  readonly key: TaskKey;
  readonly wires: NdArrays;
}

/**
 * What the caller has waited for: a welcome to the first connection, or to one that was asked for; the
 * next reply to an open task; the answer to a save, with the reason if it failed; or an error.
 */
export type Outcome =
  | { readonly type: "Greeted" }
  | ({ readonly type: "Replied" } & TaskWires)
  | { readonly type: "SaveAnswered"; readonly reason: string }
  | { readonly type: "Failed"; readonly error: Error };

/**
 * Whether there is a connection, and what may be sent on it.  `closed`: there is none, and none is
 * wanted; `repeating`: the last task's replies come again.
 */
export type State = "closed" | "waiting" | "dialing" | "greeting" | "repeating" | "open";

/** Where a greeting is to lead: to any step that both sides have, or to the client's step. */
export type Aim = "start" | "return" | "resume";
