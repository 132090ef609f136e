/**
 * Learning-rate schedules: the factor of the learning rate at each step of a training run.
 *
 * The same formulas, defaults and names as in Python (`splitonnx/schedules.py`), which are those of
 * torch.optim.lr_scheduler.  A factor depends on the number of the step alone, so a run that is
 * resumed, or that repeats lost steps, trains with the same rates.
 */

import { UsageError } from "./errors.js";

/** A length of time in training: a number of steps, or of epochs. */
export type Duration = number | { readonly epochs: number };

interface Warmup {
  /** How long the factor first grows linearly; 0 by default. */
  readonly warmup?: Duration | undefined;
  /** The factor that it grows from; 0 by default. */
  readonly warmupFactor?: number | undefined;
}

/** How the learning rate changes while training. */
export type Schedule =
  | (Warmup & { readonly kind: "constant" })
  | (Warmup & { readonly kind: "cosine" | "linear"; readonly endFactor?: number | undefined })
  | (Warmup & { readonly kind: "step"; readonly stepSize: Duration; readonly gamma?: number | undefined })
  | {
      readonly kind: "one-cycle";
      readonly pctStart?: number | undefined;
      readonly divFactor?: number | undefined;
      readonly finalDivFactor?: number | undefined;
    };

/** A schedule for a run of a known length. */
export interface RatePlan {
  /** The schedule, its settings and the length of the run, as text. */
  readonly description: string;
  /** Return the factor for a batch of an epoch; both count from 0. */
  getFactor(epoch: number, batch: number): number;
}

type Shape = (step: number, steps: number) => number;

const DEFAULTS: Record<string, Record<string, Duration | undefined>> = {
  constant: { warmup: 0, warmupFactor: 0 },
  cosine: { warmup: 0, warmupFactor: 0, endFactor: 0 },
  linear: { warmup: 0, warmupFactor: 0, endFactor: 0 },
  step: { warmup: 0, warmupFactor: 0, stepSize: undefined, gamma: 0.1 },
  "one-cycle": { pctStart: 0.3, divFactor: 25, finalDivFactor: 1e4 },
};
const RANGES: Record<string, [number, number]> = {
  warmupFactor: [0, 1],
  endFactor: [0, Infinity],
  gamma: [0, 1],
  pctStart: [0, 1],
  divFactor: [1, Infinity],
  finalDivFactor: [1, Infinity],
};

/**
 * Fit a schedule to a run of `epochs` epochs.
 *
 * @throws UsageError: a setting is unknown, missing or out of its range, or the warmup is not
 *   shorter than the run.
 */
export function planRates(schedule: Schedule, epochs: number, stepsPerEpoch: number): RatePlan {
  const settings = readSettings(schedule);
  const steps = epochs * stepsPerEpoch;
  const warmup = countSteps(settings["warmup"] ?? 0, stepsPerEpoch);
  if (warmup && warmup >= steps) {
    throw new UsageError(
      `the warmup of ${warmup} steps must be shorter than the training, which has ${steps}`,
    );
  }
  const start = Number(settings["warmupFactor"] ?? 0);
  const shape = makeShape(schedule.kind, settings, stepsPerEpoch);
  return {
    description: `${schedule.kind} ${JSON.stringify(settings)} over ${steps} steps`,
    getFactor(epoch, batch) {
      const step = epoch * stepsPerEpoch + batch;
      if (step < warmup) return start + (1 - start) * (step / warmup);
      return shape(step - warmup, steps - warmup);
    },
  };
}

function makeShape(
  kind: Schedule["kind"],
  settings: Record<string, Duration | undefined>,
  stepsPerEpoch: number,
): Shape {
  const read = (name: string) => Number(settings[name]);
  switch (kind) {
    case "constant":
      return () => 1;
    case "cosine":
      return (step, steps) => anneal(1, read("endFactor"), step / steps);
    case "linear":
      return (step, steps) => 1 + (read("endFactor") - 1) * (step / steps);
    case "step": {
      const size = Math.max(1, countSteps(settings["stepSize"] ?? 1, stepsPerEpoch));
      return (step) => read("gamma") ** Math.floor(step / size);
    }
    case "one-cycle": {
      const start = 1 / read("divFactor");
      return (step, steps) => {
        const [top, last] = [read("pctStart") * steps - 1, steps - 1];
        if (step <= top) return top > 0 ? anneal(start, 1, step / top) : 1;
        return anneal(1, start / read("finalDivFactor"), (step - top) / (last - top));
      };
    }
  }
}

function anneal(start: number, end: number, fraction: number): number {
  return end + ((start - end) * (1 + Math.cos(Math.PI * fraction))) / 2;
}

function countSteps(duration: Duration, stepsPerEpoch: number): number {
  if (typeof duration === "number") return duration;
  return Math.floor(duration.epochs * stepsPerEpoch + 0.5);
}

/** Return all settings of a schedule, with their defaults filled in. */
function readSettings(schedule: Schedule): Record<string, Duration | undefined> {
  const { kind, ...given } = schedule;
  const defaults = Object.hasOwn(DEFAULTS, kind) ? DEFAULTS[kind] : undefined;
  if (!defaults) {
    const known = Object.keys(DEFAULTS).join(", ");
    throw new UsageError(`there is no learning-rate schedule '${kind}'; choose from ${known}`);
  }
  const settings = { ...defaults };
  for (const [name, value] of Object.entries(given)) {
    if (!Object.hasOwn(defaults, name)) {
      throw new UsageError(`${kind} has no setting '${name}'; it has ${Object.keys(defaults).join(", ")}`);
    }
    if (value !== undefined) settings[name] = value as Duration;
  }
  for (const [name, value] of Object.entries(settings)) checkSetting(name, value);
  return settings;
}

function checkSetting(name: string, value: Duration | undefined): void {
  const range = RANGES[name];
  if (range) {
    const [lower, upper] = range;
    if (typeof value === "number" && value >= lower && value <= upper && value < Infinity) return;
    const allowed = upper < Infinity ? `from ${lower} to ${upper}` : `at least ${lower}`;
    throw new UsageError(`${name} must be a number, ${allowed}, not ${JSON.stringify(value)}`);
  }
  const lowest = name === "stepSize" ? Number.MIN_VALUE : 0;
  const count = typeof value === "number" ? value : (value?.epochs ?? NaN);
  const isWhole = typeof value === "object" || Number.isSafeInteger(count);
  if (isWhole && count >= lowest && count < Infinity) return;
  throw new UsageError(
    `${name} must be ${lowest ? "above 0" : "at least 0"}, a whole number of steps or ` +
      `{ epochs: number }, not ${JSON.stringify(value)}`,
  );
}
