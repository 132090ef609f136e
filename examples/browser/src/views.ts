/** What the page shows: each function writes one thing into the document. */

import { drawCurves } from "./charts.js";
import { drawActivation, drawImage } from "./pictures.js";
import type { Activation, Wire } from "./messages.js";
import type { Run } from "./runs.js";

const LABELS = 10;

export type Status = "busy" | "ready" | "training" | "lost" | "failed";

/** Find an element that the page is known to have. */
export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found as T;
}

function write(id: string, text: string): void {
  const node = element(id);
  if (node.textContent !== text) node.textContent = text;
}

export function showStatus(state: Status, text: string): void {
  element("status").dataset["state"] = state;
  write("status", text);
}

export function showError(title: string, text: string): void {
  write("error-title", title);
  write("error-text", text);
  element("error").hidden = false;
}

export function hideError(): void {
  element("error").hidden = true;
}

/** Make the ten buttons; `choose` is called with the one that was tapped. */
export function makeLabels(choose: (label: number) => void): void {
  for (let label = 0; label < LABELS; label++) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = String(label);
    button.setAttribute("aria-label", `It is a ${label}`);
    button.addEventListener("click", () => choose(label));
    element("labels").append(button);
  }
}

/** Show how likely each digit is; nothing without shares. */
export function showGuess(shares: readonly number[] | null): void {
  const best = shares ? shares.indexOf(Math.max(...shares)) : -1;
  [...element("labels").children].forEach((button, label) => {
    (button as HTMLElement).style.setProperty("--share", String(shares?.[label] ?? 0));
    button.toggleAttribute("data-best", label === best);
  });
  const sure = shares ? Math.round(100 * shares[best]!) : 0;
  write("guess", shares ? `It looks like a ${best} (${sure} %).` : "Draw, and the model says what it sees.");
}

let seen: ArrayLike<number> | undefined;
let left: Activation | undefined;

/** Paint the pictures again, in the page's new colours. */
export function repaint(): void {
  if (seen) showSeen(seen);
  if (left) showActivation(left);
}

export function showSeen(image: ArrayLike<number>): void {
  seen = image;
  drawImage(element<HTMLCanvasElement>("seen"), image);
}

export function showDrawn(count: number, message?: string): void {
  const own = count === 1 ? "One drawing of yours" : `${count} drawings of yours`;
  const text = count ? `${own}, each counted ten times.` : "No drawings of yours yet.";
  write("drawn", message ?? text);
  element("erase").hidden = !count;
}

/** `isUnfinished`: what is trained on must stay as it is. */
export function showStart(isTraining: boolean, isEnabled: boolean, isUnfinished: boolean): void {
  write("start", isTraining ? "Stop" : "Start training");
  element<HTMLButtonElement>("start").disabled = !isEnabled;
  element<HTMLSelectElement>("epochs").disabled = isTraining;
  element<HTMLButtonElement>("forget").disabled = isTraining;
  element<HTMLButtonElement>("erase").disabled = isTraining || isUnfinished;
}

/** Show whether the user permits to share the weights, and whether that can be changed now. */
export function showShare(isPermitted: boolean, isEnabled: boolean): void {
  const box = element<HTMLInputElement>("share");
  box.checked = isPermitted;
  box.disabled = !isEnabled;
}

/** Show the run's figures; `pace` is milliseconds a step. */
export function showFigures({ marks, checks, traffic }: Run, pace: number | null): void {
  const last = marks.at(-1);
  const held = checks.at(-1);
  write("steps", String(last?.step ?? 0));
  write("loss", last ? last.loss.toFixed(3) : "–");
  write("accuracy", held ? formatShare(held.accuracy) : "–");
  write("pace", pace === null ? "–" : pace.toFixed(0));
  write("up", formatBytes(traffic.up));
  write("down", formatBytes(traffic.down));
}

export function showLoss({ marks }: Run): void {
  const canvas = element<HTMLCanvasElement>("loss-curve");
  drawCurves(canvas, {
    noisy: marks.map(({ step, loss }) => ({ step, value: loss })),
    format: (value) => value.toFixed(1),
  });
  const last = marks.at(-1);
  if (last) describe(canvas, `Loss: ${last.loss.toFixed(3)} after ${last.step} steps`);
}

export function showAccuracy({ marks, checks }: Run): void {
  const canvas = element<HTMLCanvasElement>("accuracy-curve");
  drawCurves(canvas, {
    noisy: marks.map(({ step, accuracy }) => ({ step, value: accuracy })),
    dots: checks.map(({ step, accuracy }) => ({ step, value: accuracy })),
    top: 1,
    format: (value) => `${Math.round(100 * value)} %`,
  });
  const last = marks.at(-1);
  const held = checks.at(-1);
  if (!last) return;
  const reached = held ? `, ${formatShare(held.accuracy)} on held-out digits` : "";
  describe(canvas, `Accuracy: ${formatShare(last.accuracy)} in the last batch${reached}`);
}

let listed = "";

/** List the tensors last sent; nothing is done where they are like those before. */
export function showWires(wires: readonly Wire[]): void {
  const list = JSON.stringify(wires);
  if (list === listed) return;
  listed = list;
  const rows = wires.map(({ name, dims, bytes }) => {
    const row = document.createElement("tr");
    const kind = name.endsWith("@own") ? "weights" : name.endsWith("_grad") ? "gradient" : "activation";
    for (const text of [kind, dims.join(" × "), (bytes / 1000).toFixed(1)]) {
      row.append(Object.assign(document.createElement("td"), { textContent: text }));
    }
    row.title = name;
    return row;
  });
  element("wires").replaceChildren(...rows);
}

export function showActivation(activation: Activation): void {
  left = activation;
  const [channels, height, width] = activation.dims;
  const canvas = element<HTMLCanvasElement>("activation");
  drawActivation(canvas, activation);
  const text = `One digit as the server sees it: ${channels} maps of ${height} × ${width} numbers.`;
  describe(canvas, text);
  write("activation-text", text);
}

/** Say what stays on the device; with `localSteps`, the weights are shared after so many. */
export function showModel(bytes: number, localSteps: number): void {
  const weights = `the ${formatBytes(bytes)} of weights of this device's layers`;
  const often = localSteps === 1 ? "each step" : `every ${localSteps} steps`;
  write(
    "kept",
    localSteps
      ? `Sent after ${often}: ${weights}, which the server joins with those of other devices. ` +
          "Never sent: the drawings and their labels."
      : `Never sent: the drawings, their labels, and ${weights}.`,
  );
}

function describe(canvas: HTMLCanvasElement, text: string): void {
  if (canvas.getAttribute("aria-label") !== text) canvas.setAttribute("aria-label", text);
}

function formatShare(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

function formatBytes(bytes: number): string {
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(0)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
