/**
 * The client's side of the protocol, pure: bytes in, checked messages out; it neither waits nor
 * sends.
 *
 * An exchange of messages is a row of states, and {@link MOVES} says which message may come from
 * whom in which state and where it leads.  Before anything is done with a message its tensors are held
 * against the manifest: their names, element types, shapes and ranges.  This module knows no
 * network, and nothing of what the tensors mean.
 */

import {
  BundleMismatch,
  FormatError,
  LocalProtocolError,
  RemoteProtocolError,
  quote,
} from "../errors.js";
import type { Sizes } from "../expressions.js";
import { ACCUMULATE, SHARE, STEP_PHASES, UPDATE, findPhase } from "../manifests.js";
import type { PartyManifest, Wire } from "../manifests.js";
import { decodeMessage, encodeMessage, nameTask } from "../messages.js";
import type { Message, MessageOf, TaskKey, TensorsMessage, Wires } from "../messages.js";
import { checkArray } from "../tensors.js";
import type { NdArrays } from "../tensors.js";
import { checkFinite } from "./validation.js";

export const CLIENT = "client";
export const SERVER = "server";

/** How far an exchange of messages is. */
export type State = "start" | "greeting" | "open" | "saving" | "closed";

/** "state sender message" -> next state; what is not in the table is not allowed. */
export const MOVES: Readonly<Record<string, State>> = {
  "start client Login": "start",
  "start client Hello": "greeting",
  "start server Fault": "closed",
  "start client Bye": "closed",
  "greeting server Welcome": "open",
  "greeting server Fault": "closed",
  "greeting client Bye": "closed",
  "open client Tensors": "open",
  "open server Tensors": "open",
  "open client Save": "saving",
  "open client Fault": "closed",
  "open server Fault": "closed",
  "open client Bye": "closed",
  "saving server Saved": "open",
  "saving server Unsaved": "open",
  "saving server Fault": "closed",
  "saving client Bye": "closed",
};

/** The client's side of an exchange of messages; `state` is how far it is. */
export class Protocol {
  state: State = "start";
  readonly #manifest: PartyManifest;
  /** Of each open task: the sizes of its named dimensions. */
  readonly #sizes = new Map<string, Sizes>();

  constructor(manifest: PartyManifest) {
    this.#manifest = manifest;
  }

  /**
   * Write a message, and move on.
   *
   * @throws LocalProtocolError: this side may not send this message now.
   */
  send(message: Message): Uint8Array<ArrayBuffer> {
    this.note(message);
    return encodeMessage(message);
  }

  /**
   * Write a message with tensors, which is sent now or later, as {@link note} says.
   *
   * @throws LocalProtocolError, ArrayMismatch, ValueOutOfRange: a tensor is not one of its phase's
   *   wires, or not as the manifest declares it.
   */
  write(message: TensorsMessage, tensors: NdArrays): Uint8Array<ArrayBuffer> {
    this.#sizes.set(nameTask(message), this.#findSizes(message)); // until the task ends
    this.#checkTensors(message, tensors, CLIENT);
    return encodeMessage(message, tensors);
  }

  /** Forget a task. */
  end(key: TaskKey): void {
    this.#sizes.delete(nameTask(key));
  }

  /** Forget all tasks. */
  endAll(): void {
    this.#sizes.clear();
  }

  /**
   * Move on as a message is sent, one that was written before perhaps.
   *
   * @throws LocalProtocolError: this side may not send this message now.
   */
  note(message: Message): void {
    const following = MOVES[`${this.state} ${CLIENT} ${message.type}`];
    if (!following) throw new LocalProtocolError(`a ${message.type} while ${this.state}`);
    this.state = following;
  }

  /**
   * Read a message, check it, and move on; the tensors are views of `content`.
   *
   * @throws RemoteProtocolError: no message, or one that the other side may not send now.
   * @throws BundleMismatch: the greeting shows that the two sides do not belong together.
   * @throws ArrayMismatch, ValueOutOfRange: a tensor is not as the manifest declares its wire.
   * @throws NotFinite: a tensor to train with holds what no training survives.
   */
  receive(content: Uint8Array): { message: Message; tensors: NdArrays } {
    const { message, tensors } = decode(content);
    const following = MOVES[`${this.state} ${SERVER} ${message.type}`];
    if (!following) {
      throw new RemoteProtocolError(`it sent a ${message.type} while ${this.state}`);
    }
    if (message.type === "Welcome") this.#compare(message);
    if (message.type === "Tensors") this.#checkTensors(message, tensors, SERVER);
    this.state = following;
    return { message, tensors };
  }

  #compare(welcome: MessageOf<"Welcome">): void {
    compareWires(listWires(this.#manifest), welcome.wires);
    if (welcome.digest !== this.#manifest.digest) {
      throw new BundleMismatch("the bundle's digest", this.#manifest.digest, welcome.digest);
    }
  }

  /** Hold tensors against the wires that `sender` sends in the phase. */
  #checkTensors(message: TensorsMessage, tensors: NdArrays, sender: string): void {
    const phase = findPhase(this.#manifest, message.phase);
    const wires = new Map(
      phase.wires.filter((wire) => wire.sender === sender).map((wire) => [wire.tensor.name, wire]),
    );
    const unknown = [...tensors.keys()].filter((name) => !wires.has(name));
    if (unknown.length) {
      const kind = sender === SERVER ? RemoteProtocolError : LocalProtocolError;
      throw new kind(`${quote(unknown)} is not a wire of phase '${message.phase}'`);
    }
    const missing = [...wires.keys()].filter((name) => !tensors.has(name));
    if (message.phase === SHARE && missing.length) {
      const kind = sender === SERVER ? RemoteProtocolError : LocalProtocolError;
      throw new kind(`a share comes whole, and ${quote(missing)} is missing from it`);
    }
    const sizes = this.#findSizes(message);
    for (const [name, array] of tensors) {
      const { tensor, kind } = wires.get(name)!;
      checkArray(array, tensor, sizes, kind === "output");
      if ([...STEP_PHASES, SHARE].includes(message.phase) && sender === SERVER) {
        checkFinite(name, array, `step ${message.step + 1}`);
      }
    }
  }

  #findSizes(key: TaskKey): Sizes {
    return this.#sizes.get(nameTask(key)) ?? new Map();
  }
}

/**
 * List what travels in each phase, for a greeting.  Those of micro-batches send what `train` sends,
 * and are left out: the digest tells whether they are the same.
 */
export function listWires(manifest: PartyManifest): Wires {
  const used = manifest.phases.filter(
    ({ name, wires }) => wires.length && name !== ACCUMULATE && name !== UPDATE,
  );
  return new Map(used.map((phase) => [phase.name, phase.wires]));
}

function decode(content: Uint8Array): { message: Message; tensors: NdArrays } {
  try {
    return decodeMessage(content);
  } catch (error) {
    if (!(error instanceof FormatError)) throw error;
    throw new RemoteProtocolError(error.message);
  }
}

function compareWires(local: Wires, remote: Wires): void {
  for (const phase of new Set([...local.keys(), ...remote.keys()])) {
    const here = nameWires(local.get(phase));
    const there = nameWires(remote.get(phase));
    for (const name of new Set([...here.keys(), ...there.keys()])) {
      const [own, other] = [describeWire(here.get(name)), describeWire(there.get(name))];
      if (own !== other) {
        throw new BundleMismatch(`wire '${name}' of phase '${phase}'`, own, other);
      }
    }
  }
}

function nameWires(wires: readonly Wire[] = []): Map<string, Wire> {
  return new Map(wires.map((wire) => [wire.tensor.name, wire]));
}

/** Describe all there is to a wire but its name: what is described alike is alike. */
function describeWire(wire: Wire | undefined): string {
  if (!wire) return "absent";
  const { dtype, shape, bounds } = wire.tensor;
  const tensor = `${dtype}${JSON.stringify(shape)}${bounds ? ` in ${bounds}` : ""}`;
  return `${tensor} (${wire.kind} from ${wire.sender} to ${wire.receiver})`;
}
