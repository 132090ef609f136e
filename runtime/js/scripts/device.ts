/**
 * One client for `benchmarks/device_cost.py`, under onnxruntime-node: makes a step for each line
 * that it reads, and prints its cost, described in `benchmarks/device_client.py`.
 *
 *     node build/scripts/device.js CLIENT_FOLDER URL BATCH SIDE
 */

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

import { MemoryStorage, SplitClient } from "../src/index.js";
import type { Ort, WebSocketLike } from "../src/index.js";
import { openFolder } from "../src/node.js";
import { ORT, SESSION_OPTIONS } from "../tests/fixtures.js";
import { openSocket } from "../tests/peers.js";

const [folder, url, ...sizes] = process.argv.slice(2) as [string, string, ...string[]];
const [batchSize, side] = sizes.map(Number) as [number, number];

let computed = 0; // milliseconds in ONNX Runtime
let waited = 0; // milliseconds between sending and the next message in which it did not compute
let bytes = 0;
let sent: { readonly at: number; readonly computed: number } | undefined;

function openWatched(address: string): WebSocketLike {
  const socket = openSocket(address);
  const send = socket.send.bind(socket);
  socket.send = (content) => {
    send(content);
    bytes += content.length;
    sent = { at: performance.now(), computed };
  };
  const listen = socket.addEventListener.bind(socket);
  socket.addEventListener = (type: string, listener: (event: never) => void) => {
    if (type !== "message") return listen(type as "open", listener as () => void);
    listen("message", (event) => {
      bytes += (event.data as ArrayBuffer).byteLength;
      if (sent) waited += performance.now() - sent.at - (computed - sent.computed);
      sent = undefined;
      listener(event as never);
    });
  };
  return socket;
}

const ort: Ort = {
  Tensor: ORT.Tensor,
  InferenceSession: {
    create: async (...given: [Uint8Array, object]) => {
      const session = await ORT.InferenceSession.create(...given);
      return {
        outputNames: session.outputNames,
        release: () => session.release(),
        run: async (feeds: Parameters<typeof session.run>[0]) => {
          const begun = performance.now();
          const outputs = await session.run(feeds);
          computed += performance.now() - begun;
          return outputs;
        },
      };
    },
  } as unknown as Ort["InferenceSession"],
};

const pixels = new Float32Array(batchSize * 3 * side * side);
for (let place = 0; place < pixels.length; place++) pixels[place] = Math.sin(place * place);
const batch = {
  x: { dims: [batchSize, 3, side, side], data: pixels },
  labels: {
    dims: [batchSize],
    data: BigInt64Array.from({ length: batchSize }, (_, row) => BigInt(row % 10)),
  },
};

/** Make one training step; return its times in seconds. */
async function measureStep(): Promise<Record<string, number>> {
  const before = { waited, bytes, start: performance.now(), own: process.cpuUsage() };
  await client.step(batch);
  const { user, system } = process.cpuUsage(before.own);
  const wall = performance.now() - before.start;
  return {
    own: (user + system) / 1e6,
    wall: wall / 1e3,
    awake: (wall - (waited - before.waited)) / 1e3,
    wire: bytes - before.bytes,
  };
}

const client = await SplitClient.connect(url, {
  ort,
  openSocket: openWatched,
  bundle: openFolder(folder),
  storage: new MemoryStorage(),
  sessionOptions: SESSION_OPTIONS,
});
for await (const _ of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await measureStep()));
}
await client.close();
const [, peak] = /VmHWM:\s+(\d+) kB/.exec(readFileSync("/proc/self/status", "utf-8"))!;
console.log(JSON.stringify({ peak: Number(peak) * 1024 }));
