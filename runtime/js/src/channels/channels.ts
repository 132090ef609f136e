/**
 * A client's channel to its server: one logical connection that reconnects where it breaks.
 *
 * Its conversation decides; this shell dials, sends, receives and sleeps for it.  What comes while the
 * client computes waits in the connection.
 */

import { ConnectionLost } from "../errors.js";
import type { TaskKey } from "../messages.js";
import type { NdArrays } from "../tensors.js";
import type { Transport } from "../wire/transports.js";
import { Conversation } from "./conversations.js";
import type { ConversationOptions, Outcome } from "./conversations.js";
import type { SharingTerms } from "./greetings.js";

/** Makes a new connection; it throws ConnectionLost where none can be had now. */
export type Dial = () => Promise<Transport>;

export interface ChannelOptions extends ConversationOptions {
  readonly dial: Dial;
}

type OutcomeOf<T extends Outcome["type"]> = Extract<Outcome, { type: T }>;

/** The connection of one session; made by {@link Channel.open}. */
export class Channel {
  readonly #dial: Dial;
  readonly #conversation: Conversation;
  readonly #ended = new AbortController();
  #transport: Transport | undefined;
  #mustDial = false;
  #allowed = 1; // tasks of a step to have open at once, as the server was told
  #past: readonly [number, number] = [0, 0];

  private constructor({ dial, ...options }: ChannelOptions) {
    this.#dial = dial;
    this.#conversation = new Conversation(options);
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
    channel.#conversation.start(now());
    await channel.#next("Greeted");
    return channel;
  }

  /** Where both sides are since the last greeting: see {@link Conversation}. */
  get step(): number {
    return this.#conversation.step;
  }

  /** Connections that were made again. */
  get reconnects(): number {
    return this.#conversation.reconnects;
  }

  /** How the server joins what its clients learn. */
  get terms(): SharingTerms {
    return this.#conversation.terms!; // it has greeted
  }

  /** Bytes sent and received so far. */
  get traffic(): readonly [sent: number, received: number] {
    const [sent, received] = this.#past;
    const transport = this.#transport;
    return [sent + (transport?.bytesSent ?? 0), received + (transport?.bytesReceived ?? 0)];
  }

  /**
   * Return how many tasks of a step may be open at once, of at most `wanted`.
   *
   * The server is told so by another greeting, so that it keeps as many replies and not more.
   *
   * @throws StepsLost, ConnectionLost: as {@link receiveWires}.
   */
  async allow(wanted: number): Promise<number> {
    if (wanted > this.#allowed) {
      this.#allowed = wanted;
      this.#conversation.returnToStep(now(), wanted);
      await this.#next("Greeted");
    }
    return Math.min(wanted, this.#conversation.inFlight);
  }

  /** Begin a task: what is sent of it from now on is kept until {@link end}. */
  begin(key: TaskKey): void {
    this.#conversation.begin(key);
  }

  /** Close a task that is complete. */
  end(key: TaskKey): void {
    this.#conversation.end(key);
  }

  /** Give up all open tasks. */
  endAll(): void {
    this.#conversation.endAll();
  }

  /** Send wires of an open task, now or as soon as there is a connection again. */
  sendWires(key: TaskKey, wires: NdArrays, seed: number, learningRate: number): void {
    this.#conversation.send(key, wires, seed, learningRate);
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
  async receiveWires(): Promise<{ readonly key: TaskKey; readonly tensors: NdArrays }> {
    return this.#next("Replied");
  }

  /**
   * Ask the server to write its state; return the reason where it could not, or nothing.
   *
   * @throws StepsLost, ConnectionLost, RemoteFault: as {@link receiveWires}.
   */
  async save(step: number, { publish }: { publish: boolean }): Promise<string> {
    this.#conversation.save(step, { publish, keep: false });
    return (await this.#next("SaveAnswered")).reason;
  }

  /**
   * End the session with a Bye message.  May be called twice.
   *
   * Where it is not `forGood` only the connection is over, and the server keeps the session.
   */
  close({ forGood }: { forGood: boolean }): void {
    this.#conversation.close({ forGood });
    this.#apply();
    this.#hangUp();
    this.#ended.abort();
  }

  /** Do what the conversation asks for until it has something to tell. */
  async #next<T extends Outcome["type"]>(type: T): Promise<OutcomeOf<T>> {
    const conversation = this.#conversation;
    for (;;) {
      this.#apply();
      const outcome = conversation.takeOutcome();
      if (outcome?.type === "Failed") throw outcome.error;
      if (outcome?.type === type) return outcome as OutcomeOf<T>;
      try {
        if (this.#mustDial) {
          this.#mustDial = false;
          this.#transport = await this.#dial();
          conversation.connected();
        } else if (conversation.wakeAt !== undefined) {
          await this.#sleep(conversation.wakeAt - now());
          conversation.wake(now());
        } else {
          if (!this.#transport) throw new ConnectionLost("the server", "the connection is closed");
          conversation.receive(await this.#transport.receive(), now());
        }
      } catch (error) {
        conversation.lost(error as Error, now());
      }
    }
  }

  /** Send and hang up as the conversation asks; {@link #next} dials. */
  #apply(): void {
    for (let effects; (effects = this.#conversation.takeEffects()).length; ) {
      try {
        for (const effect of effects) {
          if (effect.type === "Transmit") this.#transport?.send(effect.content);
          else if (effect.type === "HangUp") this.#hangUp();
          else this.#mustDial = true;
        }
      } catch (error) {
        this.#conversation.lost(error as Error, now()); // the rest was for this connection, too
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
