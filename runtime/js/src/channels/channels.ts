/**
 * A client's channel to its server: one logical connection that reconnects where it breaks.
 *
 * Its exchange decides; this shell dials, sends, receives and sleeps for it.  What comes while the
 * client computes waits in the connection.
 */

import { ConnectionLost } from "../errors.js";
import type { TaskKey } from "../messages.js";
import type { NdArrays } from "../tensors.js";
import type { Transport } from "../wire/transports.js";
import type { Outcome, TaskWires } from "./exchange_events.js";
import { Exchange } from "./exchanges.js";
import type { ExchangeOptions } from "./exchanges.js";
import type { SharingTerms } from "./greetings.js";

/** Makes a new connection; it throws ConnectionLost where none can be had now. */
export type Dial = () => Promise<Transport>;

export interface ChannelOptions extends ExchangeOptions {
  readonly dial: Dial;
  /** Whether the first connection is worth waiting for, as every later one is. */
  readonly isPatient: boolean;
}

type OutcomeOf<T extends Outcome["type"]> = Extract<Outcome, { type: T }>;

/** The connection of one session; made by {@link Channel.open}. */
export class Channel {
  readonly #dial: Dial;
  readonly #exchange: Exchange;
  readonly #ended = new AbortController();
  #transport: Transport | undefined;
  #mustDial = false;
  #past: readonly [number, number] = [0, 0];

  private constructor({ dial, ...options }: ChannelOptions) {
    this.#dial = dial;
    this.#exchange = new Exchange(options);
  }

  /**
   * Connect and greet.
   *
   * @throws ConnectionLost, ServerBusy: no server is there, or it is full.
   * @throws BundleMismatch, Unauthorized, RemoteFault: it refuses.
   * @throws SharingNotPermitted: it joins what its clients learn, and this one may not share.
   */
  static async open(options: ChannelOptions): Promise<Channel> {
    const channel = new Channel(options);
    channel.#exchange.start(now(), options);
    await channel.#next("Greeted");
    return channel;
  }

  /** Where both sides are since the last greeting: see {@link Exchange}. */
  get step(): number {
    return this.#exchange.step;
  }

  /** Connections that were made again. */
  get reconnects(): number {
    return this.#exchange.reconnects;
  }

  /** How the server joins what its clients learn. */
  get terms(): SharingTerms {
    return this.#exchange.terms!; // it has greeted
  }

  /** Bytes sent and received so far. */
  get traffic(): readonly [sent: number, received: number] {
    const [sent, received] = this.#past;
    const transport = this.#transport;
    return [sent + (transport?.bytesSent ?? 0), received + (transport?.bytesReceived ?? 0)];
  }

  /** How many tasks of a step may be open at once. */
  get inFlight(): number {
    return this.#exchange.inFlight;
  }

  /**
   * Have so many tasks of a step open at once from now on, or as many as the server permits.
   *
   * It is told by another greeting, so that it keeps as many replies and not more.
   *
   * @throws StepsLost, ConnectionLost: as {@link receiveWires}.
   */
  async widen(inFlight: number): Promise<void> {
    if (!this.#exchange.widen(inFlight)) return;
    this.#exchange.returnToStep(now());
    await this.#next("Greeted");
  }

  /** Close a task that is complete. */
  end(key: TaskKey): void {
    this.#exchange.end(key);
  }

  /** Give up all open tasks. */
  endAll(): void {
    this.#exchange.endAll();
  }

  /** Send wires of a task, which the first ones open, now or as soon as there is a connection again. */
  sendWires(key: TaskKey, wires: NdArrays, seed: number, learningRate: number): void {
    this.#exchange.send(key, wires, seed, learningRate);
    this.#apply();
  }

  /**
   * Wait for the next wires of an open task that did not come before.
   *
   * @throws StepsLost: the server lost steps; both sides continue from that step.
   * @throws StepRestarted: it lost the step's micro-batches; the step begins again.
   * @throws ConnectionLost: none came within the time.
   * @throws RemoteFault: the server reported an error of its own.
   */
  async receiveWires(): Promise<TaskWires> {
    return this.#next("Replied");
  }

  /**
   * Ask the server to write its state; return the reason where it could not, or nothing.
   *
   * @throws StepsLost, ConnectionLost, RemoteFault: as {@link receiveWires}.
   */
  async save(step: number, { publish }: { publish: boolean }): Promise<string> {
    this.#exchange.save(step, { publish, keep: false });
    return (await this.#next("SaveAnswered")).reason;
  }

  /**
   * End the session with a Bye message.  May be called twice.
   *
   * Where it is not `forGood` only the connection is over, and the server keeps the session.
   */
  close({ forGood }: { forGood: boolean }): void {
    this.#exchange.close({ forGood });
    this.#apply();
    this.#hangUp();
    this.#ended.abort();
  }

  /** Do what the exchange asks for until it has something to tell. */
  async #next<T extends Outcome["type"]>(type: T): Promise<OutcomeOf<T>> {
    const exchange = this.#exchange;
    for (;;) {
      this.#apply();
      const outcome = exchange.takeOutcome();
      if (outcome?.type === "Failed") throw outcome.error;
      if (outcome?.type === type) return outcome as OutcomeOf<T>;
      try {
        if (this.#mustDial) {
          this.#mustDial = false;
          this.#transport = await this.#dial();
          exchange.connected();
        } else if (exchange.wakeAt !== undefined) {
          await this.#sleep(exchange.wakeAt - now());
          exchange.wake(now());
        } else {
          if (!this.#transport) throw new ConnectionLost("the server", "the connection is closed");
          exchange.receive(await this.#transport.receive(), now());
        }
      } catch (error) {
        exchange.lost(error as Error, now());
      }
    }
  }

  /** Send and hang up as the exchange asks; {@link #next} dials. */
  #apply(): void {
    for (let effects; (effects = this.#exchange.takeEffects()).length; ) {
      try {
        for (const effect of effects) {
          if (effect.type === "Transmit") this.#transport?.send(effect.content);
          else if (effect.type === "HangUp") this.#hangUp();
          else this.#mustDial = true;
        }
      } catch (error) {
        this.#exchange.lost(error as Error, now()); // the rest was for this connection, too
      }
    }
  }

  #hangUp(): void {
    this.#past = this.traffic;
    const transport = this.#transport;
    this.#transport = undefined;
    this.#mustDial = false;
    transport?.close();
  }

  /** Wait; closing the channel ends it at once. */
  async #sleep(seconds: number): Promise<void> {
    const { signal } = this.#ended;
    if (!(seconds > 0) || signal.aborted) return;
    await new Promise<void>((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", wake);
        resolve();
      };
      const timer = setTimeout(wake, seconds * 1000);
      signal.addEventListener("abort", wake);
    });
  }
}

/** Seconds of a clock that never goes back. */
function now(): number {
  return performance.now() / 1000;
}
