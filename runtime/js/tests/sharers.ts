/** Clients that share their weights with servers, and the data that they train on. */

import { join } from "node:path";

import { loadBundle } from "../src/bundles.js";
import { MemoryStorage, SplitClient } from "../src/index.js";
import type { ConnectOptions, FitOptions } from "../src/index.js";
import { openFolder } from "../src/node.js";
import { listJoined } from "../src/sharing.js";
import { ORT, SESSION_OPTIONS, VECTORS } from "./fixtures.js";
import { ServerProcess, openSocket } from "./peers.js";

export const CLIENT = join(VECTORS, "dropout/client");
export const SEED = 9;
export const PLAN = { epochs: 1, batchSize: 8 };
export const PLAN_STEPS = 5;
export const JOINED = listJoined((await loadBundle(openFolder(CLIENT))).manifest);
/** Two local steps a round: five steps are two rounds, and one step to share at the end. */
export const followPolicy = (name: string) => ["--policy", name, "--local-steps", "2"];
/** A round waits for each of two clients. */
export const TWO = ["--clients-min", "2", "--round-timeout", "60"];

export function makeData(samples: number, seed: number) {
  let word = seed;
  const next = () => (word = (Math.imul(word, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const pixels = Float32Array.from({ length: samples * 50 }, () => next() * 2 - 1);
  const labels = BigInt64Array.from({ length: samples }, () => BigInt(Math.floor(next() * 3)));
  return { x: { dims: [samples, 2, 5, 5], data: pixels }, labels: { dims: [samples], data: labels } };
}

/** Of different sizes, so that an average that did not weigh would differ. */
export const [OURS, OTHERS] = [makeData(40, 1), makeData(36, 2)];

export function connect(url: string, options: Partial<ConnectOptions> = {}): Promise<SplitClient> {
  return SplitClient.connect(url, {
    ort: ORT,
    openSocket,
    seed: SEED,
    share: true,
    bundle: openFolder(CLIENT),
    storage: new MemoryStorage(),
    sessionOptions: SESSION_OPTIONS,
    ...options,
  });
}

export async function train(url: string, fit: FitOptions = {}, options: Partial<ConnectOptions> = {}) {
  const client = await connect(url, options);
  const { steps } = await client.fit(OURS, { ...PLAN, ...fit });
  const state = client.state();
  await client.close();
  return { client, steps, state };
}

export async function serve(t: { after(act: () => Promise<void>): void }, ...options: string[]) {
  const server = await ServerProcess.start("dropout", ...followPolicy("splitfed-v1"), ...options);
  t.after(() => server.remove());
  return server;
}
