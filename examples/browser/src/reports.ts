/**
 * Gathers what happens in training, and reports it to the page now and then.
 *
 * A step may take a few milliseconds, and a phone's page has taps to answer: it hears of many steps
 * at a time.
 */

import type { Outputs } from "@splitonnx/client";

import type { Activation, Progress, Wire } from "./messages.js";
import type { Mark, Traffic } from "./runs.js";

const SIDE = 8; // pixels of an activation's map
/** Milliseconds between two reports. */
const INTERVAL = 250;

export class Reporter {
  readonly #tell: (progress: Progress) => void;
  #told = -Infinity;
  #marks: Mark[] = [];
  #pace: number | null = null;
  #traffic: Traffic = { up: 0, down: 0 };
  /** Sent by the step that runs; the first group of a step has the activation. */
  #sending: Wire[] = [];
  #sent: Wire[] = [];
  #activation: Activation | null = null;

  constructor(tell: (progress: Progress) => void) {
    this.#tell = tell;
  }

  get traffic(): Traffic {
    return this.#traffic;
  }

  /** Begin to count where an earlier visit ended. */
  begin(traffic: Traffic): void {
    this.#traffic = traffic;
    this.#pace = null;
  }

  countBytes(way: keyof Traffic, bytes: number): void {
    this.#traffic = { ...this.#traffic, [way]: this.#traffic[way] + bytes };
  }

  noteStep(mark: Mark, seconds: number): void {
    const milliseconds = seconds * 1000;
    this.#pace = this.#pace === null ? milliseconds : 0.9 * this.#pace + 0.1 * milliseconds;
    this.#marks.push(mark);
    this.#sent = this.#sending;
    if (performance.now() - this.#told >= INTERVAL) this.flush();
  }

  /** Note tensors on their way to the server; a step may send several groups of them. */
  noteWires(outputs: Outputs, { isStep }: { isStep: boolean }): void {
    const wires = Object.entries(outputs).map(([name, { dims, data }]) => {
      return { name, dims, bytes: (data as Float32Array).byteLength };
    });
    const isFirst = wires.some(({ name }) => !name.endsWith("_grad"));
    this.#sending = isFirst ? wires : [...this.#sending, ...wires];
    this.#activation ??= findActivation(outputs);
    if (!isStep) this.#sent = this.#sending;
  }

  /** Report all that is not yet reported. */
  flush(): void {
    this.#told = performance.now();
    this.#tell({
      kind: "progress",
      marks: this.#marks,
      pace: this.#pace,
      traffic: this.#traffic,
      wires: this.#sent,
      activation: this.#activation,
    });
    this.#marks = [];
    this.#activation = null;
  }
}

/** Copy the first sample of the activation; a gradient of the tail's is none. */
function findActivation(outputs: Outputs): Activation | null {
  for (const { dims, data } of Object.values(outputs)) {
    const [, channels = 0, height = 0, width = 0] = dims;
    if (height !== SIDE || !(data instanceof Float32Array)) continue;
    return { dims: [channels, height, width], data: data.slice(0, channels * height * width) };
  }
  return null;
}
