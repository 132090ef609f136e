/** The page: receives drawings and taps, sends orders to the worker, and shows its news. */

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
import { draw } from "./frames.js";
import type { News, Order, Plan, Progress, Samples } from "./messages.js";
import { Pad } from "./pads.js";
import { forgetFrom, newRun, noteCheck, noteMark } from "./runs.js";
import * as views from "./views.js";

const BATCH = 32; // digits a step

type Stage = "loading" | "ready" | "training" | "failed";

// The token is behind the #, which browsers send to nobody.
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? undefined;
/** Whether the user permits to share the weights, in this browser. */
const SHARE = "share";
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const pad = new Pad(views.element<HTMLCanvasElement>("pad"), showDrawing);

let run = newRun();
let drawings = readDrawings();
let digits: { training: Samples; heldOut: Samples } | undefined;
let stage: Stage = "loading";
/** Whether a training was begun whose data must stay as they are. */
let isUnfinished = false;
let steps = 0;
let pace: number | null = null;
let asked = 0; // numbers predictions: an answer that comes late is not shown

function order(message: Order): void {
  worker.postMessage(message);
}

function enter(next: Stage): void {
  stage = next;
  const isEnabled = stage === "ready" || stage === "training";
  views.showStart(stage === "training", isEnabled, isUnfinished);
  views.showShare(mayShare(), stage === "ready" || stage === "failed");
  if (stage === "ready") views.showStatus("ready", steps ? "Trained, and ready" : "Ready");
  if (stage === "training") views.showStatus("training", "Training");
}

function connect(): void {
  views.hideError();
  views.showStatus("busy", "Connecting …");
  enter("loading");
  order({ kind: "connect", token, share: mayShare() });
}

function mayShare(): boolean {
  return localStorage.getItem(SHARE) === "yes";
}

/** Permit to share the weights, or no longer; the server has to hear of it before training. */
function permitSharing(isPermitted: boolean): void {
  localStorage.setItem(SHARE, isPermitted ? "yes" : "no");
  if (digits) connect();
}

/** Begin to train, or continue a run that was interrupted. */
function train(plan: Plan, isResumed: boolean): void {
  if (!digits) return;
  enter("training");
  const training = addDrawings(digits.training, drawings.slice(0, plan.drawings));
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

/** Draw figures and curves with the next frames. */
function redraw(): void {
  draw("figures", () => views.showFigures(run, pace));
  draw("loss", () => views.showLoss(run));
  draw("accuracy", () => views.showAccuracy(run));
}

function takeNews(news: News): void {
  switch (news.kind) {
    case "recalled":
      ({ run } = news);
      pace = null;
      return redraw();
    case "connected":
      return greet(news);
    case "lost":
      return views.showStatus("lost", "Connection lost, trying again …");
    case "found":
      return enter(stage);
    case "waiting":
      return views.showStatus("training", "Waiting for the other devices …");
    case "progress":
      return note(news);
    case "check":
      noteCheck(run, news.check);
      return redraw();
    case "trained":
      return finish(news.steps);
    case "prediction":
      if (news.number === asked) views.showGuess(softmax(news.logits));
      return;
    case "forgotten":
      return connect();
    case "failed":
      return fail(news);
  }
}

function greet(news: News & { kind: "connected" }): void {
  ({ steps } = news);
  forgetFrom(run, steps + 1);
  isUnfinished = news.plan !== null;
  views.showModel(news.modelBytes, news.localSteps);
  redraw();
  if (news.plan) return train(news.plan, news.isResumed);
  enter("ready");
  showDrawing();
}

function note(progress: Progress): void {
  for (const mark of progress.marks) noteMark(run, mark);
  isUnfinished ||= progress.marks.length > 0;
  ({ pace } = progress);
  run.traffic = progress.traffic;
  steps = run.marks.at(-1)?.step ?? steps;
  redraw();
  const { activation, wires } = progress;
  if (wires.length) draw("wires", () => views.showWires(wires));
  if (activation) draw("activation", () => views.showActivation(activation));
}

function finish(total: number): void {
  steps = total;
  isUnfinished = false;
  enter("ready");
  showDrawing();
}

function fail({ during, name, message }: News & { kind: "failed" }): void {
  enter("failed");
  views.showStatus("failed", "Stopped");
  const advice = name === "SharingNotPermitted" ? `. ${PERMIT}` : "";
  views.showError(TITLES[name] ?? `It could not ${during}`, message + advice);
}

const PERMIT =
  "On this page, “Share the weights of this device's layers”, under Train, permits it.";

const TITLES: Readonly<Record<string, string>> = {
  ForbiddenGraph: "The server sent a model that this page refuses to run",
  BundleError: "The server sent a model that is not whole",
  FormatError: "The server sent a model that cannot be read",
  Unauthorized: "The server wants a token",
  SharingNotPermitted: "The server asks for this device's weights",
  ConnectionLost: "The server cannot be reached",
  ServerBusy: "The server is full",
  BundleMismatch: "The server has another model now",
  SessionLost: "The server has forgotten this training",
  StaleConnection: "Another tab trains here",
  StorageInUse: "Another tab trains here",
  NotSaved: "The training cannot be saved",
  RemoteProtocolError: "The server does not keep to the rules",
  ArrayMismatch: "The server sent numbers that do not fit",
  NotFinite: "Training came to NaN or infinity",
  MessageTooLarge: "A message is too large",
  RemoteFault: "The server reports an error",
  StageFailed: "The model does not run here",
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
  on("share", () => permitSharing(views.element<HTMLInputElement>("share").checked));
  on("erase", () => {
    drawings = [];
    keepDrawings(drawings);
    views.showDrawn(0);
  });
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
