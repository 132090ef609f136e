/** Steps of several micro-batches: how batches are divided, and that no cut of a connection shows. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { MemoryStorage, SplitClient, UnusableData, UsageError } from "../src/index.js";
import type { ConnectOptions, Outputs, StepRecord } from "../src/index.js";
import { checkAccumulating, enlarge, findWeights, splitBatch } from "../src/micro_batches.js";
import { openFolder } from "../src/node.js";
import type { NdArray, TensorSpec } from "../src/tensors.js";
import { ORT, SESSION_OPTIONS, VECTORS } from "./fixtures.js";
import { Proxy, ServerProcess, closeForks, openSocket } from "./peers.js";

function declare(name: string, ...shape: (number | string)[]): TensorSpec {
  return { name, dtype: "F32", shape, bounds: null };
}

function count(...shape: number[]): NdArray {
  const size = shape.reduce((product, dim) => product * dim, 1);
  return { dtype: "F32", shape, data: Float32Array.from({ length: size }, (_, index) => index) };
}

describe("a batch", () => {
  const specs = [declare("x", "N", 2), declare("state", 1, "N", 2), declare("scale")];
  const batch = new Map([["x", count(7, 2)], ["state", count(1, 7, 2)], ["scale", count()]]);

  test("is divided by its samples, on whichever axis, into parts that differ by one", () => {
    const parts = splitBatch(batch, specs, 3);
    assert.deepEqual(parts.map((part) => part.get("x")!.shape), [[3, 2], [2, 2], [2, 2]]);
    assert.deepEqual(parts.map((part) => part.get("state")!.shape), [[1, 3, 2], [1, 2, 2], [1, 2, 2]]);
    for (const name of ["x", "state"]) {
      const joined = parts.flatMap((part) => [...part.get(name)!.data]);
      assert.deepEqual(joined, [...batch.get(name)!.data]);
    }
    assert.ok(parts.every((part) => part.get("scale") === batch.get("scale")));
    assert.equal(splitBatch(batch, specs, 20).length, 7);
  });

  test("of samples on an inner axis is divided there, row by row", () => {
    const turned = [declare("x", 3, "N"), declare("y", "N")];
    const parts = splitBatch(new Map([["x", count(3, 4)], ["y", count(4)]]), turned, 2);
    assert.deepEqual([...parts[1]!.get("x")!.data], [2, 3, 6, 7, 10, 11]);
  });

  test("of arrays that differ in their samples is refused", () => {
    const others = new Map([["x", count(4, 2)], ["table", count(6, 2)]]);
    assert.throws(() => splitBatch(others, [declare("x", "N", 2), declare("table", "M", 2)], 2), {
      name: "UnusableData",
      message: /different numbers of them: 'x' 4, 'table' 6/,
    });
  });

  test("of a model that fixes its rows has as many times more", () => {
    const fixed = [declare("x", 2, 3), declare("labels", 2), declare("scale")];
    assert.deepEqual(enlarge(fixed, 3).map(({ shape }) => shape), [[6, 3], [6], []]);
    assert.equal(enlarge(specs, 1), specs);
  });
});

test("weights are parts of what counts, and must be the same in each loss", () => {
  const weigh = (...pairs: [number, number][]) =>
    findWeights(pairs.map(([a, b]) => new Map([["loss.a@counted", a], ["loss.b@counted", b]])));
  assert.deepEqual(weigh([3, 6], [1, 2]), [0.75, 0.25]);
  assert.deepEqual(weigh([0, 0], [0, 0]), [0, 0]);
  assert.throws(() => weigh([1, 1], [1, 3]), UnusableData);
});

test("a bundle that cannot accumulate says why", async () => {
  const { loadBundle } = await import("../src/bundles.js");
  const { manifest } = await loadBundle(openFolder(join(VECTORS, "dropout/client")));
  checkAccumulating(manifest);
  const old = { ...manifest, phases: manifest.phases.filter(({ name }) => name === "train") };
  assert.throws(() => checkAccumulating(old), /cut by an earlier version/);
  const own = { ...manifest, unweighable: "its loss is its own" };
  assert.throws(() => checkAccumulating(own), /cannot accumulate: its loss is its own/);
});

describe("a training in steps of three micro-batches", () => {
  const [samples, plan] = [40, { epochs: 2, batchSize: 8, accumulate: 3 }]; // of 3, 3 and 2 rows
  let word = 1;
  const next = () => (word = (Math.imul(word, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const data = {
    x: {
      dims: [samples, 2, 5, 5],
      data: Float32Array.from({ length: samples * 50 }, () => next() * 2 - 1),
    },
    labels: {
      dims: [samples],
      data: BigInt64Array.from({ length: samples }, () => BigInt(Math.floor(next() * 3))),
    },
  };
  let server: ServerProcess;
  let proxy: Proxy;
  let undisturbed: { losses: number[]; state: Outputs };

  const connect = (url: string, options: Partial<ConnectOptions> = {}): Promise<SplitClient> =>
    SplitClient.connect(url, {
      ort: ORT,
      openSocket,
      seed: 9,
      bundle: openFolder(join(VECTORS, "dropout/client")),
      storage: new MemoryStorage(),
      sessionOptions: SESSION_OPTIONS,
      ...options,
    });

  before(async () => {
    server = await ServerProcess.start("dropout");
    proxy = await Proxy.start(() => server.url);
    const client = await connect(server.url);
    const { steps } = await client.fit(data, plan);
    assert.equal(steps.length, 10);
    assert.ok(steps.every((record) => record.samples === 8));
    undisturbed = { losses: steps.map(({ loss }) => loss), state: client.state() };
    await client.close();
  });

  after(async () => {
    await proxy.end();
    await server.remove();
    await closeForks();
  });

  test("connections that break anywhere change nothing", async () => {
    let seed = 7;
    const random = () => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32;
    proxy.budget = () => 4_000 + random() * 16_000;
    const client = await connect(proxy.url, { giveUpAfter: 60 });
    const { steps } = await client.fit(data, { ...plan, checkpointEvery: 4 });
    proxy.budget = () => Infinity;
    assert.ok(client.reconnects > 10, `${client.reconnects} reconnects`);
    assert.deepEqual(steps.map(({ loss }) => loss), undisturbed.losses);
    assert.deepEqual(client.state(), undisturbed.state);
    await client.close();
  });

  test("a page that is loaded again goes on with the step that was cut short", async () => {
    const storage = new MemoryStorage();
    let [accumulated, isLeaving] = [0, false];
    const first = await connect(proxy.url, {
      storage,
      giveUpAfter: 0,
      onWires: (way, phase) => {
        if (way === "sent" && phase === "accumulate") accumulated += 1;
        if (isLeaving && way === "received" && phase === "accumulate") proxy.cut();
      },
    });
    const onStep = ({ step }: StepRecord) => void (isLeaving = step === 7);
    proxy.budget = () => Infinity;
    const left = first.fit(data, { ...plan, checkpointEvery: 3, onStep });
    await assert.rejects(left.finally(() => (proxy.budget = () => Infinity)));
    assert.ok(accumulated > 3 * 7);
    const second = await connect(proxy.url, { storage, resume: true });
    assert.equal(second.steps, 6);
    await assert.rejects(second.fit(data, { ...plan, accumulate: 2 }), UsageError);
    const { steps } = await second.fit(data, { ...plan, checkpointEvery: 3 });
    assert.deepEqual(steps.map(({ loss }) => loss), undisturbed.losses.slice(6));
    assert.deepEqual(second.state(), undisturbed.state);
    await second.close();
  });
});
