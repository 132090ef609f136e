/** What the other side reports of itself, as an error of this side. */

import {
  BatchTooLarge,
  NotFinite,
  NotPermitted,
  RemoteFault,
  RemoteProtocolError,
  ServerBusy,
  SessionLost,
  SharingNotPermitted,
  StaleConnection,
  TaskTooLarge,
  Unauthorized,
  flatten,
} from "../errors.js";
import type { SplitonnxError } from "../errors.js";
import type { Message, MessageOf } from "../messages.js";

/**
 * Return why a server did not save its state as it was asked to, or nothing if it did.
 *
 * @throws RemoteProtocolError: its answer belongs to something else.
 */
export function readSaved(asked: MessageOf<"Save">, answer: Message): string {
  if (answer.type !== "Saved" && answer.type !== "Unsaved") {
    throw new RemoteProtocolError(`it sent ${answer.type} where Saved was due`);
  }
  if (answer.step !== asked.step) {
    throw new RemoteProtocolError(`it saved step ${answer.step}, not ${asked.step}`);
  }
  if (answer.type === "Unsaved") return answer.reason || "no reason given";
  return asked.keep && !answer.keep ? "its version cannot keep the best state" : "";
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
