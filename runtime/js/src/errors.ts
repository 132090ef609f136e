/**
 * What can go wrong, as a tree: catch {@link SplitonnxError} for all of it.
 *
 * Facts are properties, the message is the sentence.  Names are those of the Python side, and they
 * are what a fault on the wire is called by.
 */

const LONGEST = 300; // characters of what others wrote

/** Convert text from elsewhere so that it fits a sentence: one printable line of 300 characters. */
export function flatten(text: string): string {
  const line = text.slice(0, LONGEST).replace(/(?! )[\p{C}\p{Z}]/gu, "?");
  return text.length > LONGEST ? `${line}...` : line;
}

// What one party sends to the other: a tensor of the model, or a gradient.
const SENT = /^(.+)@(?:(server|client)|(?:server|client)_grad)(?:#\w+)?$/s;

/**
 * Write a tensor's name for a message: in quotes, as the model has it.
 *
 * What one party sends to the other has a name of splitonnx's own, such as `h@server`.
 */
export function nameTensor(name: string): string {
  const sent = SENT.exec(name);
  if (!sent) return `'${flatten(name)}'`;
  const known = `'${flatten(sent[1]!)}'`;
  return sent[2] ? `${known} (sent to the ${sent[2]})` : `the gradient of ${known}`;
}

/** List names in quotes. */
export function quote(names: Iterable<string>): string {
  return [...names].map((name) => `'${flatten(name)}'`).join(", ");
}

/** Root of the tree. */
export class SplitonnxError extends Error {
  override name = "SplitonnxError";
}

/** Options or arguments that contradict each other or are out of range. */
export class UsageError extends SplitonnxError {
  override name = "UsageError";
}

/** The data do not fit the model. */
export class DataError extends SplitonnxError {
  override name = "DataError";
}

/** The data lack an array that the model needs. */
export class MissingArray extends DataError {
  override name = "MissingArray";
  constructor(readonly array: string, readonly present: readonly string[]) {
    super(`the data have no array '${array}'; they hold ${quote(present) || "none"}`);
  }
}

/** The data hold an array for a tensor that the model keeps itself. */
export class KeptArray extends DataError {
  override name = "KeptArray";
  constructor(readonly array: string) {
    super(
      `the data have an array '${array}', but the model keeps this tensor itself, from step to ` +
        "step, so its values would not be read; leave it out of the data (as --state, it begins " +
        "with the initializer of this name in the model's file, if there is one)",
    );
  }
}

/** An array, or a tensor on the wire, differs from its declaration in element type or shape. */
export class ArrayMismatch extends DataError {
  override name = "ArrayMismatch";
  constructor(readonly array: string, readonly expected: string, readonly actual: string) {
    super(`${nameTensor(array)} should be ${expected}, but is ${actual}`);
  }
}

/** An integer array, labels as a rule, holds a value outside its declared range. */
export class ValueOutOfRange extends DataError {
  override name = "ValueOutOfRange";
  constructor(
    readonly array: string,
    readonly value: number | bigint,
    readonly lower: number,
    readonly upper: number,
    readonly other?: number,
  ) {
    const more = other === undefined ? "" : `, and ${other}`;
    super(`${nameTensor(array)} holds ${value}; allowed are ${lower} to ${upper - 1}${more}`);
  }
}

/** A message's tensor has more rows than the server accepts; nothing was computed with it. */
export class BatchTooLarge extends DataError {
  override name = "BatchTooLarge";
  constructor(readonly array: string, readonly rows: number, readonly limit: number) {
    super(
      `${nameTensor(array)} has ${rows} rows, over the server's limit of ${limit}; use a smaller ` +
        "batchSize, or serve with a larger --max-batch",
    );
  }
}

/** A task would need more memory than the server allows all tasks; it was not begun. */
export class TaskTooLarge extends DataError {
  override name = "TaskTooLarge";
  constructor(readonly needed: number, readonly limit: number) {
    super(
      `the task needs ${(needed / 2 ** 20).toFixed(0)} MiB of memory by the server's estimate, ` +
        `over its limit of ${(limit / 2 ** 20).toFixed(0)} MiB; use a smaller batchSize, or serve ` +
        "with a larger --max-task-bytes",
    );
  }
}

/** A tensor holds NaN or infinity. */
export class NotFinite extends DataError {
  override name = "NotFinite";
  constructor(readonly array: string, readonly where: string) {
    super(`${nameTensor(array)} holds NaN or infinity (${where}); nothing was updated with it`);
  }
}

/** A gradient is larger than the limit that was set against poisoned ones. */
export class NormTooLarge extends DataError {
  override name = "NormTooLarge";
  constructor(readonly array: string, readonly norm: number, readonly limit: number) {
    super(
      `${nameTensor(array)} has the norm ${norm.toPrecision(6)}, over the limit of ${limit}; ` +
        "nothing was updated with it",
    );
  }
}

/** The data themselves cannot be taken as arrays. */
export class UnusableData extends DataError {
  override name = "UnusableData";
}

/** A bundle is missing, incomplete, altered, or of another kind. */
export class BundleError extends SplitonnxError {
  override name = "BundleError";
  constructor(readonly source: string, readonly reason: string) {
    super(`${flatten(source)}: ${flatten(reason)}`);
  }
}

/** A checkpoint cannot be written, here or at the server. */
export class NotSaved extends SplitonnxError {
  override name = "NotSaved";
  constructor(readonly place: string, readonly reason: string) {
    super(
      `${place} cannot be written: ${flatten(reason)}; what was saved before it is kept, but ` +
        "training since then is not saved",
    );
  }
}

/** Another client trains with the storage. */
export class StorageInUse extends SplitonnxError {
  override name = "StorageInUse";
  constructor(readonly holder: string) {
    super(
      `${flatten(holder)} trains with this storage; close that one first, or connect with ` +
        "resume: true to take its training over",
    );
  }
}

/** A stage's graph is malformed, or holds what no bundle does; ONNX Runtime never saw it. */
export class ForbiddenGraph extends SplitonnxError {
  override name = "ForbiddenGraph";
  constructor(readonly stage: string, readonly subject: string, readonly reason: string) {
    super(
      `the graph of stage '${flatten(stage)}' is not run, ${flatten(subject)}: ` +
        `${flatten(reason)}; take a bundle as \`splitonnx cut\` wrote it`,
    );
  }
}

/** Bytes that should be tensors in the safetensors layout, or JSON of ours, are not. */
export class FormatError extends SplitonnxError {
  override name = "FormatError";
  constructor(readonly subject: string, readonly reason: string) {
    super(`${flatten(subject)}: ${flatten(reason)}`);
  }
}

/** Training was interrupted in the storage, and another run is about to begin. */
export class UnfinishedRun extends SplitonnxError {
  override name = "UnfinishedRun";
  constructor(readonly step: number) {
    super(
      `training was interrupted at step ${step}; connect with resume: true to continue, or give that ` +
        "run up with fit's restart: true",
    );
  }
}

/** ONNX Runtime could not load or run a stage. */
export class StageFailed extends SplitonnxError {
  override name = "StageFailed";
  constructor(readonly stage: string, readonly reason: string) {
    super(`stage '${flatten(stage)}' failed: ${reason}`);
  }
}

/** The bundle needs another ONNX Runtime than the one at hand. */
export class WrongRuntime extends SplitonnxError {
  override name = "WrongRuntime";
}

/** Root of what can go wrong between two parties. */
export class ProtocolError extends SplitonnxError {
  override name = "ProtocolError";
}

/** This side would do what the protocol does not allow now. */
export class LocalProtocolError extends ProtocolError {
  override name = "LocalProtocolError";
  constructor(readonly reason: string) {
    super(`not allowed now: ${reason}`);
  }
}

/** The other side sent what the protocol does not allow. */
export class RemoteProtocolError extends ProtocolError {
  override name = "RemoteProtocolError";
  constructor(readonly reason: string) {
    super(`the other side broke the protocol: ${flatten(reason)}`);
  }
}

/** The two sides were not cut together, or are at different steps. */
export class BundleMismatch extends ProtocolError {
  override name = "BundleMismatch";
  constructor(readonly subject: string, readonly local: string, readonly remote: string) {
    super(
      `client and server do not belong together: ${flatten(subject)} is ${local} here and ` +
        `${flatten(remote)} there; use the two folders of one bundle`,
    );
  }
}

/** The server has as many clients or sessions as it accepts. */
export class ServerBusy extends ProtocolError {
  override name = "ServerBusy";
  constructor(readonly limit: string) {
    super(`the server is full (${flatten(limit)}); try again later`);
  }
}

/** A newer connection has taken the session over; `newest` is its generation. */
export class StaleConnection extends ProtocolError {
  override name = "StaleConnection";
  constructor(readonly generation: number, readonly newest: number) {
    super(
      `connection ${generation} of this session was replaced by connection ${newest}; two ` +
        "clients must not train one session",
    );
  }
}

/** The server lost steps, and both sides went back to `step`: continue from there. */
export class StepsLost extends ProtocolError {
  override name = "StepsLost";
  constructor(readonly step: number) {
    super(
      `the server lost its newest steps, and both sides went back to step ${step}; give it the ` +
        "batches again from there",
    );
  }
}

/** The server lost the micro-batches of the running step, which begins again at its first. */
export class StepRestarted extends ProtocolError {
  override name = "StepRestarted";
  constructor(readonly step: number) {
    super(
      `the server lost the micro-batches of step ${step}; give them to it again, from the first one`,
    );
  }
}

/** The other side reported an error of its own; `code` is that error's name. */
export class RemoteFault extends ProtocolError {
  override name = "RemoteFault";
  constructor(readonly code: string, readonly reason: string) {
    super(`the other side reported ${flatten(code)}: ${flatten(reason)}`);
  }
}

/** The server does not have the session any more, or none of the steps that are kept here. */
export class SessionLost extends RemoteFault {
  override name = "SessionLost";
  constructor(reason: string) {
    super("SessionLost", reason);
  }
}

/**
 * The connection could not be made, broke, or fell silent for too long: worth trying again.
 *
 * `code` is the websocket's closing code (1012: the server restarts, 1013: it is full, 4001:
 * another client has the session now).
 */
export class ConnectionLost extends ProtocolError {
  override name = "ConnectionLost";
  constructor(readonly peer: string, readonly reason: string, readonly code?: number) {
    super(`connection to ${peer} lost: ${flatten(reason)}`);
  }
}

/** A message is over its receiver's limit: sending it again does not help. */
export class MessageTooLarge extends ProtocolError {
  override name = "MessageTooLarge";
  constructor(readonly peer: string, readonly isOutgoing: boolean, readonly reason: string) {
    super(
      isOutgoing
        ? `${peer} takes no message as large as this side's (${flatten(reason)}); make the batch ` +
            "smaller, or serve with a larger --max-message-bytes"
        : `${peer} sent a message larger than this side takes (${flatten(reason)}); make the ` +
            "batch smaller",
    );
  }
}

/** The token lacks the role that an action needs: another token helps. */
export class NotPermitted extends ProtocolError {
  override name = "NotPermitted";
  constructor(readonly role: string, readonly action: string) {
    super(
      `this token may not ${flatten(action)}: it lacks the role '${flatten(role)}'; ask whoever ` +
        "runs the server for a token that has it",
    );
  }
}

/** The server's policy joins what clients learn, and this client may not share its weights. */
export class SharingNotPermitted extends ProtocolError {
  override name = "SharingNotPermitted";
  constructor(readonly policy: string) {
    super(
      `the server's policy '${flatten(policy)}' joins what its clients learn, so it asks for the ` +
        "trained weights of the client's part; permit it with share: true, or train with a server " +
        "that has the policy 'per-client'",
    );
  }
}

/** The server refuses this side: trying again does not help. */
export class Unauthorized extends ProtocolError {
  override name = "Unauthorized";
  constructor(readonly peer: string, readonly status: number, readonly reason: string) {
    super(`${peer} refused to let this side in (${status}): ${flatten(reason)}`);
  }
}
