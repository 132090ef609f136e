/**
 * The client, beside the page: it trains and predicts on the page's orders and sends it news.
 *
 * Everything heavy runs in here, so that the page answers taps meanwhile.
 */

import * as ort from "onnxruntime-web/wasm";
import { IndexedDbStorage, SplitClient } from "@splitonnx/client";
import type { Evaluation, Outputs, StepRecord, WebSocketLike } from "@splitonnx/client";

import type { News, Order, Samples } from "./messages.js";
import { Records } from "./records.js";
import { Reporter } from "./reports.js";
import type { Course } from "./runs.js";

const SIDE = 8; // pixels
/** What was trained survives a crash at any step, since both sides write down each. */
const CHECKPOINT_EVERY = 1;
/** Milliseconds that a share takes before the page says that it waits for others. */
const PATIENCE = 500;
/** Bytes of a message from the server at the most; a batch's are some 200 kB. */
const MAX_REPLY = 1 << 24;

// ONNX Runtime's code in WebAssembly is beside this file; one thread does for a model this small.
ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", self.location.href).href };
ort.env.wasm.numThreads = 1;

const storage = new IndexedDbStorage();
const records = new Records();
const reporter = new Reporter(tell);
let client: SplitClient | undefined;
let stopper = new AbortController();
/** The run that an earlier visit left unfinished. */
let begun: Course | null = null;
let isTraining = false;
let isLost = false;
let waiting: ReturnType<typeof setTimeout> | undefined;

function tell(news: News): void {
  postMessage(news);
}

async function connect({ token, share }: Order & { kind: "connect" }): Promise<void> {
  await client?.close();
  client = undefined;
  const run = await records.read();
  tell({ kind: "recalled", run });
  reporter.begin(run.traffic);
  begun = run.course;
  client = await open({ token, share, resume: begun !== null });
  let isResumed = begun !== null;
  if (begun && !client.checkpoints.length) {
    // It was interrupted before its first checkpoint, or after its end: there is nothing to resume.
    isResumed = false;
    if (client.steps > begun.start) begun = null;
    await client.close();
    client = await open({ token, share, resume: false });
  }
  await records.forgetAfter(client.steps);
  const sizes = client.manifest.state.map(({ role, tensor }) => {
    return role === "optimizer" ? 0 : tensor.shape.reduce<number>((n, d) => n * Number(d), 4);
  });
  const modelBytes = sizes.reduce((sum, size) => sum + size, 0);
  const plan = begun?.plan ?? null;
  const { steps, terms: { localSteps } } = client;
  tell({ kind: "connected", steps, plan, isResumed, modelBytes, localSteps });
}

async function open(
  options: { token: string | undefined; share: boolean; resume: boolean },
): Promise<SplitClient> {
  return SplitClient.connect(location.origin.replace(/^http/, "ws"), {
    ...options,
    ort,
    storage,
    openSocket,
    maxReplyBytes: MAX_REPLY,
    onReconnect(cause) {
      isLost = true;
      reporter.flush();
      tell({ kind: "lost", reason: cause.message });
    },
    onWires(direction, phase, wires) {
      if (isLost) tell({ kind: "found" });
      isLost = false;
      if (phase === "share") return noteShare(direction, wires);
      const isStep = phase === "train";
      // what is sent to measure the accuracy in between is not shown
      if (direction === "sent" && (isStep || !isTraining)) reporter.noteWires(wires, { isStep });
    },
  });
}

/** Show the weights that are sent, and say that the others are waited for, once that takes longer. */
function noteShare(direction: "sent" | "received", wires: Outputs): void {
  if (direction === "sent") {
    const weights = Object.entries(wires).filter(([name]) => name.endsWith("@own"));
    reporter.noteWires(Object.fromEntries(weights), { isStep: false });
    waiting = setTimeout(() => {
      waiting = undefined;
      reporter.flush();
      tell({ kind: "waiting" });
    }, PATIENCE);
    return;
  }
  if (waiting === undefined) tell({ kind: "found" });
  clearTimeout(waiting);
}

/** Make a websocket, and count all that goes through it. */
function openSocket(url: string): WebSocketLike {
  const socket = new WebSocket(url);
  const send = socket.send.bind(socket);
  socket.send = (content: Uint8Array<ArrayBuffer>) => {
    reporter.countBytes("up", content.byteLength);
    send(content);
  };
  socket.addEventListener("message", ({ data }) => {
    if (data instanceof ArrayBuffer) reporter.countBytes("down", data.byteLength);
  });
  return socket as WebSocketLike;
}

async function train(order: Order & { kind: "train" }): Promise<void> {
  const { plan, restart } = order;
  const course = { plan, start: restart || !begun ? connected().steps : begun.start };
  stopper = new AbortController();
  isTraining = true;
  try {
    await connected().fit(toArrays(order.training), {
      epochs: plan.epochs,
      batchSize: plan.batchSize,
      evalData: toArrays(order.heldOut),
      checkpointEvery: CHECKPOINT_EVERY,
      restart,
      save: true,
      signal: stopper.signal,
      onStep: (record) => noteStep(record, course),
      onEpoch: noteCheck,
    });
  } finally {
    isTraining = false;
    clearTimeout(waiting);
    reporter.flush();
  }
  begun = null;
  await records.keepHead({ course: null, traffic: reporter.traffic });
  tell({ kind: "trained", steps: connected().steps });
}

/** Write a step down before its checkpoint is, so that it is never missing in the curves. */
async function noteStep({ step, loss, metrics, seconds }: StepRecord, course: Course) {
  const mark = { step, loss, accuracy: metrics["accuracy"] ?? NaN };
  await records.keepMark(mark, { course, traffic: reporter.traffic });
  reporter.noteStep(mark, seconds);
}

async function noteCheck({ metrics }: Evaluation): Promise<void> {
  const check = { step: connected().steps, accuracy: metrics["accuracy"] ?? NaN };
  await records.keepCheck(check);
  reporter.flush();
  tell({ kind: "check", check });
}

async function predict({ number, image }: Order & { kind: "predict" }): Promise<void> {
  const { logits } = await connected().predict({ dims: [1, 1, SIDE, SIDE], data: image });
  if (!isTraining) reporter.flush();
  tell({ kind: "prediction", number, logits: logits!.data as Float32Array });
}

/** Forget what was trained here; what was published at the server stays there. */
async function forget(): Promise<void> {
  await client?.close();
  client = undefined;
  for (const name of await storage.list("")) await storage.delete(name);
  await records.clear();
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
