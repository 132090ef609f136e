/** How to connect and how to train, as values; the client carries it out. */

import type { InferenceSession } from "onnxruntime-common";

import type { BundleSource } from "../bundles.js";
import type { SocketOptions } from "../channels/websockets.js";
import type { Ort, OutputTensor } from "../engine/engines.js";
import { UsageError } from "../errors.js";
import type { StateStorage } from "../storage/storages.js";
import type { DataSource, Dataset } from "./datasets.js";
import type { Evaluation, StepRecord } from "./histories.js";
import type { WhenUnsaved } from "./runners.js";
import { MOST_IN_FLIGHT } from "../micro_batches.js";
import { USUAL_IN_FLIGHT } from "../pipelines.js";
import type { StepDivision } from "../pipelines.js";
import { planRates } from "../schedules.js";
import type { RatePlan, Schedule } from "../schedules.js";

/** Tensors by name, as they are given out. */
export type Outputs = Record<string, OutputTensor>;
/** A constant, or a function of the updates so far; the optimizer's own by default. */
export type LearningRate = number | ((step: number) => number);

/** How `SplitClient.connect` connects. */
export interface ConnectOptions extends SocketOptions {
  /** The ONNX Runtime to use: `import * as ort from "onnxruntime-web"`, or the like. */
  readonly ort: Ort;
  /** How it runs graphs; its own defaults else. */
  readonly sessionOptions?: InferenceSession.SessionOptions | undefined;
  /** What the server knows this client by. */
  readonly token?: string | undefined;
  /** Where the client's part is; at the server's own address under `/client/` by default. */
  readonly bundle?: BundleSource | undefined;
  /**
   * The part's maker is trusted as the app's own code is, so that its graphs may be in ORT format,
   * which is not looked into before ONNX Runtime loads it; not by default.
   */
  readonly trusted?: boolean | undefined;
  /** Where to keep the state; IndexedDB where there is one, else memory, by default. */
  readonly storage?: StateStorage | undefined;
  /** Decides shuffling and Dropout; 0 by default. */
  readonly seed?: number | undefined;
  /** Continue the run that was interrupted, if there is one. */
  readonly resume?: boolean | undefined;
  /**
   * Permit this part's trained weights and running statistics to be sent to the server, if it joins
   * what its clients learn (`SplitClient.terms`); not by default.
   */
  readonly share?: boolean | undefined;
  /**
   * Seconds after which the client gives up that has no connection, the first included, or only
   * such as break before anything new comes.  By default the first is tried once (as long as it
   * takes with `resume`), later ones as long as it takes.
   */
  readonly giveUpAfter?: number | undefined;
  /** Called with the cause whenever the connection was lost and is made again. */
  readonly onReconnect?: ((cause: Error) => void) | undefined;
  /** Shown all that leaves the device and comes to it. */
  readonly onWires?:
    | ((direction: "sent" | "received", phase: string, wires: Outputs) => void)
    | undefined;
}

/** How `SplitClient.fit` trains. */
export interface FitOptions {
  /** Times through the data; 1 by default. */
  readonly epochs?: number | undefined;
  /**
   * Samples a step, 32 by default.  Where the model's batch is fixed, it is to be that number, and
   * a smaller last batch is left out.
   */
  readonly batchSize?: number | undefined;
  /**
   * Micro-batches that each step's batch is divided into; their gradients are added up and applied
   * once, so a step needs less memory.  1 by default.
   */
  readonly accumulate?: number | undefined;
  /**
   * Micro-batches as with `accumulate`, and to the same results, of which several are unfinished at a
   * time, so that this device, the network and the server work at once.  Takes more memory.
   */
  readonly microBatches?: number | undefined;
  /**
   * With `microBatches`: how many are unfinished at a time, at most; 3 by default, 16 at the most.  A
   * server may permit fewer.
   */
  readonly inFlight?: number | undefined;
  /** Shuffle the samples in each epoch; true by default. */
  readonly shuffle?: boolean | undefined;
  /** Evaluated after each epoch. */
  readonly evalData?: DataSource | undefined;
  readonly learningRate?: LearningRate | undefined;
  /** Multiplies the learning rate in each step; the data must be arrays, whose size is known. */
  readonly schedule?: Schedule | undefined;
  /** Steps between two checkpoints, which both sides keep; none by default. */
  readonly checkpointEvery?: number | undefined;
  /** Whether training stops, as it does by default, where one cannot be written. */
  readonly whenUnsaved?: WhenUnsaved | undefined;
  /** Save when all is trained, and train on where the server was lost before; not by default. */
  readonly save?: boolean | undefined;
  /** Discard a run that was interrupted. */
  readonly restart?: boolean | undefined;
  /**
   * Ends the training after the step that runs.  Where the server joins what its clients learn, this
   * client then shares for the last time, which waits for the others; close it not to wait.
   */
  readonly signal?: AbortSignal | undefined;
  /** Called with each step's record, and waited for. */
  readonly onStep?: ((record: StepRecord) => void | Promise<void>) | undefined;
  /** Called with each evaluation, and waited for. */
  readonly onEpoch?: ((evaluation: Evaluation) => void | Promise<void>) | undefined;
}

/** How `SplitClient.step` trains on a batch; see {@link FitOptions}. */
export type StepOptions = Pick<
  FitOptions,
  "learningRate" | "accumulate" | "microBatches" | "inFlight"
>;

/** The options of a fit with their defaults filled in, and its data opened. */
export interface ResolvedFitOptions extends FitOptions {
  readonly training: Dataset;
  readonly heldOut: Dataset | undefined;
  readonly epochs: number;
  readonly rates: RatePlan | undefined;
  readonly division: StepDivision;
}

/**
 * Return the division of a step's batch that was asked for.
 *
 * @throws UsageError: a number is out of its range, or options exclude each other.
 */
export function chooseDivision({ accumulate, microBatches, inFlight }: StepOptions): StepDivision {
  requirePositive({ accumulate, microBatches, inFlight });
  if (inFlight && inFlight > MOST_IN_FLIGHT) {
    throw new UsageError(`inFlight must be at most ${MOST_IN_FLIGHT}, not ${inFlight}`);
  }
  if (accumulate && microBatches) {
    throw new UsageError(
      "accumulate runs micro-batches one after the other, and microBatches several at a time; give " +
        "one of them",
    );
  }
  if (inFlight && !microBatches) {
    throw new UsageError("inFlight says how many micro-batches are unfinished; give microBatches, too");
  }
  const count = microBatches ?? accumulate ?? 1;
  return { count, inFlight: count > 1 && microBatches ? (inFlight ?? USUAL_IN_FLIGHT) : 1 };
}

/**
 * Fit the schedule of a fit to its length.
 *
 * `dropLast` says that a smaller last batch is left out.
 *
 * @throws UsageError: the learning rate is a function, the number of steps is not known in advance,
 *   or a setting is out of its range.
 */
export function fitSchedule(
  { schedule, learningRate, epochs = 1, batchSize = 32 }: FitOptions,
  { size }: Dataset,
  dropLast: boolean,
): RatePlan | undefined {
  if (!schedule) return undefined;
  if (typeof learningRate === "function") {
    throw new UsageError("a schedule needs a learning rate that is a number, not a function");
  }
  if (size === null) {
    throw new UsageError(
      "a schedule needs data whose number of batches is known; without, compute the learning " +
        "rate with a function of the step",
    );
  }
  const batches = size / batchSize;
  return planRates(schedule, epochs, dropLast ? Math.floor(batches) : Math.ceil(batches));
}

/**
 * Check the numbers of what a connection is to be like.
 *
 * @throws UsageError: one of them is out of its range.
 */
export function checkNumbers({ seed = 0, giveUpAfter = 0 }: ConnectOptions): void {
  if (!Number.isSafeInteger(seed) || seed < 0) {
    throw new UsageError(`the seed must be an integer from 0 to 2^53, not ${seed}`);
  }
  // NaN is not either: no number is below it
  if (!(giveUpAfter >= 0)) {
    throw new UsageError(`giveUpAfter must be 0 seconds or more, not ${giveUpAfter}`);
  }
}

/**
 * Raise unless each of the numbers that is given is an integer of at least 1.
 *
 * @throws UsageError: it names the one that is not.
 */
export function requirePositive(counts: Readonly<Record<string, number | undefined>>): void {
  for (const [name, count] of Object.entries(counts)) {
    if (count === undefined) continue;
    if (!Number.isSafeInteger(count) || count < 1) {
      throw new UsageError(`${name} must be at least 1, not ${count}`);
    }
  }
}
