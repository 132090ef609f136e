/**
 * The messages between client and server, and how they are written.
 *
 * A message is one safetensors message: its own fields are JSON in the metadata under
 * `splitonnx`, its tensors are the message's tensors.  This module knows what can be said; when it
 * may be said is the protocol's business.
 */

import { decodeTensors, encodeTensors } from "./codecs.js";
import {
  isRecord,
  parseJson,
  readCount,
  readFlag,
  readList,
  readMap,
  readNumber,
  readOptional,
  readRecord,
  readText,
  spellNames,
} from "./decoders.js";
import type { Decoded } from "./decoders.js";
import { FormatError } from "./errors.js";
import { readWire } from "./manifests.js";
import type { Wire } from "./manifests.js";
import type { NdArrays } from "./tensors.js";

/** Version of the protocol; both sides must speak the same. */
export const PROTOCOL = 2;
/** The close code of a connection whose session another client has taken over. */
export const REPLACED = 4001;
/** The policy of a server that joins nothing. */
export const PER_CLIENT = "per-client";

/** Policies under which all clients train one model, so that only the end of a round can be restored. */
export const ONE_MODEL: readonly string[] = ["splitfed-v2", "synchronous", "asynchronous"];
/** Bytes.  A greeting lists every wire, some 200 bytes each. */
export const MAX_HEADER = 1 << 20;

const FIELD = "splitonnx";

/** Phase name to everything that travels in the phase. */
export type Wires = ReadonlyMap<string, readonly Wire[]>;

const readWires = readMap(readList(readWire));

/** Every message's fields; `docs/protocol.md` says what they mean. */
const FIELDS = {
  /** A client's token, as a message: browsers cannot send it in a header. */
  Login: readRecord({ token: readText }),
  /**
   * Client: I have this bundle and am at this step of this session.  `canShare`: my user permits
   * me to share my parameters.  `microBatch`: I have completed so many micro-batches of the step.
   * `inFlight`: I may have so many tasks of a step open at once.
   */
  Hello: readRecord({
    protocol: readOptional(readCount, PROTOCOL),
    digest: readText,
    session: readText,
    origin: readOptional(readText, ""),
    start: readOptional(readCount, 0),
    generation: readOptional(readCount, 1),
    step: readCount,
    kept: readOptional(readList(readCount), []),
    isOpen: readOptional(readFlag, false),
    canRepeat: readOptional(readFlag, false),
    canShare: readOptional(readFlag, false),
    microBatch: readOptional(readCount, 0),
    inFlight: readOptional(readCount, 1),
    wires: readWires,
  }),
  /**
   * Server: so have I; we are at `step`, the client's own or one that it kept.  `wantsRepeat`: I
   * have not made the step before that yet; send its messages again.  Where `localSteps` is not 0,
   * my `policy` joins what clients learn: share your parameters after so many steps, until `rounds`
   * rounds are complete; 0: you decide.  `canAccumulate`: a step may consist of several
   * micro-batches, `inFlight` of whose tasks you may have open at once.  `restarts`: I do not have
   * yours of the running step, so begin it again.
   */
  Welcome: readRecord({
    session: readText,
    digest: readText,
    step: readCount,
    wantsRepeat: readOptional(readFlag, false),
    canAccumulate: readOptional(readFlag, false),
    restarts: readOptional(readFlag, false),
    inFlight: readOptional(readCount, 1),
    policy: readOptional(readText, PER_CLIENT),
    localSteps: readOptional(readCount, 0),
    rounds: readOptional(readCount, 0),
    wires: readWires,
  }),
  /** Either: wires of a task.  `turn` counts its sender's messages of the task from 0. */
  Tensors: readRecord({
    session: readText,
    phase: readText,
    step: readCount,
    microBatch: readCount,
    turn: readCount,
    seed: readCount,
    learningRate: readNumber,
  }),
  /**
   * Client: write your state at `step` to disk, durably; then I write mine.  `keep`: I may return
   * to this step at the end.
   */
  Save: readRecord({
    session: readText,
    step: readCount,
    publish: readOptional(readFlag, false),
    keep: readOptional(readFlag, false),
  }),
  /** Server: done.  `keep` is that of the request; a server that does not know it leaves it out. */
  Saved: readRecord({ session: readText, step: readCount, keep: readOptional(readFlag, false) }),
  /** Server: it could not be written; what was saved before is kept, and training may continue. */
  Unsaved: readRecord({ session: readText, step: readCount, reason: readText }),
  /** Either: this went wrong here, and this connection ends.  `code` is the error's name. */
  Fault: readRecord({
    code: readText,
    reason: readText,
    newest: readOptional(readCount, 0),
    subject: readOptional(readText, ""),
    needed: readOptional(readCount, 0),
    limit: readOptional(readCount, 0),
  }),
  /** Client: I am done. */
  Bye: readRecord({}),
} as const;

export type MessageType = keyof typeof FIELDS;
/** A message of one type, which `type` names. */
export type MessageOf<T extends MessageType> = {
  [K in T]: { readonly type: K } & Decoded<(typeof FIELDS)[K]>;
}[T];
export type Message = MessageOf<MessageType>;
export type TensorsMessage = MessageOf<"Tensors">;

/** What a task is known by: one micro-batch of one step of one phase of one session. */
export type TaskKey = Pick<TensorsMessage, "session" | "phase" | "step" | "microBatch">;

/** Name a task by its key, one name for one task. */
export function nameTask({ session, phase, step, microBatch }: TaskKey): string {
  return JSON.stringify([session, phase, step, microBatch]);
}

/** Describe a task for an error. */
export function describeTask({ session, phase, step, microBatch }: TaskKey): string {
  return `${phase} ${step}.${microBatch} of session ${session.slice(0, 40)}`;
}

/** Write a message and its tensors. */
export function encodeMessage(
  message: Message,
  tensors: NdArrays = new Map(),
): Uint8Array<ArrayBuffer> {
  return encodeTensors(tensors, { [FIELD]: JSON.stringify(spellNames(message)) });
}

/**
 * Read a message and its tensors, which are views of `content`.
 *
 * @throws FormatError: the bytes are not a message.
 */
export function decodeMessage(content: Uint8Array): { message: Message; tensors: NdArrays } {
  const { tensors, metadata } = decodeTensors(content, MAX_HEADER);
  const text = metadata.get(FIELD);
  if (text === undefined || metadata.size !== 1) {
    throw new FormatError("not a message", `its metadata hold ${[...metadata.keys()]}`);
  }
  const message = decodeFields(text);
  if (tensors.size && message.type !== "Tensors") {
    throw new FormatError("not a message", `a ${message.type} carries no tensors`);
  }
  return { message, tensors };
}

function decodeFields(text: string): Message {
  try {
    const value = parseJson(text);
    const type = isRecord(value) ? value.type : undefined;
    if (typeof type !== "string" || !Object.hasOwn(FIELDS, type)) {
      throw new SyntaxError(`its type is ${JSON.stringify(type)}`);
    }
    const fields = FIELDS[type as MessageType](value, "");
    return { type, ...fields } as Message; // the table gave the fields of this type
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new FormatError("not a message", error.message);
  }
}
