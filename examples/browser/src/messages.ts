/** The messages between the page and its worker; values alone. */

import type { Check, Mark, Run, Traffic } from "./runs.js";

/** Digits as the model expects them: 64 numbers in [0, 1] each, row by row, and what they show. */
export interface Samples {
  readonly images: Float32Array;
  readonly labels: BigInt64Array;
}

/** How a training is made; all of it has to be the same where one is resumed. */
export interface Plan {
  readonly epochs: number;
  readonly batchSize: number;
  /** The first so many of one's own drawings are trained on. */
  readonly drawings: number;
}

/** A tensor that left the device. */
export interface Wire {
  readonly name: string;
  readonly dims: readonly number[];
  readonly bytes: number;
}

/** One sample's activation, as the server sees it: channels of height x width. */
export interface Activation {
  readonly dims: readonly [channels: number, height: number, width: number];
  readonly data: Float32Array;
}

export type Order =
  | { readonly kind: "connect"; readonly token: string | undefined; readonly share: boolean }
  | {
      readonly kind: "train";
      readonly plan: Plan;
      readonly training: Samples;
      readonly heldOut: Samples;
      readonly restart: boolean;
    }
  | { readonly kind: "stop" }
  | { readonly kind: "predict"; readonly number: number; readonly image: Float32Array }
  | { readonly kind: "forget" };

/** What happened in training since the last report. */
export interface Progress {
  readonly kind: "progress";
  readonly marks: readonly Mark[];
  /** Milliseconds a step; `null` before the first. */
  readonly pace: number | null;
  readonly traffic: Traffic;
  /** What was last sent, whole. */
  readonly wires: readonly Wire[];
  readonly activation: Activation | null;
}

export type News =
  | Progress
  | { readonly kind: "recalled"; readonly run: Run }
  | {
      readonly kind: "connected";
      /** Steps that the weights have seen; what is recalled of later ones is lost. */
      readonly steps: number;
      /** The run that was interrupted, `isResumed` if it can continue where it was. */
      readonly plan: Plan | null;
      readonly isResumed: boolean;
      readonly modelBytes: number;
      /** Steps after which the weights are shared; 0 if they stay here. */
      readonly localSteps: number;
    }
  | { readonly kind: "lost"; readonly reason: string }
  | { readonly kind: "found" }
  /** The weights were sent some time ago, and those of the others are not there yet. */
  | { readonly kind: "waiting" }
  | { readonly kind: "check"; readonly check: Check }
  | { readonly kind: "trained"; readonly steps: number }
  | { readonly kind: "prediction"; readonly number: number; readonly logits: Float32Array }
  | { readonly kind: "forgotten" }
  | {
      readonly kind: "failed";
      readonly during: Order["kind"];
      readonly name: string;
      readonly message: string;
    };
