/** Where things are, and small things that several tests need. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { setFlagsFromString } from "node:v8";

import * as ortNode from "onnxruntime-node";
import * as ortWeb from "onnxruntime-web/wasm";

import type { Ort } from "../src/index.js";
import { DTYPES, viewBytes, viewElements } from "../src/tensors.js";
import type { Dtype, NdArray, NdArrays } from "../src/tensors.js";

/** The top of the repository. */
export const ROOT = join(dirname(fileURLToPath(import.meta.url)), "../../../..");
export const VECTORS = join(ROOT, "tests/vectors");

// V8 would optimize ONNX Runtime for longer than the tests run it.
setFlagsFromString("--liftoff-only");
ortWeb.env.wasm.numThreads = 1;
ortWeb.env.logLevel = "error";

/** The ONNX Runtimes that the tests run under. */
export const RUNTIMES: readonly (readonly [string, Ort])[] = [
  ["onnxruntime-node", ortNode],
  ["onnxruntime-web", ortWeb],
];
export const ORT: Ort = ortNode;
/** Both parties share the machine's cores. */
export const SESSION_OPTIONS = { intraOpNumThreads: 1 };

export function readVectors<T>(name: string): T {
  return JSON.parse(readFileSync(join(VECTORS, `${name}.json`), "utf-8")) as T;
}

export function fromBase64(text: string): Uint8Array {
  return new Uint8Array(Buffer.from(text, "base64"));
}

export function makeArray(dtype: Dtype, shape: readonly number[], values: number[]): NdArray {
  const integers = dtype === "I64" || dtype === "U64";
  const kind = DTYPES[dtype] as unknown as { from(values: Iterable<unknown>): NdArray["data"] };
  return { dtype, shape, data: kind.from(integers ? values.map(BigInt) : values) };
}

export function sameBytes(actual: NdArray, expected: NdArray): void {
  assert.equal(actual.dtype, expected.dtype);
  assert.deepEqual([...actual.shape], [...expected.shape]);
  assert.deepEqual(viewBytes(actual.data), viewBytes(expected.data));
}

/** Give the largest difference, relative to the largest value expected. */
export function relate(actual: ArrayLike<number | bigint>, expected: ArrayLike<number | bigint>) {
  assert.equal(actual.length, expected.length);
  let [difference, scale] = [0, 0];
  for (let index = 0; index < expected.length; index++) {
    const [found, wanted] = [Number(actual[index]), Number(expected[index])];
    assert.ok(Number.isFinite(found));
    difference = Math.max(difference, Math.abs(found - wanted));
    scale = Math.max(scale, Math.abs(wanted));
  }
  return difference / (scale || 1);
}

export function readArrays(
  described: Record<string, { dtype: Dtype; shape: number[]; bytes: string }>,
): NdArrays {
  const entries = Object.entries(described).map(([name, { dtype, shape, bytes }]) => {
    return [name, { dtype, shape, data: viewElements(fromBase64(bytes), dtype) }] as const;
  });
  return new Map(entries);
}
