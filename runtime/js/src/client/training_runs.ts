/**
 * What a client keeps so that its training can continue: its session's name, checkpoints, position.
 *
 * A run is unfinished while its checkpoints are newer than the state that the storage has as its
 * outcome.  This module knows names and states; it runs nothing and knows no server.
 */

import type { ResumePoint } from "../channels/greetings.js";
import type { Executor } from "../engine/executors.js";
import { BundleError, StorageInUse, UnfinishedRun, UsageError } from "../errors.js";
import { toHex } from "../hashes.js";
import { CheckpointStore } from "../storage/checkpoints.js";
import type { Checkpoint, DataPosition } from "../storage/checkpoints.js";
import type { StateStorage, StorageLock } from "../storage/storages.js";
import type { NdArrays } from "../tensors.js";

/**
 * The record of one client's session; made by {@link TrainingRun.open}.
 *
 * `position` is where in its data a resumed run continues, `null` for one that begins.  `isBehind`
 * says that the last checkpoint could not be written.
 */
export class TrainingRun {
  readonly session: string;
  position: DataPosition | null;
  isBehind = false;
  readonly #store: CheckpointStore;
  readonly #storage: StateStorage;
  #lock: StorageLock | undefined;
  #locking: Promise<unknown> = Promise.resolve(); // the last that took or released the lock
  #kept: readonly number[];
  #origin: string;
  #start: number;
  #state: NdArrays;

  private constructor(
    [store, storage]: [CheckpointStore, StateStorage],
    begun: { session: string; position: DataPosition | null; kept: readonly number[] },
    origin: { session: string; step: number; tensors: NdArrays },
  ) {
    this.session = begun.session;
    this.position = begun.position;
    this.#kept = begun.kept;
    this.#store = store;
    this.#storage = storage;
    this.#origin = origin.session;
    this.#start = origin.step;
    this.#state = origin.tensors;
  }

  /**
   * Begin a session, or continue with the unfinished one; `executor` then has its state.
   *
   * With `resume` and nothing unfinished, training begins where the outcome stands.
   *
   * @throws BundleError: what is in the storage is not a state of this bundle.
   */
  static async open(
    executor: Executor,
    storage: StateStorage,
    { resume }: { resume: boolean },
  ): Promise<TrainingRun> {
    const store = new CheckpointStore(storage, executor.manifest);
    const outcome = await store.readOutcome();
    const origin = outcome ?? { session: "", step: 0, tensors: executor.party.state, position: null };
    const found = resume ? await findUnfinished(store, outcome) : undefined;
    const current = found ?? origin;
    executor.restore(current.tensors, current.step);
    const session = found?.session ?? drawSession();
    const kept = found ? await store.steps(session) : [];
    const position = resume ? current.position : null;
    return new TrainingRun([store, storage], { session, position, kept }, origin);
  }

  /**
   * Take the storage's lock, if this run does not have it: what is written now is one client's.
   *
   * A run that is resumed is taken over from whoever trains it.
   *
   * @throws StorageInUse: another client has it, or took it over.
   */
  async hold({ takeOver = false }: { takeOver?: boolean } = {}): Promise<void> {
    return this.#inOrder(async () => {
      if (this.#lock) {
        if (await this.#lock.isHeld()) return;
        throw new StorageInUse("another client, which took this one's place,");
      }
      if (!this.#storage.lock) return;
      const lock = await this.#storage.lock(this.#store.lockName, { takeOver });
      if (!lock) throw new StorageInUse("another tab or process");
      this.#lock = lock;
    });
  }

  /** Let go of the storage, also where it is being taken; may be called twice. */
  async release(): Promise<void> {
    return this.#inOrder(async () => {
      const lock = this.#lock;
      this.#lock = undefined;
      await lock?.release();
    });
  }

  /** Take over the storage if the client resumes a run, its own or another client's. */
  async takeOver(): Promise<void> {
    if (this.#kept.length) await this.hold({ takeOver: true });
  }

  /** Return from where a client at `step` can resume. */
  findResumePoint(step: number): ResumePoint {
    return { origin: this.#origin, start: this.#start, step, kept: this.#kept };
  }

  /**
   * Keep the state as a checkpoint.
   *
   * @throws NotSaved: it cannot be written; earlier checkpoints are kept.
   * @throws StorageInUse: another client took the training over.
   */
  async write(executor: Executor, position: DataPosition | null): Promise<void> {
    await this.hold();
    this.isBehind = true;
    this.#kept = await this.#store.write(this.#describe(executor, position));
    this.isBehind = false;
  }

  /**
   * Check that the state can be an outcome, before the server makes its own one.
   *
   * @throws NotSaved: it is not finite.
   */
  checkOutcome(executor: Executor): void {
    this.#store.checkFinite(executor.state());
  }

  /**
   * Make the state the storage's outcome; the run is finished, its checkpoints go.
   *
   * @throws NotSaved: it cannot be written.
   */
  async publish(executor: Executor, position: DataPosition | null): Promise<void> {
    await this.hold();
    await this.#store.publish(this.#describe(executor, position));
    this.#origin = this.session;
    this.#start = executor.step;
    this.#state = executor.state();
    await this.#store.remove(this.session);
    this.#kept = [];
  }

  /**
   * Restore the state of a step that was kept, and return the position in the data there.
   *
   * @throws BundleError: there is no such checkpoint.
   */
  async goBack(executor: Executor, step: number): Promise<DataPosition | null> {
    this.#kept = await this.#store.rewind(this.session, step);
    if (this.#kept.includes(step)) {
      const { tensors, position } = await this.#store.read(this.session, step);
      executor.restore(tensors, step);
      return position;
    }
    if (step !== this.#start) {
      throw new BundleError(`session ${this.session}`, `no state of step ${step} was kept`);
    }
    executor.restore(this.#state, step);
    return null;
  }

  /**
   * Return where in its data a run begins: at `start`, or where it was interrupted.
   *
   * @throws UsageError: it would continue with other data, batches or seed than it began with.
   */
  takePosition(start: DataPosition): DataPosition {
    const kept = this.position;
    if (!kept) return start;
    for (const field of ["batchSize", "accumulate", "seed", "shuffle", "samples", "schedule"] as const) {
      if (kept[field] !== start[field]) {
        throw new UsageError(
          `the run was begun with ${field} ${show(kept[field])}, not ${show(start[field])}; ` +
            "resume it with the same",
        );
      }
    }
    this.position = null;
    return kept;
  }

  /**
   * Check that the storage holds no unfinished run; `restart` deletes it.
   *
   * @throws UnfinishedRun: one does.
   * @throws StorageInUse: another client trains.
   */
  async beginRun({ restart }: { restart: boolean }): Promise<void> {
    await this.hold();
    const found = await findUnfinished(this.#store, await this.#store.readOutcome());
    if (!found || found.session === this.session) return;
    if (!restart) throw new UnfinishedRun(found.step);
    for (const session of await this.#store.sessions()) {
      if (session !== this.session) await this.#store.remove(session);
    }
  }

  /** Take and release the lock one after the other, in the order of asking. */
  #inOrder(act: () => Promise<void>): Promise<void> {
    const mine = this.#locking.then(act);
    this.#locking = mine.catch(() => {}); // whoever asked hears of it
    return mine;
  }

  #describe(executor: Executor, position: DataPosition | null): Checkpoint {
    const { step } = executor;
    const tensors = executor.state();
    return { session: this.session, step, tensors, position, written: Date.now() };
  }
}

function show(setting: unknown): string {
  return setting === "" ? "none" : String(setting);
}

/** Find the newest checkpoint of the run that was written last, unless it was finished. */
async function findUnfinished(
  store: CheckpointStore,
  outcome: Checkpoint | undefined,
): Promise<Checkpoint | undefined> {
  let newest: Checkpoint | undefined;
  for (const session of await store.sessions()) {
    const [step] = await store.steps(session);
    if (step === undefined) continue; // it was finished meanwhile
    if (session === outcome?.session && step <= outcome.step) continue;
    const found = await store.read(session, step);
    if (!newest || found.written > newest.written) newest = found;
  }
  return newest;
}

/** Draw a session's name, 32 hexadecimal digits; who knows it can train it. */
function drawSession(): string {
  return toHex(crypto.getRandomValues(new Uint8Array(16)));
}
