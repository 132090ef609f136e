/** The page: takes drawings and taps, gives the worker its orders, and shows its news. */

import {
  MAX_DRAWINGS,
  PIXELS,
  addDrawings,
  countBlocks,
  fetchDigits,
  keepDrawings,
  readDrawings,
  toImage,
} from "./drawings.js";
import type { News, Order, Plan, Samples, Wire } from "./messages.js";
import { Pad } from "./pads.js";
import { keepRun, newRun, noteCheck, noteStep, readRun } from "./runs.js";
import * as views from "./views.js";

const BATCH = 32; // digits a step
/** Milliseconds between two writings of the curves, and two drawings of them. */
const KEEP_INTERVAL = 1000;
const DRAW_INTERVAL = 200;

type Stage = "loading" | "ready" | "training" | "failed";

// The token stands behind the #, which browsers send to nobody.
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? undefined;
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const pad = new Pad(views.element<HTMLCanvasElement>("pad"), showDrawing);

let run = readRun();
let drawings = readDrawings();
let digits: { training: Samples; heldOut: Samples } | undefined;
let stage: Stage = "loading";
/** The plan under way; the run holds it once its first step is made. */
let plan: Plan | null = null;
let steps = 0;
let pace: number | null = null;
let asked = 0; // numbers predictions: an answer that comes late is not shown
let drawnAt = 0;
let keptAt = 0;
let isDrawing = false;

function order(message: Order): void {
  worker.postMessage(message);
}

function enter(next: Stage): void {
  stage = next;
  const isEnabled = stage === "ready" || stage === "training";
  views.showStart(stage === "training", isEnabled, run.plan !== null);
  if (stage === "ready") views.showStatus("ready", steps ? "Trained, and ready" : "Ready");
  if (stage === "training") views.showStatus("training", "Training");
}

function connect(): void {
  views.hideError();
  views.showStatus("busy", "Connecting …");
  enter("loading");
  order({ kind: "connect", token, resume: run.plan !== null });
}

/** Begin to train, or go on with what was broken off. */
function train(next: Plan, isResumed: boolean): void {
  if (!digits) return;
  plan = next;
  enter("training");
  const training = addDrawings(digits.training, drawings.slice(0, next.drawings));
  order({ kind: "train", plan, training, heldOut: digits.heldOut, restart: !isResumed });
}

function showDrawing(): void {
  if (!pad.strokes.length) return;
  const image = toImage(countBlocks(pad.strokes));
  views.showSeen(image);
  if (stage === "loading" || stage === "failed" || !steps) {
    views.element("guess").textContent = "It has learned nothing yet: train it.";
    return;
  }
  order({ kind: "predict", number: ++asked, image });
}

function clear(): void {
  asked++;
  pad.clear();
  views.showSeen(new Float32Array(PIXELS));
  views.showGuess(null);
}

function label(digit: number): void {
  if (!pad.strokes.length) {
    views.showDrawn(drawings.length, "Draw a digit first, then tap what it is.");
    return;
  }
  if (drawings.length >= MAX_DRAWINGS) {
    views.showDrawn(drawings.length, `No more than ${MAX_DRAWINGS} drawings are kept.`);
    return;
  }
  drawings = [...drawings, { label: digit, blocks: countBlocks(pad.strokes) }];
  keepDrawings(drawings);
  views.showDrawn(drawings.length);
  clear();
}

function forget(): void {
  if (confirm("Forget all that was trained in this browser?")) order({ kind: "forget" });
}

/** Draw figures and curves soon, but not more often than can be followed. */
function redraw(): void {
  if (isDrawing) return;
  isDrawing = true;
  const wait = Math.max(0, drawnAt + DRAW_INTERVAL - performance.now());
  setTimeout(() => {
    requestAnimationFrame(() => {
      isDrawing = false;
      drawnAt = performance.now();
      views.showRun(run, pace);
    });
  }, wait);
}

function keepNow(): void {
  keptAt = performance.now();
  keepRun(run);
}

function keepSometimes(): void {
  if (performance.now() - keptAt > KEEP_INTERVAL) keepNow();
}

function takeNews(news: News): void {
  switch (news.kind) {
    case "connected":
      return greet(news);
    case "lost":
      return views.showStatus("lost", "Connection lost, trying again …");
    case "found":
      return enter(stage);
    case "step":
      return note(news);
    case "epoch":
      noteCheck(run, news.evaluation);
      return redraw();
    case "trained":
      return finish(news.steps);
    case "wires":
      run.bytesUp += news.up;
      run.bytesDown += news.down;
      if (news.phase === "train" || stage !== "training") collect(news.wires);
      return redraw();
    case "activation":
      return views.showActivation(news.activation);
    case "prediction":
      if (news.number === asked) views.showGuess(softmax(news.logits));
      return;
    case "forgotten":
      run = newRun();
      pace = null;
      keepNow();
      redraw();
      return connect();
    case "failed":
      return fail(news);
  }
}

function greet(news: News & { kind: "connected" }): void {
  steps = news.steps;
  views.showModel(news.modelBytes);
  const unfinished = run.plan;
  if (unfinished) train(unfinished, news.isResumed);
  else enter("ready");
  if (!unfinished) showDrawing();
}

function note({ record }: News & { kind: "step" }): void {
  run.plan ??= plan;
  noteStep(run, record);
  steps = record.step;
  const milliseconds = record.seconds * 1000;
  pace = pace === null ? milliseconds : 0.9 * pace + 0.1 * milliseconds;
  keepSometimes();
  redraw();
}

function finish(total: number): void {
  steps = total;
  plan = run.plan = null;
  keepNow();
  redraw();
  enter("ready");
  showDrawing();
}

let latest: readonly Wire[] = [];

/** Show a step's wires together: the first group begins with the activation. */
function collect(wires: readonly Wire[]): void {
  const isFirst = wires.some(({ name }) => !name.endsWith("_grad"));
  latest = isFirst ? wires : [...latest, ...wires];
  if (!isFirst || stage !== "training") views.showWires(latest);
}

function fail({ during, name, message }: News & { kind: "failed" }): void {
  keepNow();
  enter("failed");
  views.showStatus("failed", "Stopped");
  views.showError(TITLES[name] ?? `It could not ${during}`, message);
}

const TITLES: Readonly<Record<string, string>> = {
  ForbiddenGraph: "The server sent a model that this page refuses to run",
  BundleError: "The server sent a model that is not whole",
  FormatError: "The server sent a model that cannot be read",
  Unauthorized: "The server wants a token",
  ConnectionLost: "The server cannot be reached",
  ServerBusy: "The server is full",
  BundleMismatch: "The server has another model now",
  SessionLost: "The server has forgotten this training",
  StaleConnection: "Another tab trains here",
  NotSaved: "The training cannot be saved",
};

function softmax(logits: Float32Array): number[] {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

async function begin(): Promise<void> {
  views.makeLabels(label);
  views.showDrawn(drawings.length);
  views.showSeen(new Float32Array(PIXELS));
  views.showRun(run, pace);
  worker.addEventListener("message", (event: MessageEvent<News>) => takeNews(event.data));
  worker.addEventListener("error", (event) => {
    fail({ kind: "failed", during: "connect", name: "", message: event.message || "no worker" });
  });
  on("clear", clear);
  on("retry", () => (digits ? connect() : location.reload()));
  on("anew", forget);
  on("forget", forget);
  on("start", () => {
    if (stage === "training") {
      order({ kind: "stop" });
      views.showStatus("training", "Stopping after this step …");
      return;
    }
    const epochs = Number(views.element<HTMLSelectElement>("epochs").value);
    train({ epochs, batchSize: BATCH, drawings: drawings.length }, false);
  });
  on("erase", () => {
    drawings = [];
    keepDrawings(drawings);
    views.showDrawn(0);
  });
  addEventListener("pagehide", keepNow);
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    pad.draw();
    views.repaint();
    redraw();
  });
  void navigator.storage?.persist?.(); // asks the browser not to clear the weights for space
  try {
    digits = await fetchDigits("digits.bin");
  } catch (error) {
    fail({ kind: "failed", during: "connect", name: "ConnectionLost", message: String(error) });
    return;
  }
  connect();
}

function on(id: string, act: () => void): void {
  views.element(id).addEventListener("click", act);
}

void begin();
