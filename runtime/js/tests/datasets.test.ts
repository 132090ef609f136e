/** Data are taken as they are, checked before anything is trained with them, and dealt in batches. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import * as ort from "onnxruntime-node";

import { hasBatchStates, openDataset, openFitting } from "../src/client/datasets.js";
import type { DataSource } from "../src/client/datasets.js";
import { shuffleRows } from "../src/client/shuffles.js";
import { takeTensor } from "../src/engine/engines.js";
import type { TensorLike } from "../src/engine/engines.js";
import {
  ArrayMismatch,
  KeptArray,
  MissingArray,
  NotFinite,
  UnusableData,
  UsageError,
  ValueOutOfRange,
} from "../src/index.js";
import type { TensorSpec } from "../src/tensors.js";
import { DATA, FILES, connectTo, startLiar } from "./liars.js";

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
  test("that have an array for what the model keeps", () => {
    const kept = ["moved"];
    const more = { x, labels, moved: x };
    for (const source of [more, [{ x, labels }, more]] as DataSource[]) {
      assert.throws(() => openFitting(source, SPECS, 4, { kept }), KeptArray);
      openFitting(source, SPECS, 4, { kept: ["other"] });
    }
  });
  test("that have an array for a state that the server keeps", async (t) => {
    const manifest = JSON.parse(new TextDecoder().decode(FILES["manifest.json"]!)) as object;
    const changed = JSON.stringify({ ...manifest, remote_states: ["h"], sha256: undefined });
    const bundle = { ...FILES, "manifest.json": new TextEncoder().encode(changed) };
    const client = await connectTo(await startLiar(t), { bundle });
    await assert.rejects(client.step({ ...DATA, h: DATA.x }), KeptArray);
    await assert.rejects(client.fit([{ ...DATA, h: DATA.x }]), KeptArray);
    await client.step(DATA);
    await client.close();
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
  test("with labels out of range in any batch of an array", () => {
    const high = { dims: [4], data: BigInt64Array.of(0n, 1n, 2n, 3n) };
    assert.throws(check([{ x, labels }, { x, labels: high }]), ValueOutOfRange);
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

describe("where the model fixes its batch, at 4 rows,", () => {
  const fixed = [spec("x", "F32", [4, 2])];
  const open = (rows: number, batchSize: number, isTraining: boolean) => () =>
    openFitting(make(rows), fixed, batchSize, { isTraining });
  const refuse = (kind: typeof UsageError | typeof UnusableData, reason: RegExp) =>
    (error: Error) => error instanceof kind && reason.test(error.message);

  test("training takes whole batches, an evaluation nothing else", () => {
    for (const rows of [4, 6, 8]) assert.equal(open(rows, 4, true)().size, rows);
    for (const [rows, batchSize] of [[8, 4], [4, 32]] as const) {
      assert.equal(open(rows, batchSize, false)().size, rows);
    }
    assert.throws(open(6, 4, false), refuse(UnusableData, /6 rows leave a last batch of 2;/));
  });
  test("fewer rows are refused, and say how to free the batch", () => {
    const reason = /only 3 rows; give 4 or more, or cut the model with --dim x:0=N/;
    for (const isTraining of [true, false]) {
      assert.throws(open(3, 4, isTraining), refuse(UnusableData, reason));
    }
  });
  test("and say nothing of it where a state holds the batch", () => {
    const open = () => openFitting(make(3), fixed, 4, { canFree: false });
    assert.throws(open, refuse(UnusableData, /only 3 rows; give 4 or more$/));
    const buffer = (shape: number[]) => ({ tensor: spec("h", "F32", shape), role: "buffer" }) as const;
    const commits = new Map<string, string>();
    const nothing = { stages: [], wires: [], results: [], encoded: [] };
    const phases = [{ name: "train", data: fixed, commits, ...nothing }];
    const holds = (shape: number[], remoteStates: string[] = []) =>
      hasBatchStates({ phases, state: [buffer(shape)], remoteStates });
    assert.equal(holds([1, 4, 6]), true);
    assert.equal(holds([1, 5, 6]), false);
    assert.equal(holds([1, 5, 6], ["h"]), true);
  });
  test("so is another size of batches", () => {
    const refused = [[6, 32, true], [8, 2, true], [8, 2, false], [4, 32, true]] as const;
    for (const [rows, batchSize, isTraining] of refused) {
      assert.throws(open(rows, batchSize, isTraining), refuse(UsageError, /use batchSize 4,/));
    }
  });
  test("data in batches of their own are not counted", () => {
    assert.equal(openFitting([make(4)], fixed, 32, { isTraining: true }).size, null);
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

test("labels with samples on another axis are not taken for a fixed batch", () => {
  const specs = [spec("x", "F32", ["N", 3]), spec("labels", "F32", [3, "N", 2])];
  const x = { dims: [3, 3], data: new Float32Array(9) };
  const data = { x, labels: { dims: [3, 3, 2], data: new Float32Array(18) } };
  const open = (batchSize: number, isTraining: boolean) => openFitting(data, specs, batchSize, { isTraining });
  for (const [batchSize, isTraining] of [[2, false], [2, true], [3, true]] as [number, boolean][]) {
    assert.throws(() => open(batchSize, isTraining), /'labels', .* on axis 1.*an array of batches$/);
  }
  assert.equal(open(3, false).size, 3);
  openFitting([data, data], specs, 2, { isTraining: true });
});
