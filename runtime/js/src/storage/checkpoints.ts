/**
 * Checkpoints: a session's whole state in the storage, so that training can resume after any fault.
 *
 * Names in the storage are `<bundle's digest>/sessions/<session>/<step>`, and
 * `<bundle's digest>/state` for the outcome of a training.  When to write one, and which step both
 * parties continue from, is not known here.
 */

import { decodeState } from "../bundles.js";
import { CHECKSUM, encodeWithChecksum, hasValidChecksum } from "../checksums.js";
import {
  parseJson,
  readCount,
  readFlag,
  readInteger,
  readNullable,
  readOptional,
  readRecord,
  readText,
  spellNames,
} from "../decoders.js";
import type { Decoded } from "../decoders.js";
import { BundleError, NotSaved, SplitonnxError } from "../errors.js";
import type { PartyManifest } from "../manifests.js";
import { findNotFinite } from "../tensors.js";
import type { NdArrays } from "../tensors.js";
import type { StateStorage } from "./storages.js";

/** Checkpoints kept a session: the one before the newest is what both parties have for certain. */
export const KEPT = 2;

const FACTS = "splitonnx";

const readDataPosition = readRecord({
  epoch: readCount,
  batch: readCount,
  batchSize: readCount,
  seed: readInteger,
  shuffle: readFlag,
  samples: readNullable(readCount),
  accumulate: readOptional(readCount, 1),
  schedule: readOptional(readText, ""),
  unsharedSteps: readOptional(readCount, 0),
  unsharedSamples: readOptional(readCount, 0),
  round: readOptional(readCount, 0),
});
/**
 * Where the next step begins in the data.
 *
 * `epoch` is counted from 0; `batch` is the number of batches of it trained already.  The others
 * say how the data were dealt, and must be the same where training continues.  `unsharedSteps` and
 * `unsharedSamples` count what was trained since the client last shared its parameters, and `round`
 * is the number of the round whose joined parameters it last received; they stay 0 where the server
 * does not join what its clients learn.
 */
export type DataPosition = Decoded<typeof readDataPosition>;

const readFacts = readRecord({
  digest: readText,
  session: readText,
  step: readCount,
  written: readCount,
  position: readOptional(readNullable(readDataPosition), null),
});

/** A state, with all that is needed to continue from it. */
export interface Checkpoint {
  /** The session that it belongs to, or came out of. */
  readonly session: string;
  readonly step: number;
  readonly tensors: NdArrays;
  readonly position: DataPosition | null;
  /** Milliseconds since 1970. */
  readonly written: number;
}

/** The checkpoints and outcomes of one bundle in a storage. */
export class CheckpointStore {
  readonly #storage: StateStorage;
  readonly #manifest: PartyManifest;

  constructor(storage: StateStorage, manifest: PartyManifest) {
    this.#storage = storage;
    this.#manifest = manifest;
  }

  /**
   * Keep a checkpoint, and forget its session's others but the newest and those of later steps,
   * which are of a course that training has left.
   *
   * @throws NotSaved: it cannot be written; earlier checkpoints are kept.
   */
  async write(checkpoint: Checkpoint): Promise<readonly number[]> {
    await this.#put(this.#nameStep(checkpoint.session, checkpoint.step), checkpoint);
    const steps = await this.steps(checkpoint.session);
    const kept = steps.filter((step) => step <= checkpoint.step).slice(0, KEPT);
    for (const step of steps.filter((one) => !kept.includes(one))) {
      await this.#storage.delete(this.#nameStep(checkpoint.session, step));
    }
    return kept;
  }

  /** List the steps of a session's checkpoints, newest first. */
  async steps(session: string): Promise<number[]> {
    const prefix = this.#nameStep(session, "");
    const names = await this.#storage.list(prefix);
    return names.map((name) => Number(name.slice(prefix.length))).sort((a, b) => b - a);
  }

  /** What the lock of all this is called. */
  get lockName(): string {
    return `${this.#manifest.digest}/lock`;
  }

  /** List the sessions that have checkpoints. */
  async sessions(): Promise<string[]> {
    const prefix = `${this.#manifest.digest}/sessions/`;
    const names = await this.#storage.list(prefix);
    return [...new Set(names.map((name) => name.slice(prefix.length).split("/")[0]!))];
  }

  /**
   * Read the checkpoint of a step.
   *
   * @throws BundleError: there is none, or it is not one.
   */
  async read(session: string, step: number): Promise<Checkpoint> {
    const name = this.#nameStep(session, step);
    const found = await this.#get(name);
    if (found?.session !== session || found.step !== step) {
      throw new BundleError(name, "there is no such checkpoint");
    }
    return found;
  }

  /** Forget the checkpoints of later steps: the session goes back to `step`. */
  async rewind(session: string, step: number): Promise<readonly number[]> {
    const steps = await this.steps(session);
    for (const later of steps.filter((one) => one > step)) {
      await this.#storage.delete(this.#nameStep(session, later));
    }
    return steps.filter((one) => one <= step);
  }

  /** Forget a session; its newest checkpoint goes last. */
  async remove(session: string): Promise<void> {
    for (const step of (await this.steps(session)).reverse()) {
      await this.#storage.delete(this.#nameStep(session, step));
    }
  }

  /**
   * Keep a state as the outcome of a training.
   *
   * @throws NotSaved: it cannot be written, or is not finite; the earlier one is kept.
   */
  async publish(checkpoint: Checkpoint): Promise<void> {
    this.checkFinite(checkpoint.tensors);
    await this.#put(this.#nameOutcome(), checkpoint);
  }

  /** Read the outcome of the last training, if there is one. */
  async readOutcome(): Promise<Checkpoint | undefined> {
    return this.#get(this.#nameOutcome());
  }

  /**
   * Check that a state can be an outcome: nobody could use or train on one with NaN or infinity.
   *
   * @throws NotSaved: a tensor that training changes holds such a value.
   */
  checkFinite(tensors: NdArrays): void {
    for (const { tensor, role } of this.#manifest.state) {
      if (role === "frozen" || findNotFinite(tensors.get(tensor.name)!) < 0) continue;
      throw new NotSaved(
        `'${this.#nameOutcome()}'`,
        `'${tensor.name}' holds NaN or infinity; train again from an earlier state with a lower ` +
          "learning rate",
      );
    }
  }

  #nameOutcome(): string {
    return `${this.#manifest.digest}/state`;
  }

  #nameStep(session: string, step: number | ""): string {
    return `${this.#manifest.digest}/sessions/${session}/${step}`;
  }

  async #put(name: string, { tensors, ...checkpoint }: Checkpoint): Promise<void> {
    const { session, step, written, position } = checkpoint;
    const facts = {
      digest: this.#manifest.digest,
      session,
      step,
      written,
      position: position && spellNames(position),
    };
    try {
      const content = encodeWithChecksum(tensors, { [FACTS]: JSON.stringify(facts) });
      await this.#storage.put(name, content);
    } catch (error) {
      // A storage is the app's or the browser's, and its errors are of any kind.
      throw new NotSaved(`'${name}'`, error instanceof Error ? error.message : String(error));
    }
  }

  async #get(name: string): Promise<Checkpoint | undefined> {
    const content = await this.#storage.get(name);
    if (!content) return undefined;
    try {
      const { tensors, metadata } = decodeState(name, content, this.#manifest.state);
      const checksum = metadata.get(CHECKSUM);
      // A checkpoint of before there were checksums has its facts alone.
      if (checksum === undefined ? metadata.size !== 1 : !hasValidChecksum(content, checksum)) {
        throw new BundleError(name, "it was altered since it was written; delete it");
      }
      const { digest, ...facts } = readFacts(parseJson(metadata.get(FACTS) ?? ""), "");
      if (digest !== this.#manifest.digest) throw new BundleError(name, "it is another bundle's");
      return { ...facts, tensors };
    } catch (error) {
      if (!(error instanceof SyntaxError || error instanceof SplitonnxError)) throw error;
      throw new BundleError(name, `it is not a checkpoint: ${error.message}`);
    }
  }
}
