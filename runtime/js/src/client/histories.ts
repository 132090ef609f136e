/** What happened in training: one record a step, one an evaluation. */

/** One optimizer step. */
export interface StepRecord {
  /** Updates of the model's whole life, from 1. */
  readonly step: number;
  /** Times through the data of this fit, from 0. */
  readonly epoch: number;
  /** Batches of the epoch, this one included. */
  readonly batch: number;
  /** The batch's mean, before the update. */
  readonly loss: number;
  /** What else the phase reports. */
  readonly metrics: Readonly<Record<string, number>>;
  /** The rate of the update. */
  readonly learningRate: number;
  readonly samples: number;
  /** Wall time. */
  readonly seconds: number;
  readonly bytesUp: number;
  readonly bytesDown: number;
}

/** The metrics on held-out data after an epoch (counted from 0), means over all samples. */
export interface Evaluation {
  readonly epoch: number;
  readonly metrics: Readonly<Record<string, number>>;
  readonly seconds: number;
}

/** All that one `fit` recorded, in order. */
export class History {
  readonly steps: StepRecord[] = [];
  readonly evaluations: Evaluation[] = [];

  /** Forget the records after `step` and the evaluations from `epoch` on. */
  forget(step: number, epoch: number): void {
    const steps = this.steps.filter((record) => record.step <= step);
    this.steps.splice(0, Infinity, ...steps);
    const evaluations = this.evaluations.filter((one) => one.epoch < epoch);
    this.evaluations.splice(0, Infinity, ...evaluations);
  }
}
