/** What the page remembers of its training from visit to visit: the plan, and the curves. */

import type { Evaluation, StepRecord } from "@splitonnx/client";

import type { Plan } from "./messages.js";

const KEY = "splitonnx-run";

/** One step of the curves. */
export interface Mark {
  readonly step: number;
  readonly loss: number;
  readonly accuracy: number;
}

/** Accuracy on the digits that are held out, after so many steps. */
export interface Check {
  readonly step: number;
  readonly accuracy: number;
}

/** All trainings since the weights were new; `plan` is the one under way. */
export interface Run {
  plan: Plan | null;
  marks: Mark[];
  checks: Check[];
  /** Bytes of all messages, to the server and back. */
  bytesUp: number;
  bytesDown: number;
}

export function newRun(): Run {
  return { plan: null, marks: [], checks: [], bytesUp: 0, bytesDown: 0 };
}

/** Add a step, in place of what was noted of it, and of later ones, before they were lost. */
export function noteStep(run: Run, record: StepRecord): void {
  const { step, loss, metrics } = record;
  while (run.marks.length && run.marks.at(-1)!.step >= step) run.marks.pop();
  while (run.checks.length && run.checks.at(-1)!.step >= step) run.checks.pop();
  run.marks.push({ step, loss, accuracy: metrics["accuracy"] ?? NaN });
}

export function noteCheck(run: Run, { metrics }: Evaluation): void {
  const step = run.marks.at(-1)?.step ?? 0;
  while (run.checks.length && run.checks.at(-1)!.step >= step) run.checks.pop();
  run.checks.push({ step, accuracy: metrics["accuracy"] ?? NaN });
}

export function readRun(): Run {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "null") as Run | null;
    return found && Array.isArray(found.marks) ? { ...newRun(), ...found } : newRun();
  } catch {
    return newRun();
  }
}

export function keepRun(run: Run): void {
  localStorage.setItem(KEY, JSON.stringify(run));
}
