/** Steps of several micro-batches: how batches are divided, and that no cut of a connection shows. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { MemoryStorage, SplitClient, UnusableData, UsageError } from "../src/index.js";
import type { ConnectOptions, Ort, Outputs, StepRecord } from "../src/index.js";
import { checkAccumulating, enlarge, findWeights, splitBatch } from "../src/micro_batches.js";
import { openFolder } from "../src/node.js";
import type { NdArray, TensorSpec } from "../src/tensors.js";
import { EarlierServer } from "./earlier_servers.js";
import { ORT, RUNTIMES, SESSION_OPTIONS, VECTORS } from "./fixtures.js";
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
  const [samples, plan] = [40, { epochs: 2, batchSize: 8 }]; // of 3, 3 and 2 rows
  const inTurn = { ...plan, accumulate: 3 };
  const atOnce = { ...plan, microBatches: 3 };
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
  const undisturbed = new Map<Ort, { losses: number[]; state: Outputs }>();

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
  const same = (client: SplitClient, steps: readonly StepRecord[], ort = ORT): void => {
    const { losses, state } = undisturbed.get(ort)!;
    assert.deepEqual(steps.map(({ loss }) => loss), losses.slice(-steps.length));
    assert.deepEqual(client.state(), state);
  };
  /** How many tasks of a step have replies to come at once, at the most. */
  class Overlap {
    most = 0;
    readonly #open = new Set<string>();
    readonly onWires: ConnectOptions["onWires"] = (way, phase, wires) => {
      if (phase !== "accumulate" && phase !== "update") return;
      const [first] = Object.keys(wires);
      if (way === "sent" && first !== "flat@client_grad") this.#open.add(`${this.#begun++}`);
      if (first === "r1@server_grad" || first === "splitonnx.confirmed") {
        this.#open.delete([...this.#open][0]!); // they end in order
      }
      this.most = Math.max(this.most, this.#open.size);
    };
    #begun = 0;
  }

  before(async () => {
    server = await ServerProcess.start("dropout");
    proxy = await Proxy.start(() => server.url);
    for (const [, ort] of RUNTIMES) {
      const overlap = new Overlap();
      const client = await connect(server.url, { ort, onWires: overlap.onWires });
      const { steps } = await client.fit(data, inTurn);
      assert.equal(steps.length, 10);
      assert.ok(steps.every((record) => record.samples === 8));
      assert.equal(overlap.most, 1);
      undisturbed.set(ort, { losses: steps.map(({ loss }) => loss), state: client.state() });
      await client.close();
    }
  });

  after(async () => {
    await proxy.end();
    await server.remove();
    await closeForks();
  });

  for (const [title, ort] of RUNTIMES) {
    test(`gives the same where they are under way at once, under ${title}`, async () => {
      for (const [inFlight, most] of [[undefined, 3], [1, 1], [2, 2], [16, 4]] as const) {
        const overlap = new Overlap();
        const client = await connect(server.url, { ort, onWires: overlap.onWires });
        const { steps } = await client.fit(data, { ...atOnce, inFlight });
        assert.equal(overlap.most, most);
        same(client, steps, ort);
        assert.equal(client.reconnects, 0);
        await client.close();
      }
    });
  }

  test("may be made step by step, in turn or at once", async () => {
    const client = await connect(server.url);
    const other = await connect(server.url);
    const rows = (count: number) => ({
      x: { dims: [count, 2, 5, 5], data: data.x.data.subarray(0, count * 50) },
      labels: { dims: [count], data: data.labels.data.subarray(0, count) },
    });
    for (const count of [8, 5, 2]) {
      const found = await client.step(rows(count), { accumulate: 3 });
      assert.deepEqual(await other.step(rows(count), { microBatches: 3, inFlight: 2 }), found);
    }
    await other.predict({ x: rows(4).x });
    await client.step(rows(8));
    await other.step(rows(8));
    assert.deepEqual(other.state(), client.state());
    await client.close();
    await other.close();
  });

  test("is refused where options exclude each other", async () => {
    const client = await connect(server.url);
    for (const options of [
      { accumulate: 2, microBatches: 2 }, { inFlight: 2 }, { accumulate: 2, inFlight: 2 },
      { microBatches: 0 }, { microBatches: 2, inFlight: 17 },
    ]) {
      await assert.rejects(client.fit(data, { ...plan, ...options }), UsageError);
      await assert.rejects(client.step(data, options), UsageError);
    }
    await client.close();
  });

  // at once, more is sent again over each connection
  for (const [title, options, least] of [
    ["one by one", inTurn, 4_000],
    ["at once", atOnce, 10_000],
  ] as const) {
    test(`is not changed by connections that break anywhere, ${title}`, async () => {
      let seed = 7;
      const random = () => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32;
      proxy.budget = () => least + random() * 16_000;
      const client = await connect(proxy.url, { giveUpAfter: 60 });
      const { steps } = await client.fit(data, { ...options, checkpointEvery: 4 });
      proxy.budget = () => Infinity;
      assert.ok(client.reconnects > 10, `${client.reconnects} reconnects`);
      same(client, steps);
      await client.close();
    });

    test(`goes on with the step that was cut short when a page is loaded again, ${title}`, async () => {
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
      const left = first.fit(data, { ...options, checkpointEvery: 3, onStep });
      await assert.rejects(left.finally(() => (proxy.budget = () => Infinity)));
      assert.ok(accumulated > 3 * 7);
      const second = await connect(proxy.url, { storage, resume: true });
      assert.equal(second.steps, 6);
      await assert.rejects(second.fit(data, { ...plan, accumulate: 2 }), UsageError);
      const { steps } = await second.fit(data, { ...options, checkpointEvery: 3 });
      assert.equal(steps.length, 4);
      same(second, steps);
      await second.close();
    });
  }

  test("begins the step again where the server was killed in it", async () => {
    const own = await ServerProcess.start("dropout");
    let [replies, killing] = [0, undefined as Promise<void> | undefined];
    const client = await connect(own.url, {
      giveUpAfter: 60,
      onWires: (way, phase) => {
        if (way !== "received" || phase !== "accumulate" || ++replies !== 20) return;
        killing = own.end("SIGKILL").then(() => own.run("--resume"));
      },
    });
    const { steps } = await client.fit(data, { ...atOnce, checkpointEvery: 1 });
    await killing;
    same(client, steps);
    assert.ok(client.reconnects > 0);
    await client.close();
    await own.remove();
  });

  test("is made one by one where the server is of an earlier version", async () => {
    const old = new EarlierServer(server.url);
    const overlap = new Overlap();
    const client = await connect(await old.start(), { onWires: overlap.onWires });
    const { steps } = await client.fit(data, atOnce);
    assert.equal(overlap.most, 1);
    same(client, steps);
    await client.close();
    await old.end();
  });
});
