/** Sessions with a real server: connections that break, servers and pages that go and come again. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import {
  ConnectionLost,
  MemoryStorage,
  NotSaved,
  ProtocolError,
  SplitClient,
  StaleConnection,
  StepsLost,
  Unauthorized,
  UnfinishedRun,
  UsageError,
} from "../src/index.js";
import type { ConnectOptions, Outputs, StateStorage, StepRecord } from "../src/index.js";
import { FolderStorage, openFolder } from "../src/node.js";
import { ORT, SESSION_OPTIONS, VECTORS } from "./fixtures.js";
import { Proxy, ServerProcess, closeForks, openSocket } from "./peers.js";

const SAMPLES = 40;
const PLAN = { epochs: 3, batchSize: 8 }; // 15 steps
const SEED = 9;

function makeData() {
  let word = 1;
  const next = () => (word = (Math.imul(word, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const pixels = Float32Array.from({ length: SAMPLES * 50 }, () => next() * 2 - 1);
  const labels = BigInt64Array.from({ length: SAMPLES }, () => BigInt(Math.floor(next() * 3)));
  return { x: { dims: [SAMPLES, 2, 5, 5], data: pixels }, labels: { dims: [SAMPLES], data: labels } };
}

const DATA = makeData();

function connect(url: string, options: Partial<ConnectOptions> = {}): Promise<SplitClient> {
  return SplitClient.connect(url, {
    ort: ORT,
    openSocket,
    seed: SEED,
    bundle: openFolder(join(VECTORS, "dropout/client")),
    storage: new MemoryStorage(),
    sessionOptions: SESSION_OPTIONS,
    ...options,
  });
}

/** What an undisturbed run gives: everything that tells one course of training from another. */
interface Outcome {
  losses: number[];
  state: Outputs;
  predicted: Outputs;
}

async function conclude(client: SplitClient, steps: readonly StepRecord[]): Promise<Outcome> {
  const state = client.state();
  const predicted = await client.predict({ x: DATA.x });
  await client.close();
  return { losses: steps.map((record) => record.loss), state, predicted };
}

function sameOutcome(actual: Outcome, expected: Outcome): void {
  assert.deepEqual(actual.losses, expected.losses.slice(-actual.losses.length));
  assert.deepEqual(actual.state, expected.state);
  assert.deepEqual(actual.predicted, expected.predicted);
}

after(closeForks);

describe("with one server", () => {
  let server: ServerProcess;
  let proxy: Proxy;
  let undisturbed: Outcome;

  before(async () => {
    server = await ServerProcess.start("dropout");
    proxy = await Proxy.start(() => server.url);
    const client = await connect(server.url);
    const { steps } = await client.fit(DATA, PLAN);
    undisturbed = await conclude(client, steps);
  });

  after(async () => {
    await proxy.end();
    await server.remove();
  });

  test("connections that break anywhere change nothing", async () => {
    let word = 7;
    const random = () => (word = (Math.imul(word, 1664525) + 1013904223) >>> 0) / 2 ** 32;
    proxy.budget = () => 4_000 + random() * 16_000;
    const client = await connect(proxy.url, { giveUpAfter: 60 });
    const { steps } = await client.fit(DATA, { ...PLAN, checkpointEvery: 4 });
    proxy.budget = () => Infinity;
    assert.ok(client.reconnects > 10, `${client.reconnects} reconnects`);
    assert.equal(steps.length, 15);
    sameOutcome(await conclude(client, steps), undisturbed);
  });

  test("a page that is loaded again goes on where it stood", async () => {
    const storage = new MemoryStorage();
    proxy.budget = () => Infinity;
    const first = await connect(proxy.url, { storage, giveUpAfter: 0 });
    const leave = ({ step }: StepRecord) => void (step === 7 && proxy.cut());
    const left = first.fit(DATA, { ...PLAN, checkpointEvery: 3, onStep: leave });
    proxy.budget = () => 0;
    await assert.rejects(left, ConnectionLost);
    proxy.budget = () => Infinity;

    const second = await connect(proxy.url, { storage, resume: true });
    assert.equal(second.session, first.session);
    assert.equal(second.steps, 6);
    const { steps } = await second.fit(DATA, { ...PLAN, checkpointEvery: 3 });
    assert.deepEqual([steps[0]!.step, steps[0]!.epoch, steps[0]!.batch], [7, 1, 2]);
    sameOutcome(await conclude(second, steps), undisturbed);
  });

  test("a second client of one storage takes the training over, for good", async () => {
    const storage = new MemoryStorage();
    let letRead = () => {};
    const isFar = new Promise<void>((resolve) => (letRead = resolve));
    const slow: StateStorage = {
      put: (name, content) => storage.put(name, content),
      delete: (name) => storage.delete(name),
      list: (prefix) => storage.list(prefix),
      async get(name) {
        const content = await storage.get(name);
        await isFar; // what it gives may be old by now
        return content;
      },
    };
    const first = await connect(server.url, { storage });
    let second: Promise<SplitClient> | undefined;
    const onStep = async ({ step }: StepRecord) => {
      if (step === 4) second = connect(server.url, { storage: slow, resume: true });
      if (step < 8) return;
      letRead();
      await second;
    };
    const left = first.fit(DATA, { ...PLAN, checkpointEvery: 1, onStep });
    await assert.rejects(left, StaleConnection);
    const client = await second!;
    assert.deepEqual([client.session, client.steps], [first.session, 7]);
    const { steps } = await client.fit(DATA, { ...PLAN, checkpointEvery: 1 });
    sameOutcome(await conclude(client, steps), undisturbed);
    assert.equal(client.reconnects, 0);
  });

  test("a run that was interrupted is not begun again without a word", async () => {
    const storage = new MemoryStorage();
    const first = await connect(server.url, { storage });
    const stop = new AbortController();
    const onStep = ({ step }: StepRecord) => void (step === 4 && stop.abort());
    await first.fit(DATA, { ...PLAN, checkpointEvery: 2, signal: stop.signal, onStep });
    assert.deepEqual(first.checkpoints, [4, 2]);
    await first.close();
    const second = await connect(server.url, { storage });
    await assert.rejects(second.fit(DATA, { ...PLAN, checkpointEvery: 2 }), UnfinishedRun);
    const { steps } = await second.fit(DATA, { ...PLAN, checkpointEvery: 2, restart: true });
    assert.equal(steps[0]!.step, 1);
    await second.close();
    const third = await connect(server.url, { storage, resume: true });
    assert.deepEqual([third.session, third.steps], [second.session, second.checkpoints[0]]);
    await third.close();
  });

  test("a run is gone on with by the same data, batches and seed alone", async () => {
    const storage = new MemoryStorage();
    const first = await connect(proxy.url, { storage, giveUpAfter: 0 });
    proxy.budget = () => 0;
    const leave = ({ step }: StepRecord) => void (step === 4 && proxy.cut());
    const left = first.fit(DATA, { ...PLAN, checkpointEvery: 3, onStep: leave });
    await assert.rejects(left, ConnectionLost);
    proxy.budget = () => Infinity;
    const second = await connect(proxy.url, { storage, resume: true });
    await assert.rejects(second.fit(DATA, { ...PLAN, batchSize: 4 }), UsageError);
    await second.close();
  });

  test("an outcome that only the server could keep is gone on with from a checkpoint", async () => {
    const storage = new MemoryStorage();
    const first = await connect(server.url, { storage });
    await first.fit(DATA, { ...PLAN, checkpointEvery: 7 });
    const put = storage.put.bind(storage);
    storage.put = () => Promise.reject(new Error("no room"));
    await assert.rejects(first.save(), NotSaved);
    await first.close();
    storage.put = put;
    const second = await connect(server.url, { storage, resume: true });
    assert.equal(second.steps, 14);
    const { steps } = await second.fit(DATA, { ...PLAN, checkpointEvery: 7, save: true });
    sameOutcome(await conclude(second, steps), undisturbed);
  });

  test("closing ends a training that runs, and leaves nothing waiting", async () => {
    const client = await connect(server.url);
    let closed: Promise<void> | undefined;
    const onStep = ({ step }: StepRecord) => void (closed ??= step === 3 ? client.close() : closed);
    await assert.rejects(client.fit(DATA, { ...PLAN, onStep }), ProtocolError);
    await closed;
    assert.equal(client.steps, 3);
    await assert.rejects(client.predict({ x: DATA.x }), ProtocolError);
  });

  test("predictions are made between steps, and change nothing", async () => {
    const client = await connect(server.url);
    const asked: Promise<Outputs>[] = [];
    const { steps } = await client.fit(DATA, {
      ...PLAN,
      onStep: () => void asked.push(client.predict({ x: DATA.x })),
    });
    assert.equal((await Promise.all(asked)).length, 15);
    sameOutcome(await conclude(client, steps), undisturbed);
  });

  test("evaluation gives the mean over all samples, whatever the batches", async () => {
    const client = await connect(server.url);
    const [whole, parts] = [
      await client.evaluate(DATA, { batchSize: SAMPLES }),
      await client.evaluate(DATA, { batchSize: 7 }),
    ];
    assert.ok(Math.abs(whole["loss"]! - parts["loss"]!) < 1e-5);
    await client.close();
  });

  test("all that leaves the device is shown, and counted", async () => {
    const seen: string[] = [];
    const client = await connect(server.url, {
      onWires: (direction, phase, wires) => seen.push(`${direction} ${phase} ${Object.keys(wires)}`),
    });
    const { steps } = await client.fit(DATA, { epochs: 1, batchSize: SAMPLES });
    assert.match(seen[0]!, /^sent train r1@server$/);
    assert.ok(!seen.some((line) => /labels|x$/.test(line)));
    assert.ok(steps[0]!.bytesUp > SAMPLES * 4 * 25 * 4);
    assert.ok(steps[0]!.bytesDown > SAMPLES * 4 * 25 * 4);
    await client.close();
  });
});

describe("with servers that go", () => {
  const storages: [string, NodeJS.Signals, (folder: string) => StateStorage][] = [
    ["memory", "SIGKILL", () => new MemoryStorage()],
    ["a folder", "SIGTERM", (place) => new FolderStorage(place)],
  ];
  let undisturbed: Outcome;
  let folder: string;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "splitonnx-state-"));
    const server = await ServerProcess.start("dropout");
    const client = await connect(server.url);
    const { steps } = await client.fit(DATA, PLAN);
    undisturbed = await conclude(client, steps);
    await server.remove();
  });

  after(() => rm(folder, { recursive: true }));

  for (const [name, signal, open] of storages) {
    test(`a server ended by ${signal} costs no step, with the state in ${name}`, async () => {
      const server = await ServerProcess.start("dropout");
      const storage = open(join(folder, "state"));
      const client = await connect(server.url, { storage, giveUpAfter: 60 });
      let ended = false;
      const { steps } = await client.fit(DATA, {
        ...PLAN,
        checkpointEvery: 4,
        save: true,
        onStep: async ({ step }) => {
          if (step !== 10 || ended) return;
          ended = true;
          await server.end(signal);
          await server.run("--resume");
        },
      });
      assert.equal(steps.length, 15);
      assert.ok(client.reconnects > 0);
      sameOutcome(await conclude(client, steps), undisturbed);

      const later = await connect(server.url, { storage });
      assert.equal(later.steps, 15); // what was saved, at both
      assert.deepEqual(later.state(), undisturbed.state);
      assert.deepEqual(await later.predict({ x: DATA.x }), undisturbed.predicted);
      await later.close();
      await server.remove();
    });
  }

  test("a server whose worker process is killed is gone on with from a checkpoint", async () => {
    const server = await ServerProcess.start("dropout", "--isolate");
    const client = await connect(server.url, { giveUpAfter: 60 });
    let killed = 0;
    const { steps } = await client.fit(DATA, {
      ...PLAN,
      checkpointEvery: 4,
      onStep: ({ step }) => {
        if (step === 10 && !killed) killed = server.killWorkers();
      },
    });
    assert.ok(killed > 0);
    assert.ok(client.reconnects > 0);
    assert.equal(steps.length, 15);
    sameOutcome(await conclude(client, steps), undisturbed);
    await server.remove();
  });

  test("steps that a prediction finds lost are made again", async () => {
    const server = await ServerProcess.start("dropout");
    const client = await connect(server.url, { giveUpAfter: 60 });
    let lost: unknown;
    const { steps } = await client.fit(DATA, {
      ...PLAN,
      checkpointEvery: 4,
      onStep: async ({ step }) => {
        if (step !== 10 || lost) return;
        await server.end("SIGKILL");
        await server.run("--resume");
        lost = await client.predict({ x: DATA.x }).catch((error: unknown) => error);
      },
    });
    assert.ok(lost instanceof StepsLost);
    assert.equal(lost.step, 8);
    sameOutcome(await conclude(client, steps), undisturbed);
    await server.remove();
  });

  test("a server that stays away is given up in the end", async () => {
    const server = await ServerProcess.start("dropout");
    const client = await connect(server.url, { giveUpAfter: 0.2 });
    await server.end();
    await assert.rejects(client.fit(DATA, PLAN), ConnectionLost);
    await server.remove();
    await assert.rejects(connect(server.url), ConnectionLost);
  });

  test("the part comes from the server itself", async () => {
    const client = join(VECTORS, "dropout/client");
    const server = await ServerProcess.start("dropout", "--client", client);
    const trained = await connect(server.url, { bundle: undefined });
    const { steps } = await trained.fit(DATA, PLAN);
    sameOutcome(await conclude(trained, steps), undisturbed);
    await server.remove();
  });

  test("a token is shown first, and without the right one nobody comes in", async () => {
    const tokens = join(folder, "tokens");
    const token = "0123456789abcdefghijklmnopqrstuv";
    const hash = createHash("sha256").update(token).digest("hex");
    await writeFile(tokens, `ana sha256:${hash}\n`, { mode: 0o600 });
    const server = await ServerProcess.start("dropout", "--token-file", tokens);
    const client = await connect(server.url, { token });
    const { steps } = await client.fit(DATA, PLAN);
    sameOutcome(await conclude(client, steps), undisturbed);
    await assert.rejects(connect(server.url, { token: "wrong".repeat(8) }), Unauthorized);
    await assert.rejects(connect(server.url), Unauthorized);
    await server.remove();
  });
});
