/**
 * The manifest: all that a runtime must know to run a bundle, and nothing about neural networks.
 *
 * A *phase* is what a party does for one task (`train`, `predict`, `evaluate`, `share`; `weigh`,
 * `accumulate` and `update` for steps of several micro-batches): a set of stages that each run as soon as their inputs are there.  Where a stage's input comes from is
 * written beside it.  `docs/bundles.md` describes the fields; the Python side writes them.
 */

import {
  parseJson,
  readInteger,
  readList,
  readMap,
  readNullable,
  readNumber,
  readOneOf,
  readOptional,
  readRecord,
  readText,
} from "./decoders.js";
import type { Decoded, Decoder } from "./decoders.js";
import { FormatError } from "./errors.js";
import { hashBytes } from "./hashes.js";
import { describe, isDtype } from "./tensors.js";
import type { TensorSpec } from "./tensors.js";

export const FORMAT = "splitonnx.bundle/1";

/** Tensors that an optimizer keeps for each parameter, at the most. */
export const MAX_SLOTS = 4;

export const TRAIN = "train";
export const PREDICT = "predict";
export const EVALUATE = "evaluate";
export const SHARE = "share";
/** Phases of a step of several micro-batches: what counts in each, its gradients, the step's end. */
export const [WEIGH, ACCUMULATE, UPDATE] = ["weigh", "accumulate", "update"];
/** The phases that a training step is made of. */
export const STEP_PHASES: readonly string[] = [TRAIN, ACCUMULATE, UPDATE];

export const LOSS = "loss";
/**
 * Suffixes of results of an evaluation: what counted in a mean, the sum of the weighted terms, and a
 * loss's factor in the sum.
 */
export const [COUNTED, TOTAL, WEIGHT] = ["@counted", "@total", "@weight"];

/** Scalar input, I64[3]: (seed, step, micro-batch); Dropout derives its mask from it. */
export const KEY = "splitonnx.key";
/** Scalar input, F32[]: the step's learning rate. */
export const LEARNING_RATE = "splitonnx.learning_rate";
/** Scalar input, I64[]: the number of this update, counted from 1 (Adam's t). */
export const STEP = "splitonnx.step";

const readDimension: Decoder<number | string | null> = readNullable((value, path) =>
  typeof value === "string" ? value : readInteger(value, path),
);
const readBounds: Decoder<readonly number[]> = (value, path) => {
  const bounds = readList(readInteger)(value, path);
  if (bounds.length !== 2 && bounds.length !== 3) {
    throw new SyntaxError(`${path} should be two or three integers`);
  }
  return bounds;
};
const readTensorSpec: Decoder<TensorSpec> = readRecord({
  name: readText,
  dtype: readText,
  shape: readList(readDimension),
  bounds: readOptional(readNullable(readBounds), null),
});
/** Reads the declaration of a tensor that travels; `kind` is why it travels. */
export const readWire = readRecord({
  tensor: readTensorSpec,
  sender: readText,
  receiver: readText,
  kind: readOneOf(
    "activation", "gradient", "input", "output", "report", "norm", "parameter", "count",
  ),
});
/** Reads the declaration of a tensor that `wires` carry encoded, as its receiver decodes it. */
const readEncoded = readRecord({
  tensor: readTensorSpec,
  sender: readText,
  receiver: readText,
  kind: readOneOf("activation", "gradient"),
  codec: readText,
  wires: readList(readText),
});
const readStateSpec = readRecord({
  tensor: readTensorSpec,
  role: readOneOf("parameter", "frozen", "buffer", "optimizer"),
});
const readStage = readRecord({
  name: readText,
  graph: readText,
  inputs: readList(
    readRecord({ name: readText, source: readOneOf("data", "wire", "stash", "state", "scalar") }),
  ),
  outputs: readList(readText),
  after: readOptional(readList(readText), []),
});
const readPhase = readRecord({
  name: readText,
  stages: readOptional(readList(readStage), []),
  data: readOptional(readList(readTensorSpec), []),
  wires: readOptional(readList(readWire), []),
  results: readOptional(readList(readText), []),
  commits: readOptional(readMap(readText), new Map()),
  encoded: readOptional(readList(readEncoded), []),
});
const readManifest = readRecord({
  format: readText,
  party: readText,
  digest: readText,
  target: readText,
  phases: readList(readPhase),
  state: readList(readStateSpec),
  files: readMap(readText),
  learningRate: readNumber,
  outputs: readOptional(readList(readTensorSpec), []),
  remoteStates: readOptional(readList(readText), []),
  accumulators: readOptional(readList(readTensorSpec), []),
  unweighable: readOptional(readText, ""),
  weights: readOptional(readText, ""),
});

export type Wire = Decoded<typeof readWire>;
export type StateSpec = Decoded<typeof readStateSpec>;
export type Stage = Decoded<typeof readStage>;
/** What one party does for one task; `commits` maps a state's name to the value replacing it. */
export type Phase = Decoded<typeof readPhase>;
/**
 * All that one party needs to know; `files` maps each graph file's name to its SHA-256, `weights` is
 * that of its weights.
 */
export type PartyManifest = Decoded<typeof readManifest>;

/**
 * Read a manifest; `source` is where it comes from.
 *
 * @throws FormatError: not JSON, a field missing or of the wrong type, another format version, a
 *   state that no party can hold, or a wire with a dimension that is not declared.
 */
export function decodeManifest(content: Uint8Array, source: string): PartyManifest {
  let manifest: PartyManifest;
  try {
    manifest = readManifest(parseJson(content), "");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new FormatError(source, `not a manifest of splitonnx: ${error.message}`);
  }
  if (manifest.format !== FORMAT) {
    const reason = `its format is '${manifest.format}', this version reads ${FORMAT}`;
    throw new FormatError(source, reason);
  }
  checkState(manifest, source);
  checkWires(manifest, source);
  return manifest;
}

const encoder = new TextEncoder();
const MARK = encoder.encode('"sha256": "');
const BLANK = encoder.encode("0".repeat(64));

/**
 * Check whether a manifest's file is as it was written: its last key is its SHA-256, taken with zeros
 * in the sum's place.  Files of earlier versions have none, and always are.
 */
export async function hasValidChecksum(content: Uint8Array): Promise<boolean> {
  let place = content.length - MARK.length;
  while (place >= 0 && !MARK.every((byte, index) => content[place + index] === byte)) place--;
  if (place < 0) return true;
  const start = place + MARK.length;
  if (start + BLANK.length > content.length) return false;
  const found = new TextDecoder().decode(content.subarray(start, start + BLANK.length));
  const blank = content.slice();
  blank.set(BLANK, start);
  return (await hashBytes(blank)) === found;
}

/** Check that each dimension that travels is a number or a name, which a task binds. */
function checkWires({ phases }: PartyManifest, source: string): void {
  for (const { name, wires } of phases) {
    for (const { tensor } of wires.filter((wire) => wire.tensor.shape.includes(null))) {
      throw new FormatError(
        source,
        `wire '${tensor.name}' of phase '${name}' is ${describe(tensor)}, and nothing binds the ` +
          "dimension '?'; cut the model again with this version",
      );
    }
  }
}

/**
 * Check what memory is taken for on the manifest's word alone: the optimizer's zeros, and the sums of
 * gradients.  Each is of a parameter's shape, {@link MAX_SLOTS} and one to a parameter; the
 * parameters themselves are held against a file.
 */
function checkState({ state, accumulators }: PartyManifest, source: string): void {
  const names = new Set<string>();
  const room = new Map<string, number>(); // shape to the zeros that it may still have
  for (const { tensor, role } of state) {
    const shape = JSON.stringify(tensor.shape);
    if (role === "parameter") room.set(shape, (room.get(shape) ?? 0) + MAX_SLOTS);
  }
  for (const { tensor, role } of state) {
    const shape = JSON.stringify(tensor.shape);
    const isKnown = tensor.shape.every((dim) => typeof dim === "number" && dim >= 0);
    const left = room.get(shape) ?? 0;
    const isHeld = role !== "optimizer" || left > 0;
    if (!isKnown || !isHeld || !isDtype(tensor.dtype) || names.has(tensor.name)) {
      const what = `'${tensor.name}' of ${describe(tensor)}`;
      throw new FormatError(source, `no party has a state ${what}`);
    }
    names.add(tensor.name);
    if (role === "optimizer") room.set(shape, left - 1);
  }
  const parameters = state.filter(({ role }) => role === "parameter");
  const sums = parameters.map(({ tensor }) => describe(tensor));
  for (const tensor of accumulators) {
    const place = sums.indexOf(describe(tensor));
    if (place < 0 || names.has(tensor.name)) {
      const what = `'${tensor.name}' of ${describe(tensor)}`;
      throw new FormatError(source, `no party has an accumulator ${what}`);
    }
    names.add(tensor.name);
    sums.splice(place, 1);
  }
}

/** Return the phase of that name; an absent one is an empty phase (nothing to do). */
export function findPhase(manifest: PartyManifest, name: string): Phase {
  return (
    manifest.phases.find((phase) => phase.name === name) ??
    { name, stages: [], data: [], wires: [], results: [], commits: new Map(), encoded: [] }
  );
}
