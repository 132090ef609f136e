/**
 * The client's half of a split model: its part, its journal and its link to the server, as one.
 *
 * It carries out one task after the other, lets both sides write their checkpoints, and goes back
 * with the server where that one lost steps.  Data, epochs and records are the client's business.
 */

import type { Link } from "../channels/channels.js";
import type { Executor } from "../engine/executors.js";
import { LocalProtocolError, NotSaved, StepsLost } from "../errors.js";
import { TRAIN } from "../manifests.js";
import type { TaskKey } from "../messages.js";
import type { Position } from "../storage/checkpoints.js";
import type { NdArrays } from "../tensors.js";
import type { Journal } from "./training_runs.js";

/** What training does where a checkpoint cannot be written. */
export type WhenUnsaved = "stop" | "continue";

/** Told of all that leaves the device and comes to it. */
export type OnWires = (direction: "sent" | "received", phase: string, wires: NdArrays) => void;

export interface HalfOptions {
  readonly executor: Executor;
  readonly journal: Journal;
  readonly link: Link;
  /** Keys the random masks. */
  readonly seed: number;
  readonly onWires?: OnWires | undefined;
}

/**
 * `place` is where in its data the state stands, as far as that is known: the caller sets it, and
 * it changes where steps are lost.
 */
export class Half {
  place: Position | null = null;
  readonly executor: Executor;
  readonly journal: Journal;
  readonly #link: Link;
  readonly #seed: number;
  readonly #onWires: OnWires | undefined;
  #closed = false;
  #isHalfPublished = false;
  #released: Promise<void> | undefined;
  #others = 0; // numbers the tasks that are no training step
  #last: Promise<unknown> = Promise.resolve();

  constructor({ executor, journal, link, seed, onWires }: HalfOptions) {
    this.executor = executor;
    this.journal = journal;
    this.#link = link;
    this.#seed = seed;
    this.#onWires = onWires;
  }

  /** Bytes sent and received so far. */
  get traffic(): readonly [sent: number, received: number] {
    return this.#link.traffic;
  }

  /**
   * Carry one task through, from its data to its commit, and return the phase's results.
   *
   * `expected` is the step that a training step is to be made at.
   *
   * @throws StepsLost: the server lost steps; both sides stand at an earlier one, and can go on.
   * @throws DataError, StageFailed, ProtocolError: the task is given up, and the half is closed.
   */
  async perform(
    phase: string,
    data: NdArrays,
    { learningRate, expected }: { learningRate: number; expected?: number },
  ): Promise<NdArrays> {
    return this.#inTurn(async () => {
      // Another task that ran meanwhile may have found that steps are lost.
      if (expected !== undefined && expected !== this.executor.step) {
        throw new StepsLost(this.executor.step);
      }
      const step = phase === TRAIN ? this.executor.step : this.#others++;
      const key = { session: this.journal.session, phase, step, microBatch: 0 };
      await this.executor.begin(key, { data, seed: this.#seed, learningRate });
      try {
        return await this.#goingBack(() => this.#exchange(key, learningRate));
      } catch (error) {
        if (!(error instanceof StepsLost)) this.close();
        throw error;
      } finally {
        this.executor.abandon(key);
        this.#link.end();
      }
    });
  }

  /**
   * Let both sides write a checkpoint, one after the other.
   *
   * Each side keeps two, so there is one that both have as long as neither is two ahead: the one
   * whose last was not written goes first.
   *
   * @throws NotSaved: one could not, and `whenUnsaved` says to stop.
   * @throws StepsLost, ProtocolError: as {@link perform}.
   */
  async checkpoint(place: Position, whenUnsaved: WhenUnsaved): Promise<void> {
    return this.#inTurn(async () => {
      try {
        if (this.journal.isBehind) {
          await this.journal.write(this.executor, place);
          await this.#saveRemotely(false);
        } else {
          await this.#saveRemotely(false);
          await this.journal.write(this.executor, place);
        }
      } catch (error) {
        if (!(error instanceof NotSaved) || whenUnsaved === "stop") throw error;
      }
    });
  }

  /**
   * Let both sides write their state as the outcome of the training, the server first.
   *
   * @throws NotSaved: one could not, or is not finite.
   * @throws StepsLost, ProtocolError: as {@link perform}.
   */
  async publish(): Promise<void> {
    return this.#inTurn(async () => {
      this.journal.checkOutcome(this.executor);
      await this.journal.hold();
      await this.#saveRemotely(true);
      this.#isHalfPublished = true;
      await this.journal.publish(this.executor, this.place);
      this.#isHalfPublished = false;
    });
  }

  /**
   * Say good-bye to the server; may be called twice.
   *
   * Where the run has checkpoints and is not finished, or the server published its state and this
   * side did not, it only hangs up: the server would forget what a resumed run begins from.
   */
  close(): void {
    const { kept } = this.journal.stand(this.executor.step);
    const isUnfinished = this.#isHalfPublished || kept.length > 0;
    if (!this.#closed) this.#link.close({ forGood: !isUnfinished });
    this.#closed = true;
    this.#released = this.journal.release();
    this.#released.catch(() => {}); // settle tells
  }

  /** Wait until nothing is under way. */
  async settle(): Promise<void> {
    await this.#last;
    await this.#released;
  }

  /** One thing at a time, in the order of asking. */
  #inTurn<T>(act: () => Promise<T>): Promise<T> {
    const mine = this.#last.then(() => {
      if (this.#closed) throw new LocalProtocolError("the client is closed");
      return act();
    });
    this.#last = mine.catch(() => {}); // whoever asked hears of it
    return mine;
  }

  async #exchange(key: TaskKey, learningRate: number): Promise<NdArrays> {
    const { executor } = this;
    this.#link.begin(key);
    for (;;) {
      for await (const wires of executor.advance(key)) {
        this.#onWires?.("sent", key.phase, wires);
        await this.#link.sendWires(wires, this.#seed, learningRate);
      }
      if (executor.isFinished(key)) return executor.finish(key);
      const wires = await this.#link.receiveWires();
      this.#onWires?.("received", key.phase, wires);
      executor.deliver(key, wires);
    }
  }

  async #saveRemotely(publish: boolean): Promise<void> {
    const { step } = this.executor;
    const reason = await this.#goingBack(() => this.#link.save(step, { publish }));
    if (reason) throw new NotSaved("the server's folder", reason);
  }

  /** Take this part back to where the server lost steps, and note the place in the data. */
  async #goingBack<T>(act: () => Promise<T>): Promise<T> {
    try {
      return await act();
    } catch (error) {
      if (error instanceof StepsLost) {
        this.place = await this.journal.goBack(this.executor, error.step);
      }
      throw error;
    }
  }
}
