/**
 * The client, beside the page: it trains and predicts on the page's orders and sends it news.
 *
 * Everything heavy runs in here, so that the page answers taps meanwhile.
 */

import * as ort from "onnxruntime-web/wasm";
import { IndexedDbStorage, SplitClient } from "@splitonnx/client";
import type { Outputs, WebSocketLike } from "@splitonnx/client";

import type { News, Order, Samples, Wire } from "./messages.js";

const SIDE = 8; // pixels
/** Milliseconds between two pictures of what leaves the device. */
const PICTURE_INTERVAL = 250;
/** What was trained survives a crash at any step, since both sides write down each. */
const CHECKPOINT_EVERY = 1;

// ONNX Runtime's code in WebAssembly lies beside this file; one thread does for a model this small.
ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", self.location.href).href };
ort.env.wasm.numThreads = 1;

const storage = new IndexedDbStorage();
let client: SplitClient | undefined;
let stopper = new AbortController();
let pictured = -Infinity;
let isLost = false;
/** Bytes of messages that the page has not been told of. */
const traffic = { up: 0, down: 0 };

function tell(news: News): void {
  postMessage(news);
}

async function connect({ token, resume }: Order & { kind: "connect" }): Promise<void> {
  await client?.close();
  client = undefined;
  client = await open(token, resume);
  let isResumed = resume;
  if (resume && !client.checkpoints.length) {
    // It was broken off before its first checkpoint, or after its last word: nothing to go on with.
    await client.close();
    client = await open(token, false);
    isResumed = false;
  }
  const sizes = client.manifest.state.map(({ role, tensor }) => {
    return role === "optimizer" ? 0 : tensor.shape.reduce<number>((n, d) => n * Number(d), 4);
  });
  const modelBytes = sizes.reduce((sum, size) => sum + size, 0);
  tell({ kind: "connected", steps: client.steps, isResumed, modelBytes });
}

async function open(token: string | undefined, resume: boolean): Promise<SplitClient> {
  return SplitClient.connect(location.origin.replace(/^http/, "ws"), {
    ort,
    token,
    storage,
    resume,
    openSocket,
    onReconnect(cause) {
      isLost = true;
      tell({ kind: "lost", reason: cause.message });
    },
    onWires(direction, phase, wires) {
      if (isLost) tell({ kind: "found" });
      isLost = false;
      if (direction === "sent") showWires(phase, wires);
    },
  });
}

/** Make a websocket, and count all that goes through it. */
function openSocket(url: string): WebSocketLike {
  const socket = new WebSocket(url);
  const send = socket.send.bind(socket);
  socket.send = (content: Uint8Array<ArrayBuffer>) => {
    traffic.up += content.byteLength;
    send(content);
  };
  socket.addEventListener("message", ({ data }) => {
    if (data instanceof ArrayBuffer) traffic.down += data.byteLength;
  });
  return socket as WebSocketLike;
}

function showWires(phase: string, outputs: Outputs): void {
  const wires: Wire[] = Object.entries(outputs).map(([name, { dims, data }]) => {
    return { name, dims, bytes: (data as Float32Array).byteLength };
  });
  tell({ kind: "wires", phase, wires, ...traffic });
  traffic.up = traffic.down = 0;
  const now = performance.now();
  if (phase === "train" && now - pictured < PICTURE_INTERVAL) return;
  for (const { dims, data } of Object.values(outputs)) {
    const [, channels = 0, height = 0, width = 0] = dims;
    if (height !== SIDE || !(data instanceof Float32Array)) continue; // a gradient of the tail's
    pictured = now;
    const first = data.slice(0, channels * height * width);
    tell({ kind: "activation", activation: { dims: [channels, height, width], data: first } });
  }
}

async function train(order: Order & { kind: "train" }): Promise<void> {
  const { epochs, batchSize } = order.plan;
  stopper = new AbortController();
  await connected().fit(toArrays(order.training), {
    epochs,
    batchSize,
    evalData: toArrays(order.heldOut),
    checkpointEvery: CHECKPOINT_EVERY,
    restart: order.restart,
    save: true,
    signal: stopper.signal,
    onStep: (record) => tell({ kind: "step", record }),
    onEpoch: (evaluation) => tell({ kind: "epoch", evaluation }),
  });
  tell({ kind: "trained", steps: connected().steps });
}

async function predict({ number, image }: Order & { kind: "predict" }): Promise<void> {
  const { logits } = await connected().predict({ dims: [1, 1, SIDE, SIDE], data: image });
  tell({ kind: "prediction", number, logits: logits!.data as Float32Array });
}

/** Forget what was trained here; what was published at the server stays there. */
async function forget(): Promise<void> {
  await client?.close();
  client = undefined;
  for (const name of await storage.list("")) await storage.delete(name);
  tell({ kind: "forgotten" });
}

function connected(): SplitClient {
  if (!client) throw new Error("there is no connection yet");
  return client;
}

function toArrays({ images, labels }: Samples) {
  return {
    image: { dims: [labels.length, 1, SIDE, SIDE], data: images },
    labels: { dims: [labels.length], data: labels },
  };
}

async function obey(order: Order): Promise<void> {
  switch (order.kind) {
    case "connect":
      return connect(order);
    case "train":
      return train(order);
    case "stop":
      return stopper.abort();
    case "predict":
      return predict(order);
    case "forget":
      return forget();
  }
}

addEventListener("message", (event: MessageEvent<Order>) => {
  const order = event.data;
  obey(order).catch((error: unknown) => {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    tell({ kind: "failed", during: order.kind, name, message });
  });
});
