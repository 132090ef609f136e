/**
 * One fit of a client at a time, and a storage that is free again after every fit that fails.
 *
 * `tests/runtime/client/test_lone_fits.py` holds the client in Python to the same.
 */

import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, describe, test } from "node:test";

import {
  BundleError,
  NotSaved,
  ProtocolError,
  StorageInUse,
  UnfinishedRun,
  UsageError,
} from "../src/index.js";
import type { FitOptions, SplitClient, StorageLock } from "../src/index.js";
import { FolderStorage } from "../src/node.js";
import { CheckpointStore } from "../src/storage/checkpoints.js";
import { DATA, Liar, MANIFEST, connectTo, welcome } from "./liars.js";

const PLAN = { epochs: 4, batchSize: 6 }; // 4 steps
const LOCK = new CheckpointStore(new FolderStorage(""), MANIFEST).lockName;

let server: Liar;
let folder: string;
before(async () => {
  server = new Liar();
  await server.start();
});
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "splitonnx-fits-"));
});
afterEach(() => rm(folder, { recursive: true }));
after(() => server.end());

function open(options: { resume?: boolean; storage?: FolderStorage } = {}): Promise<SplitClient> {
  return connectTo(server, { storage: new FolderStorage(folder), giveUpAfter: 0, ...options });
}

async function takeLock(): Promise<StorageLock | undefined> {
  return new FolderStorage(folder).lock(LOCK, { takeOver: false });
}

async function expectFree(): Promise<void> {
  const lock = await takeLock();
  assert.ok(lock, "the storage is locked");
  await lock.release();
}

/** Leave a run unfinished at step 2. */
async function breakOff(): Promise<void> {
  const client = await open();
  const stop = new AbortController();
  const onStep = ({ step }: { step: number }) => void (step === 2 && stop.abort());
  await client.fit(DATA, { ...PLAN, checkpointEvery: 1, signal: stop.signal, onStep });
  await client.close();
}

describe("the storage is free after", () => {
  for (const number of ["epochs", "batchSize", "checkpointEvery"]) {
    test(`a fit whose ${number} is 0, which did not even ask for it`, async () => {
      const storage = new FolderStorage(folder);
      storage.lock = () => assert.fail("it was locked");
      const client = await open({ storage });
      await assert.rejects(client.fit(DATA, { save: true, [number]: 0 }), UsageError);
      await client.close();
    });
  }

  test("a fit beside an unfinished run, which can be resumed as it says", async () => {
    await breakOff();
    const client = await open();
    const options = { ...PLAN, checkpointEvery: 1, save: true };
    await assert.rejects(client.fit(DATA, options), UnfinishedRun);
    await expectFree();
    const second = await open({ resume: true });
    const { steps } = await second.fit(DATA, { ...PLAN, checkpointEvery: 1 });
    assert.deepEqual(steps.map(({ step }) => step), [3, 4]);
    await second.close();
    await client.close();
  });

  test("a run resumed with other batches, whose position stays known", async () => {
    await breakOff();
    const client = await open({ resume: true });
    const others = { ...PLAN, batchSize: 3, checkpointEvery: 1 };
    await assert.rejects(client.fit(DATA, others), UsageError);
    await expectFree();
    const { steps } = await client.fit(DATA, { ...PLAN, checkpointEvery: 1 });
    assert.deepEqual(steps.map(({ step }) => step), [3, 4]);
    await client.close();
  });

  test("a run resumed with another schedule, and its own has the rates of the whole run", async () => {
    const schedule = { kind: "linear", warmup: 1 } as const;
    const plan = { ...PLAN, checkpointEvery: 1, learningRate: 3 };
    const stop = new AbortController();
    const onStep = ({ step }: { step: number }) => void (step === 2 && stop.abort());
    const first = await open();
    const begun = await first.fit(DATA, { ...plan, schedule, signal: stop.signal, onStep });
    await first.close();
    const client = await open({ resume: true });
    await assert.rejects(client.fit(DATA, plan), /begun with schedule linear.*4 steps, not none/);
    await expectFree();
    const rest = await client.fit(DATA, { ...plan, schedule });
    const rates = [...begun.steps, ...rest.steps].map(({ learningRate }) => learningRate);
    assert.deepEqual(rates.map((rate) => Math.round(rate * 1e6) / 1e6), [0, 3, 2, 1]);
    await client.close();
  });

  test("an error that a callback throws", async () => {
    const client = await open();
    const onStep = () => {
      throw new RangeError("mine");
    };
    await assert.rejects(client.fit(DATA, { ...PLAN, save: true, onStep }), RangeError);
    await expectFree();
    const { steps } = await client.fit(DATA, PLAN);
    assert.equal(steps.length, 4);
    await client.close();
  });

  test("an outcome that cannot be saved", async () => {
    const storage = new FolderStorage(folder);
    storage.put = () => Promise.reject(new Error("no room"));
    const client = await open({ storage });
    await client.fit(DATA, PLAN);
    await assert.rejects(client.save(), NotSaved);
    await expectFree();
    await client.close();
  });

  const ASKING: [string, (client: SplitClient) => Promise<unknown>][] = [
    ["fit", (client) => client.fit(DATA, { ...PLAN, save: true })],
    ["save", (client) => client.save()],
  ];
  for (const [name, ask] of ASKING) {
    test(`closing while ${name} locks it`, async () => {
      const storage = new FolderStorage(folder);
      const lock = storage.lock.bind(storage);
      let [letGo, wasAsked] = [() => {}, () => {}];
      const mayGo = new Promise<void>((resolve) => (letGo = resolve));
      const asked = new Promise<void>((resolve) => (wasAsked = resolve));
      storage.lock = async (name, options) => {
        wasAsked();
        await mayGo;
        return lock(name, options);
      };
      const client = await open({ storage });
      const ended = assert.rejects(ask(client), ProtocolError);
      await asked;
      const closed = client.close();
      letGo();
      await Promise.all([ended, closed]);
      await expectFree();
    });
  }

  test("a resumed run whose step cannot be gone back to", async (t) => {
    await breakOff();
    server.lies.welcome = (hello) => welcome(hello, { step: 1 });
    t.after(() => (server.lies = {}));
    const storage = new FolderStorage(folder);
    storage.get = async (name) => {
      const content = await FolderStorage.prototype.get.call(storage, name);
      return name.endsWith("/1") ? undefined : content; // the state of step 1 is gone
    };
    await assert.rejects(open({ resume: true, storage }), BundleError);
    await expectFree();
  });
});

describe("a second fit", () => {
  const OTHERS: FitOptions[] = [{}, { save: true }, { checkpointEvery: 1, restart: true }];

  for (const others of OTHERS) {
    test(`with ${JSON.stringify(others)} is refused at once, and harms nothing`, async () => {
      const alone = await connectTo(server);
      const expected = await alone.fit(DATA, PLAN);
      const client = await open();
      const first = client.fit(DATA, { ...PLAN, save: true, checkpointEvery: 2 });
      await assert.rejects(client.fit(DATA, { ...PLAN, ...others }), {
        name: "UsageError",
        message: "this client is already training",
      });
      const { steps } = await first;
      assert.deepEqual(steps.map(({ loss }) => loss), expected.steps.map(({ loss }) => loss));
      assert.deepEqual(client.state(), alone.state());
      await expectFree();
      assert.equal((await client.fit(DATA, PLAN)).steps.length, 4);
      await Promise.all([client.close(), alone.close()]);
    });
  }

  test("or a step from within the first is refused, and the storage stays the first one's", async () => {
    const client = await open();
    const onStep = async () => {
      await assert.rejects(client.fit(DATA, { ...PLAN, checkpointEvery: 1 }), UsageError);
      await assert.rejects(client.step(DATA), UsageError);
      assert.equal(await takeLock(), undefined);
    };
    const { steps } = await client.fit(DATA, { ...PLAN, save: true, onStep });
    assert.deepEqual(steps.map(({ step }) => step), [1, 2, 3, 4]);
    await client.close();
  });
});

test("what is saved between two steps leaves the storage to the fit that runs", async () => {
  const client = await open();
  const onStep = async ({ step }: { step: number }) => {
    if (step === 2) await client.save();
    const second = await open();
    await assert.rejects(second.fit(DATA, { ...PLAN, save: true }), StorageInUse);
    await second.close();
  };
  await client.fit(DATA, { ...PLAN, save: true, checkpointEvery: 3, onStep });
  await expectFree();
  await client.close();
});
