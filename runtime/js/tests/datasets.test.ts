/** Data are taken as they are, checked before anything is trained with them, and dealt in batches. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import * as ort from "onnxruntime-node";

import { openDataset } from "../src/client/datasets.js";
import type { DataSource } from "../src/client/datasets.js";
import { shuffleRows } from "../src/client/shuffles.js";
import { takeTensor } from "../src/engine/engines.js";
import type { TensorLike } from "../src/engine/engines.js";
import { ArrayMismatch, MissingArray, NotFinite, UnusableData, ValueOutOfRange } from "../src/index.js";
import type { TensorSpec } from "../src/tensors.js";

const spec = (name: string, dtype: string, shape: TensorSpec["shape"], bounds = null as never) => ({
  name, dtype, shape, bounds,
});
const SPECS = [spec("x", "F32", ["N", 2]), spec("labels", "I64", ["N"], [0, 3] as never)];

function make(rows: number) {
  const data = Float32Array.from({ length: rows * 2 }, (_, index) => index);
  const labels = BigInt64Array.from({ length: rows }, (_, index) => BigInt(index % 3));
  return { x: { dims: [rows, 2], data }, labels: { dims: [rows], data: labels } };
}

async function deal(source: DataSource, changes = {}): Promise<number[][]> {
  const dealing = { batchSize: 4, seed: 1, epoch: 0, shuffle: false, dropLast: false, ...changes };
  const batches: number[][] = [];
  for await (const batch of openDataset(source).batches(dealing)) {
    const values = batch.get("x")!.data as Float32Array;
    batches.push([...values].filter((_, index) => index % 2 === 0).map((value) => value / 2));
  }
  return batches;
}

test("rows come in their order, the last batch smaller or left out", async () => {
  assert.deepEqual(await deal(make(6)), [[0, 1, 2, 3], [4, 5]]);
  assert.deepEqual(await deal(make(6), { dropLast: true }), [[0, 1, 2, 3]]);
});

test("rows are shuffled by seed and epoch, the same in every array", async () => {
  const order = [...shuffleRows(6, 1, 2)];
  const dealt = await deal(make(6), { shuffle: true, epoch: 2, batchSize: 6 });
  assert.deepEqual(dealt, [order]);
  assert.notDeepEqual(await deal(make(6), { shuffle: true, epoch: 3, batchSize: 6 }), [order]);
});

test("an iterable's batches come as they are, an iterator's once", async () => {
  assert.deepEqual(await deal([make(2), make(3)]), [[0, 1], [0, 1, 2]]);
  async function* flow() {
    yield make(1);
  }
  const dataset = openDataset(flow());
  const dealing = { batchSize: 4, seed: 1, epoch: 0, shuffle: false, dropLast: false };
  for await (const batch of dataset.batches(dealing)) assert.equal(batch.size, 2);
  const again = async () => {
    for await (const _ of dataset.batches(dealing)) assert.fail();
  };
  await assert.rejects(again(), UnusableData);
});

describe("data are refused", () => {
  const check = (source: DataSource) => () => openDataset(source).check(SPECS);
  const { x, labels } = make(4);

  test("that lack an array", () => {
    assert.throws(check({ x }), MissingArray);
  });
  test("of another element type or shape", () => {
    const wide = { dims: [4, 2], data: new Float64Array(8) };
    assert.throws(check({ x: wide, labels }), ArrayMismatch);
    assert.throws(check({ x: { dims: [4, 2, 1], data: x.data }, labels }), ArrayMismatch);
  });
  test("with labels out of range", () => {
    const high = { dims: [4], data: BigInt64Array.of(0n, 1n, 2n, 3n) };
    assert.throws(check({ x, labels: high }), ValueOutOfRange);
  });
  test("that differ in their number of rows, or have none", () => {
    assert.throws(check({ x, labels: make(3).labels }), UnusableData);
    assert.throws(check({}), UnusableData);
    assert.throws(check(make(0)), UnusableData);
  });
  test("with NaN, by the row's number", async () => {
    const data = x.data.slice();
    data[5] = NaN;
    await assert.rejects(deal({ x: { dims: [4, 2], data }, labels }), (error: Error) => {
      return error instanceof NotFinite && error.message.includes("row 2");
    });
  });
});

describe("a tensor", () => {
  const take = (tensor: unknown) => takeTensor("x", tensor as TensorLike);

  test("of ONNX Runtime is taken as it is", () => {
    const { dtype, shape, data } = take(new ort.Tensor("bool", Uint8Array.of(1, 0), [2, 1]));
    assert.deepEqual([dtype, [...shape], [...data]], ["BOOL", [2, 1], [1, 0]]);
  });
  test("is what its elements say, unless it says so itself", () => {
    assert.equal(take({ dims: [1], data: Int32Array.of(1) }).dtype, "I32");
    assert.equal(take({ dims: [1], data: Uint16Array.of(1) }).dtype, "U16");
    assert.equal(take({ type: "float16", dims: [1], data: Uint16Array.of(1) }).dtype, "F16");
  });
  test("is refused where it is none", () => {
    for (const wrong of [
      { dims: [3], data: Float32Array.of(1) },
      { dims: [1], data: [1] },
      { data: Float32Array.of(1) },
      { type: "int64", dims: [1], data: Float32Array.of(1) },
      { type: "string", dims: [1], data: ["a"] },
      { type: "complex", dims: [1], data: Float32Array.of(1) },
    ]) {
      assert.throws(() => take(wrong), UnusableData);
    }
  });
});
