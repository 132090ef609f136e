/** What the other side reports of itself, as an error of this side. */

import {
  BatchTooLarge,
  NotFinite,
  NotPermitted,
  RemoteFault,
  ServerBusy,
  SessionLost,
  SharingNotPermitted,
  StaleConnection,
  TaskTooLarge,
  Unauthorized,
  flatten,
} from "../errors.js";
import type { SplitonnxError } from "../errors.js";
import type { MessageOf } from "../messages.js";

/** Return why a state was not written as it should have been, or nothing. */
export function explainUnsaved(answer: MessageOf<"Saved" | "Unsaved">, keep: boolean): string {
  if (answer.type === "Unsaved") return answer.reason || "no reason given";
  return keep && !answer.keep ? "its version cannot keep the best state" : "";
}

/** Return the error that a fault reports, on the connection of this generation. */
export function translateFault(fault: MessageOf<"Fault">, generation: number): SplitonnxError {
  switch (fault.code) {
    case "StaleConnection":
      return new StaleConnection(generation, fault.newest);
    case "ServerBusy":
      return new ServerBusy(fault.reason);
    case "SessionLost":
      return new SessionLost(fault.reason);
    case "NotFinite":
      return new NotFinite(flatten(fault.subject), `${flatten(fault.reason)}, at the server`);
    case "BatchTooLarge":
      return new BatchTooLarge(fault.subject, fault.needed, fault.limit);
    case "TaskTooLarge":
      return new TaskTooLarge(fault.needed, fault.limit);
    case "NotPermitted":
      return new NotPermitted(fault.subject, fault.reason);
    case "SharingNotPermitted":
      return new SharingNotPermitted(fault.subject);
    case "Unauthorized":
      return new Unauthorized("the server", 1008, fault.reason);
    default:
      return new RemoteFault(fault.code, fault.reason);
  }
}
