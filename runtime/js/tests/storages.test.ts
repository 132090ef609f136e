/** What is put into a storage is there until it is deleted, wherever it is kept. */

import "fake-indexeddb/auto";

import assert from "node:assert/strict";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { CheckpointStore } from "../src/checkpoints.js";
import type { Checkpoint } from "../src/checkpoints.js";
import { BundleError, IndexedDbStorage, MemoryStorage, NotSaved } from "../src/index.js";
import type { StateStorage } from "../src/index.js";
import { FolderStorage, openFolder } from "../src/node.js";
import { defaultStorage } from "../src/storages.js";
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
    const position = { epoch: 1, batch: 2, batchSize: 8, seed: 3, shuffle: true, samples: null };
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

  test("that cannot be put are told of", async () => {
    const storage = new MemoryStorage();
    storage.put = () => Promise.reject(new DOMException("no room", "QuotaExceededError"));
    const { store, make } = await open(storage);
    await assert.rejects(store.write(make(5)), NotSaved);
  });
});
