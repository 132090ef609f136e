/** What is put into a storage is there until it is deleted, wherever it is kept. */

import "fake-indexeddb/auto";

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readdir, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { decodeTensors, encodeTensors } from "../src/codecs.js";
import { BundleError, IndexedDbStorage, MemoryStorage, NotSaved } from "../src/index.js";
import type { StateStorage } from "../src/index.js";
import { FolderStorage, openFolder } from "../src/node.js";
import { CheckpointStore } from "../src/storage/checkpoints.js";
import type { Checkpoint } from "../src/storage/checkpoints.js";
import { defaultStorage } from "../src/storage/storages.js";
import { VECTORS } from "./fixtures.js";

let folder: string;
before(async () => {
  folder = await mkdtemp(join(tmpdir(), "splitonnx-storage-"));
});
after(() => rm(folder, { recursive: true }));

const STORAGES: [string, () => StateStorage][] = [
  ["memory", () => new MemoryStorage()],
  ["IndexedDB", () => new IndexedDbStorage("test")],
  ["a folder", () => new FolderStorage(folder)],
];

describe("a storage in", () => {
  for (const [name, open] of STORAGES) {
    test(name, async () => {
      const storage = open();
      assert.equal(await storage.get("a/b"), undefined);
      assert.deepEqual(await storage.list("a/"), []);
      await storage.put("a/b", Uint8Array.of(1, 2));
      await storage.put("a/c/1", Uint8Array.of(3));
      await storage.put("b", new Uint8Array(0));
      await storage.put("a/b", Uint8Array.of(4));
      assert.deepEqual([...(await storage.get("a/b"))!], [4]);
      assert.deepEqual([...(await storage.get("b"))!], []);
      assert.deepEqual([...(await storage.list("a/"))].sort(), ["a/b", "a/c/1"]);
      await storage.delete("a/b");
      await storage.delete("never");
      assert.deepEqual(await storage.list("a/"), ["a/c/1"]);
    });
  }
});

/** As much of Web Locks as is used; Node has them from version 24 on. */
class Locks {
  readonly #held = new Map<string, (error: Error) => void>();

  request(
    name: string,
    { steal = false }: { steal?: boolean },
    act: (lock: object | null) => unknown,
  ): Promise<unknown> {
    if (!steal && this.#held.has(name)) return Promise.resolve(act(null));
    this.#held.get(name)?.(new DOMException("stolen", "AbortError"));
    return new Promise((resolve, reject) => {
      this.#held.set(name, reject);
      const end = () => {
        if (this.#held.get(name) === reject) this.#held.delete(name);
      };
      Promise.resolve(act({})).then(resolve, reject).finally(end);
    });
  }
}

describe("one client at a time has the lock of", () => {
  before(() => {
    Object.defineProperty(globalThis, "navigator", { value: { locks: new Locks() }, configurable: true });
  });
  after(() => Reflect.deleteProperty(globalThis, "navigator"));

  const [keep, take] = [{ takeOver: false }, { takeOver: true }];
  for (const [name, open] of STORAGES.slice(1)) {
    test(name, async () => {
      const [one, other] = [open(), open()];
      const first = (await one.lock!("x/lock", keep))!;
      assert.equal(await other.lock!("x/lock", keep), undefined);
      assert.ok(await other.lock!("y/lock", keep)); // another model's
      await first.release();
      const second = (await other.lock!("x/lock", keep))!;
      assert.deepEqual([await first.isHeld(), await second.isHeld()], [false, true]);
      const third = (await one.lock!("x/lock", take))!;
      assert.deepEqual([await second.isHeld(), await third.isHeld()], [false, true]);
      await second.release(); // it is not its own any more
      assert.ok(await third.isHeld());
      assert.equal(await other.lock!("x/lock", keep), undefined);
      assert.deepEqual(await one.list("x"), []);
      await third.release();
    });
  }

  test("a folder whose process was killed", async () => {
    const module = new URL("../src/node.js", import.meta.url).href;
    const script = `import { FolderStorage } from ${JSON.stringify(module)};
      const lock = await new FolderStorage(${JSON.stringify(folder)}).lock("k/lock", { takeOver: false });
      console.log(!!lock);
      setInterval(() => {}, 1000);`;
    const child = spawn(process.execPath, ["--input-type=module", "-e", script]);
    const [line] = (await once(child.stdout, "data")) as [Buffer];
    assert.equal(line.toString().trim(), "true");
    const storage = new FolderStorage(folder);
    assert.equal(await storage.lock("k/lock", keep), undefined);
    child.kill("SIGKILL");
    await once(child, "exit");
    const lock = await storage.lock("k/lock", keep);
    assert.ok(lock && (await lock.isHeld()));
    assert.deepEqual(await readdir(join(folder, "k")), ["lock"]);
  });
});

test("what IndexedDB keeps is there for the next page", async () => {
  await new IndexedDbStorage("kept").put("x", Uint8Array.of(7));
  assert.deepEqual([...(await new IndexedDbStorage("kept").get("x"))!], [7]);
});

test("where there is IndexedDB it is what is used", () => {
  assert.ok(defaultStorage() instanceof IndexedDbStorage);
});

test("a folder's storage does not lead out of it", async () => {
  await assert.rejects(new FolderStorage(folder).put("../x", Uint8Array.of(1)), BundleError);
});

test("a file that cannot be put leaves nothing", async () => {
  const storage = new FolderStorage(folder);
  await storage.put("taken/x", Uint8Array.of(1));
  await assert.rejects(storage.put("taken/x.safetensors/y", Uint8Array.of(1)));
  assert.deepEqual(await readdir(join(folder, "taken")), ["x.safetensors"]);
});

test("what is not a regular file is not waited for, nor read without end", async () => {
  const fifo = join(folder, "fifo");
  execFileSync("mkfifo", [fifo]);
  await symlink("/dev/zero", join(folder, "zero"));
  await writeFile(join(folder, "long"), new Uint8Array(11));
  const read = openFolder(folder);
  await assert.rejects(read("fifo", 10), /regular file/);
  await assert.rejects(read("zero", 10), /regular file/);
  await assert.rejects(read(".", 10), BundleError);
  await assert.rejects(read("long", 10), /11 bytes, over the limit of 10/);
  assert.equal((await read("long", 11)).length, 11);
  const storage = new FolderStorage(folder);
  execFileSync("mkfifo", [join(folder, "pipe.safetensors")]);
  await assert.rejects(storage.get("pipe"), /regular file/);
});

describe("a session's checkpoints", () => {
  const session = "0123456789abcdef".repeat(2);

  async function open(storage: StateStorage) {
    const { manifest, state } = await loadBundle(openFolder(join(VECTORS, "tiny")));
    const make = (step: number): Checkpoint => {
      return { session, step, tensors: state, position: null, written: step };
    };
    return { store: new CheckpointStore(storage, manifest), make, manifest };
  }

  test("are the newest two, and none of a course that was left", async () => {
    const { store, make } = await open(new MemoryStorage());
    assert.deepEqual(await store.write(make(10)), [10]);
    assert.deepEqual(await store.write(make(20)), [20, 10]);
    assert.deepEqual(await store.write(make(30)), [30, 20]);
    assert.deepEqual(await store.write(make(25)), [25, 20]);
    assert.deepEqual(await store.rewind(session, 20), [20]);
    assert.deepEqual((await store.read(session, 20)).written, 20);
    await assert.rejects(store.read(session, 25), BundleError);
    await store.remove(session);
    assert.deepEqual(await store.sessions(), []);
  });

  test("are read back with their place in the data", async () => {
    const { store, make } = await open(new MemoryStorage());
    const position = {
      epoch: 1, batch: 2, batchSize: 8, seed: 3, shuffle: true, samples: null, schedule: "cosine",
      unsharedSteps: 1, unsharedSamples: 8, round: 3, accumulate: 2,
    };
    await store.write({ ...make(5), position });
    assert.deepEqual((await store.read(session, 5)).position, position);
  });

  test("that were altered are none", async () => {
    const storage = new MemoryStorage();
    const { store, make } = await open(storage);
    await store.write(make(5));
    const [name] = await storage.list("");
    const content = (await storage.get(name!))!;
    await storage.put(name!, content.subarray(0, -1));
    await assert.rejects(store.read(session, 5), BundleError);
    await storage.put(name!, content);
    await storage.put(name!.replace(/5$/, "6"), content); // another step's name
    await assert.rejects(store.read(session, 6), BundleError);
  });

  test("are refused whichever of their bits flips", async () => {
    const storage = new MemoryStorage();
    const { store, make } = await open(storage);
    await store.write(make(5));
    await store.publish(make(5));
    for (const name of await storage.list("")) {
      const content = (await storage.get(name))!;
      const read = () => (name.endsWith("/state") ? store.readOutcome() : store.read(session, 5));
      await read();
      for (let place = 0; place < content.length; place++) {
        const altered = content.slice();
        altered[place]! ^= 1 << place % 8;
        await storage.put(name, altered);
        await assert.rejects(read, BundleError, `byte ${place} of ${content.length}`);
      }
      await storage.put(name, content);
    }
  });

  test("of before there were checksums are read", async () => {
    const storage = new MemoryStorage();
    const { store, make } = await open(storage);
    await store.write(make(5));
    const [name] = await storage.list("");
    const { tensors, metadata } = decodeTensors((await storage.get(name!))!, 1 << 20);
    const facts = metadata.get("splitonnx")!;
    await storage.put(name!, encodeTensors(tensors, { splitonnx: facts }));
    assert.equal((await store.read(session, 5)).step, 5);
  });

  test("with values that are not finite are no outcome", async () => {
    const { store, make } = await open(new MemoryStorage());
    await store.publish(make(5));
    for (const value of [NaN, Infinity]) {
      const { tensors, ...facts } = make(6);
      const spoilt = new Map(tensors);
      const data = (tensors.get("W1.m")!.data as Float32Array).slice().fill(value, 7, 8);
      spoilt.set("W1.m", { ...tensors.get("W1.m")!, data });
      await assert.rejects(store.publish({ ...facts, tensors: spoilt }), (error: Error) => {
        assert.ok(error instanceof NotSaved);
        assert.match(error.message, /'W1.m' holds NaN or infinity; train again .* learning rate/);
        return true;
      });
    }
    assert.equal((await store.readOutcome())!.step, 5);
  });

  test("that cannot be put are told of", async () => {
    const storage = new MemoryStorage();
    storage.put = () => Promise.reject(new DOMException("no room", "QuotaExceededError"));
    const { store, make } = await open(storage);
    await assert.rejects(store.write(make(5)), NotSaved);
  });
});
