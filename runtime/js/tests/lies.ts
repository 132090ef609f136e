/** Replies of a server that lies about one dimension at a time, told to a client's part. */

import assert from "node:assert/strict";

import type { PartyBundle } from "../src/bundles.js";
import { Engine } from "../src/engine/engines.js";
import { Executor } from "../src/engine/executors.js";
import { NotFinite, SplitonnxError } from "../src/errors.js";
import type { Ort } from "../src/index.js";
import { TRAIN } from "../src/manifests.js";
import { encodeMessage } from "../src/messages.js";
import type { TensorsMessage } from "../src/messages.js";
import { countElements, makeZeros } from "../src/tensors.js";
import type { NdArray, NdArrays } from "../src/tensors.js";
import { Protocol } from "../src/wire/protocols.js";
import { SESSION_OPTIONS } from "./fixtures.js";

const HUGE = 2 ** 31;
const MOST = 1 << 24; // elements of a lie; of what is larger only the header is told

const MESSAGE: TensorsMessage = {
  type: "Tensors", session: "s", phase: TRAIN, step: 0, microBatch: 0, turn: 0, seed: 0,
  learningRate: 0,
};

/** A honest server's replies in one task, all together. */
export interface Honest {
  readonly phase: string;
  readonly data: NdArrays;
  readonly replies: NdArrays;
}

/** Make every shape that differs in one dimension, and two in which the bytes come to none. */
function* listShapes(shape: readonly number[]): Generator<number[]> {
  for (const [axis, size] of shape.entries()) {
    for (const lie of [0, 1, size - 1, size + 1, 2 * size, HUGE]) {
      if (lie !== size && lie >= 0) yield shape.toSpliced(axis, 1, lie);
    }
    const next = (axis + 1) % shape.length;
    if (next !== axis) yield shape.toSpliced(axis, 1, HUGE).toSpliced(next, 1, 0);
  }
}

function makeLie({ dtype }: NdArray, shape: number[]): NdArray {
  return countElements(shape) > MOST ? { ...makeZeros(dtype, [0]), shape } : makeZeros(dtype, shape);
}

/**
 * Tell the part codes and scales that are finite, and stand for numbers that are not; it must refuse
 * them as it would refuse those numbers, before any other stage reads them.  Return how many were
 * told.
 */
export async function tellScales(party: PartyBundle, ort: Ort, honest: Honest): Promise<number> {
  const scaled = [...honest.replies.keys()].filter((name) => name.endsWith("#scale"));
  for (const name of scaled) {
    const executor = new Executor(party, new Engine(ort, SESSION_OPTIONS));
    await executor.begin(MESSAGE, { data: honest.data, seed: 0, learningRate: 0 });
    for await (const _ of executor.advance(MESSAGE)) continue;
    const lie = new Map(honest.replies);
    for (const [other, array] of honest.replies) {
      const value = other.endsWith("#scale") ? 3e38 : other.includes("#int") ? 100 : undefined;
      if (value !== undefined) lie.set(other, { ...array, data: array.data.map(() => value as never) });
    }
    executor.deliver(MESSAGE, lie);
    const advance = async () => {
      for await (const _ of executor.advance(MESSAGE)) continue;
    };
    await assert.rejects(advance(), (error) => error instanceof NotFinite && /step 1/.test(error.message), name);
    await executor.release();
  }
  return scaled.length;
}

/**
 * Tell every lie about the tensors that the server sends in a task; each must be a defined error,
 * or in a phase that changes nothing a result.  Return how many were told.
 *
 * The protocol is new each time, as after a reconnect, and has not seen what was sent.
 */
export async function tellLies(party: PartyBundle, ort: Ort, honest: Honest): Promise<number> {
  const executor = new Executor(party, new Engine(ort, SESSION_OPTIONS));
  let [told, begun] = [0, false];
  const message: TensorsMessage = { ...MESSAGE, phase: honest.phase };
  const advance = async () => {
    for await (const _ of executor.advance(message)) continue;
  };
  const before = executor.state();
  for (const [name, array] of honest.replies) {
    for (const shape of listShapes(array.shape)) {
      if (!begun) {
        await executor.begin(message, { data: honest.data, seed: 0, learningRate: 0 });
        await advance();
        begun = true;
      }
      const protocol = new Protocol(party.manifest);
      protocol.state = "open";
      const lie = new Map([...honest.replies, [name, makeLie(array, shape)]]);
      told += 1;
      try {
        executor.deliver(message, protocol.receive(encodeMessage(message, lie)).tensors);
        begun = false;
        await advance();
        assert.notEqual(honest.phase, TRAIN, `${name} ${shape} was taken for [${array.shape}]`);
      } catch (error) {
        assert.ok(error instanceof SplitonnxError, `${error}`);
        assert.doesNotMatch(error.message, /abort|unreachable|memory access/, `${name} ${shape}`);
      }
      if (!begun) executor.abandon(message);
    }
  }
  assert.deepEqual(executor.state(), before);
  await executor.release();
  return told;
}
