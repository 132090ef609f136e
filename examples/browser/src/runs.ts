/** What is remembered of training from visit to visit: the plan, the curves, the bytes. */

import type { Plan } from "./messages.js";

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

/** Bytes of all messages, to the server and back. */
export interface Traffic {
  readonly up: number;
  readonly down: number;
}

/** The training under way, and the steps that were made before it. */
export interface Course {
  readonly plan: Plan;
  readonly start: number;
}

/** All trainings since the weights were new; `course` is the one under way. */
export interface Run {
  course: Course | null;
  marks: Mark[];
  checks: Check[];
  traffic: Traffic;
}

export function newRun(): Run {
  return { course: null, marks: [], checks: [], traffic: { up: 0, down: 0 } };
}

/** Add a step, in place of what was noted of it, and of later ones, before they were lost. */
export function noteMark(run: Run, mark: Mark): void {
  forgetFrom(run, mark.step);
  run.marks.push(mark);
}

export function noteCheck(run: Run, check: Check): void {
  while (run.checks.length && run.checks.at(-1)!.step >= check.step) run.checks.pop();
  run.checks.push(check);
}

/** Forget what was noted of a step and of those after it. */
export function forgetFrom(run: Run, step: number): void {
  while (run.marks.length && run.marks.at(-1)!.step >= step) run.marks.pop();
  while (run.checks.length && run.checks.at(-1)!.step >= step) run.checks.pop();
}
