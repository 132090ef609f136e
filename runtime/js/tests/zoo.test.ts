/**
 * Every model of the Python tests' zoo trains here to what the unsplit model is trained to there,
 * and takes no reply of another shape.
 */

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import type { PartyBundle } from "../src/bundles.js";
import { decodeTensors } from "../src/codecs.js";
import { giveTensor, takeTensor } from "../src/engine/engines.js";
import { MemoryStorage, SplitClient, UsageError } from "../src/index.js";
import type { Batch, FitOptions, Ort, Outputs } from "../src/index.js";
import { TRAIN } from "../src/manifests.js";
import { MAX_HEADER } from "../src/messages.js";
import { openFolder } from "../src/node.js";
import { findSampleAxis } from "../src/sample_axes.js";
import { takeRows } from "../src/tensors.js";
import type { NdArray, NdArrays } from "../src/tensors.js";
import { RUNTIMES, SESSION_OPTIONS, relate } from "./fixtures.js";
import { keepSessions } from "./kept_sessions.js";
import { tellLies, tellScales } from "./lies.js";
import { PythonPeer, openSocket } from "./peers.js";

const [BATCH, EPOCHS, SEED] = [8, 2, 3]; // as the Python side trained
const MICRO_BATCHES = 3; // of those bundles whose names say so
const TOLERANCE = 1e-4;
const ROWS = Uint32Array.from({ length: BATCH }, (_, row) => row);

let folder: string;
let peer: PythonPeer;
let names: string[];

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "splitonnx-zoo-"));
  peer = new PythonPeer(["-m", "tests.support.js_peers", folder]);
  names = JSON.parse(await peer.hear()) as string[];
});

after(async () => {
  await peer.end();
  await rm(folder, { recursive: true });
});

function read(name: string, file: string): NdArrays {
  const content = readFileSync(join(folder, name, `${file}.safetensors`));
  return decodeTensors(new Uint8Array(content), MAX_HEADER).tensors;
}

/** Read a bundle's data: arrays of rows, or a list of batches whose sizes differ. */
function readData(name: string): NdArrays | NdArrays[] {
  const batches = readdirSync(join(folder, name)).filter((file) => file.startsWith("data-"));
  if (!batches.length) return read(name, "data");
  return batches.map((_, number) => read(name, `data-${number}`));
}

function giveAll(arrays: NdArrays): Batch {
  return Object.fromEntries([...arrays].map(([key, array]) => [key, giveTensor(array)]));
}

/** Predict batches whose sizes differ: one by one, and together where their rows can be joined. */
async function predictEach(client: SplitClient, batches: readonly Batch[]): Promise<void> {
  const found: Outputs[] = [];
  for await (const outputs of client.predictBatches(batches)) found.push(outputs);
  assert.equal(found.length, batches.length);
  const { outputs, phases } = client.manifest;
  const { data: specs } = phases.find((phase) => phase.name === "predict")!;
  const axes = outputs.map((spec) => findSampleAxis(spec, specs, true));
  if (axes.includes(undefined)) return assert.rejects(client.predict(batches), UsageError);
  assert.ok(axes.every((axis) => axis === 0)); // what follows joins rows
  for (const name of Object.keys(found[0]!)) {
    const dims = found.map((outputs) => outputs[name]!.dims);
    if (new Set(dims.map((sizes) => sizes.slice(1).join())).size > 1) {
      return assert.rejects(client.predict(batches), UsageError);
    }
  }
  for (const [name, { dims, data }] of Object.entries(await client.predict(batches))) {
    const rows = found.map((outputs) => outputs[name]!.dims[0]!);
    assert.equal(dims[0], rows.reduce((sum, count) => sum + count));
    assert.deepEqual([...data], found.flatMap((outputs) => [...outputs[name]!.data]));
  }
}

/** Train by the bundle's server, and tell lies to the part; return how many. */
async function train(name: string, url: string, ort: Ort, party: PartyBundle): Promise<number> {
  const replies = new Map<string, Map<string, NdArray>>(); // the first of each phase
  const client = await SplitClient.connect(url, {
    ort,
    openSocket,
    seed: SEED,
    bundle: openFolder(join(folder, name, "bundle/client")),
    storage: new MemoryStorage(),
    sessionOptions: SESSION_OPTIONS,
    onWires: (direction, phase, wires) => {
      if (direction === "sent" || phase === "accumulate" || phase === "update") return;
      const first = replies.get(phase) ?? new Map<string, NdArray>();
      for (const [key, one] of Object.entries(wires)) {
        if (!first.has(key)) first.set(key, takeTensor(key, one));
      }
      replies.set(phase, first);
    },
  });
  const data = readData(name);
  const given = Array.isArray(data) ? data.map(giveAll) : giveAll(data);
  const accumulate = name.endsWith("-accumulated") ? MICRO_BATCHES : 1;
  const history = await client.fit(given, {
    epochs: EPOCHS, batchSize: BATCH, accumulate, save: true,
  });
  const expected = read(name, "trained");
  const losses = history.steps.map((record) => record.loss);
  const worst = [relate(losses, expected.get("#losses")!.data as Float64Array)];
  const own = Object.entries(client.state()).map(([key, { data: found }]) => [key, found] as const);
  const others = [...read(name, "bundle/server/state")].map(([key, array]) => [key, array.data] as const);
  const states = [...expected.keys()].filter((key) => !key.startsWith("#"));
  assert.equal(new Set([...own, ...others].map(([key]) => key)).size, states.length);
  for (const [key, found] of [...own, ...others]) worst.push(relate(found, expected.get(key)!.data));
  const first = Array.isArray(data)
    ? data[0]!
    : new Map([...data].map(([key, array]) => [key, takeRows(array, ROWS)]));
  await client.predict([giveAll(first)]);
  if (Array.isArray(given)) {
    const { loss } = await client.evaluate(given);
    worst.push(relate([loss!], expected.get("#evaluated")!.data as Float64Array));
    await predictEach(client, given);
  }
  await client.close();
  assert.ok(Math.max(...worst) <= TOLERANCE, `${name}: ${Math.max(...worst)}`);
  let told = 0;
  for (const [phase, sent] of replies) {
    told += await tellLies(party, ort, { phase, data: first, replies: sent });
    if (phase === TRAIN) told += await tellScales(party, ort, { phase, data: first, replies: sent });
  }
  return told;
}

/** Train from the beginning with these options; return the losses, and both sides' states. */
async function trainAnew(name: string, ort: Ort, options: FitOptions) {
  peer.say(name);
  const url = JSON.parse(await peer.hear()) as string;
  const phases: string[] = []; // of the messages, in order
  const client = await SplitClient.connect(url, {
    ort,
    openSocket,
    seed: SEED,
    bundle: openFolder(join(folder, name, "bundle/client")),
    storage: new MemoryStorage(),
    sessionOptions: SESSION_OPTIONS,
    onWires: (direction, phase) => void phases.push(`${direction} ${phase}`),
  });
  const data = readData(name);
  const given = Array.isArray(data) ? data.map(giveAll) : giveAll(data);
  const { steps } = await client.fit(given, { epochs: 1, batchSize: BATCH, ...options, save: true });
  const own = Object.entries(client.state()).map(([key, array]) => [key, [...array.data]] as const);
  await client.close();
  const others = [...read(name, "bundle/server/state")].map(([key, array]) => {
    return [key, [...array.data as Float32Array]] as const;
  });
  return { losses: steps.map(({ loss }) => loss), state: new Map([...own, ...others]), phases };
}

test("micro-batches that are under way at once give what they give one by one, bit for bit", async () => {
  // U-shaped under every runtime; vanilla, and with running statistics and states, under one each
  const chosen = names.filter((name) => /-(0|accumulated)$|_bn|^state-both/.test(name));
  const trials = chosen.flatMap((name, index) => {
    const runtimes = name.endsWith("-accumulated") ? RUNTIMES : [RUNTIMES[index % 2]!];
    return runtimes.map((runtime) => [name, runtime] as const);
  });
  let overlapping = 0;
  assert.ok(trials.length > 60);
  for (const [name, [title, ort]] of trials) {
    const { phases: _, ...expected } = await trainAnew(name, ort, { accumulate: MICRO_BATCHES });
    const { phases, ...found } = await trainAnew(name, ort, { microBatches: MICRO_BATCHES });
    assert.deepEqual(found, expected, `${name} under ${title}`);
    const first = phases.slice(phases.indexOf("sent accumulate"));
    if (first[1] === "sent accumulate") overlapping += 1;
  }
  assert.equal(overlapping, trials.length);
});

/** Train a bundle by its server, and return the bytes of the client's part afterwards. */
async function trainPlainly(name: string, ort: Ort): Promise<Map<string, Uint8Array>> {
  peer.say(name);
  const client = await SplitClient.connect(JSON.parse(await peer.hear()) as string, {
    ort, openSocket, seed: SEED, bundle: openFolder(join(folder, name, "bundle/client")),
    storage: new MemoryStorage(), sessionOptions: SESSION_OPTIONS,
  });
  await client.fit(giveAll(read(name, "data")), { epochs: EPOCHS, batchSize: BATCH });
  const state = Object.entries(client.state()).map(([key, { data }]) => {
    const { buffer, byteOffset, byteLength } = data as Float32Array;
    return [key, new Uint8Array(buffer, byteOffset, byteLength).slice()] as const;
  });
  await client.close();
  return new Map(state);
}

test("a forward stage that is computed again changes no bit", async () => {
  const repeated = names.filter((name) => name.endsWith("-recomputed"));
  assert.equal(repeated.length, 3);
  for (const name of repeated) {
    const { manifest } = await loadBundle(openFolder(join(folder, name, "bundle/client")));
    const { stages } = manifest.phases.find((phase) => phase.name === TRAIN)!;
    assert.ok(stages.some((stage) => stage.name === "head.recompute" && stage.after.length));
    for (const [title, ort] of RUNTIMES) {
      const found = await trainPlainly(name, ort);
      const expected = await trainPlainly(name.replace("-recomputed", ""), ort);
      assert.deepEqual(found, expected, `${name} under ${title}`);
    }
  }
});

// The server of a bundle trains with a client of each runtime; neither knows of the other.
test("the zoo trains under every runtime, and no lie about a shape breaks it", async () => {
  const told = new Map(RUNTIMES.map(([title]) => [title, 0])); // lies about shapes
  assert.ok(names.length > 100);
  for (const name of names) {
    peer.say(name);
    const url = JSON.parse(await peer.hear()) as string;
    const party = await loadBundle(openFolder(join(folder, name, "bundle/client")));
    for (const [title, ort] of RUNTIMES) {
      const kept = keepSessions(ort); // the client's serve for the lies, too
      const more = await train(name, url, kept.ort, party).catch((cause: unknown) => {
        throw new Error(`${name} under ${title}`, { cause });
      });
      told.set(title, told.get(title)! + more);
      await kept.release();
    }
  }
  for (const [title, count] of told) assert.ok(count > 1000, `${title}: ${count}`);
});
