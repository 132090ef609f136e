/**
 * The client's side of a session as an event machine, without input and output.
 *
 * It greets, reconnects, sends the messages of open tasks again, byte for byte, and says how long to
 * wait; it never waits, reads no clock and opens no connection.  Its shell reports what happens
 * and does what {@link Conversation.takeEffects} asks for; who uses it learns from
 * {@link Conversation.takeOutcome} what came, each tensor exactly once.
 */

import {
  ConnectionLost,
  ProtocolError,
  RemoteProtocolError,
  ServerBusy,
  StaleConnection,
  StepRestarted,
  StepsLost,
} from "../errors.js";
import { REPLACED } from "../messages.js";
import type { Message, MessageOf, TaskKey, TensorsMessage } from "../messages.js";
import type { NdArrays } from "../tensors.js";
import { Protocol } from "../wire/protocols.js";
import { explainUnsaved, translateFault } from "./faults.js";
import { checkWelcome, makeHello } from "./greetings.js";
import type { Greeter, SharingTerms } from "./greetings.js";
import { SentTasks } from "./open_tasks.js";
import type { OpenTask, SentMessage } from "./open_tasks.js";
import { listDelays } from "./retries.js";

/** Times in a row that a connection may prove too old before it is taken for a second client's. */
export const GREETINGS = 10;

export interface ConversationOptions extends Greeter {
  /** Shown before the greeting. */
  readonly token?: string | undefined;
  /** Seconds without anything new after which the client gives up; never by default. */
  readonly giveUpAfter?: number | undefined;
  /** Whether the first connection is worth waiting for, as every later one is. */
  readonly isPatient: boolean;
  /** Called with the cause whenever the connection is lost. */
  readonly onReconnect?: ((cause: Error) => void) | undefined;
  /** Draws numbers from 0 to 1, which spread the attempts to reconnect. */
  readonly random?: (() => number) | undefined;
}

/** What the shell is to do: connect, send, or close the connection. */
export type Effect =
  | { readonly type: "Dial" | "HangUp" }
  | { readonly type: "Transmit"; readonly content: Uint8Array<ArrayBuffer> };

/** What came: an answer to a greeting, a reply, an answer to a save (why it failed), or an error. */
export type Outcome =
  | { readonly type: "Greeted"; readonly step: number }
  | { readonly type: "Replied"; readonly key: TaskKey; readonly tensors: NdArrays }
  | { readonly type: "SaveAnswered"; readonly reason: string }
  | { readonly type: "Failed"; readonly error: Error };

/** `lost`: there is no connection, and nothing is done about it before it is asked for. */
type State = "lost" | "waiting" | "dialing" | "greeting" | "open" | "closed";

/**
 * One client's conversation with its server; all times are in seconds of one clock.
 *
 * `step` is where both sides are since the last greeting: the client's own step, or an earlier one
 * that it kept.  `reconnects` counts the connections that were lost.  `terms` say how the server
 * joins what its clients learn, and stay as they are.  `wakeAt` is when to call {@link wake}.
 */
export class Conversation {
  step = 0;
  reconnects = 0;
  terms: SharingTerms | undefined;
  wakeAt: number | undefined;
  readonly #options: ConversationOptions;
  #state: State = "lost";
  #generation = 0;
  #attempts = 0; // connections in a row that were too old
  #protocol: Protocol;
  #wanted = 1; // the tasks of a step to have open at once
  #granted = 1; // of which the server permits so many
  #isReturning = false; // it connects again because it was asked to
  readonly #tasks = new SentTasks();
  #repeated: OpenTask | undefined; // whose replies come again before anything else
  #saving: MessageOf<"Save"> | undefined;
  #delays: Generator<number, never> | undefined; // they grow until something new comes
  #lostAt: number | undefined; // since then nothing new has come
  #effects: Effect[] = [];
  #outcomes: Outcome[] = [];

  constructor(options: ConversationOptions) {
    this.#options = options;
    this.#protocol = new Protocol(options.manifest);
  }

  /** How many tasks of a step may be open at once: as many as both sides permit. */
  get inFlight(): number {
    return Math.min(this.#wanted, this.#granted);
  }

  /** Return what the shell is to do now, in order. */
  takeEffects(): readonly Effect[] {
    return this.#effects.splice(0);
  }

  /** Return what came first of what was not taken yet. */
  takeOutcome(): Outcome | undefined {
    return this.#outcomes.shift();
  }

  // What the user asks for.

  /** Connect and greet: `Greeted`, or `Failed`. */
  start(now: number): void {
    if (this.#options.isPatient) this.#seek(undefined, now);
    else this.#dial();
  }

  /**
   * Connect and greet again, to go back with the server to the client's step, or to have `inFlight`
   * tasks of a step open at once from now on: `Greeted`, or `Failed`.
   */
  returnToStep(now: number, inFlight = this.#wanted): void {
    this.#wanted = inFlight;
    this.#isReturning = true;
    this.#hangUp();
    this.#seek(undefined, now);
  }

  /** Begin a task: what is sent of it is kept until {@link end}. */
  begin(key: TaskKey): void {
    this.#tasks.begin(key);
  }

  /**
   * Send wires of an open task: `Replied` for each answer that did not come before.
   *
   * @throws LocalProtocolError: the task is not open, or its phase does not have these wires.
   */
  send(key: TaskKey, wires: NdArrays, seed: number, learningRate: number): void {
    const sent = this.#tasks.add(key, { seed, learningRate }, (message) => {
      return this.#protocol.write(message, wires);
    });
    if (this.#canSend) this.#sendAll([sent]);
  }

  /** Close a task that is complete. */
  end(key: TaskKey): void {
    this.#tasks.end(key);
    this.#protocol.end(key);
  }

  /** Give up all open tasks, and the micro-batches of the running step. */
  endAll(): void {
    this.#tasks.endAll();
    this.#protocol.endAll();
    this.#outcomes = [];
  }

  /** Ask the server to write its state: `SaveAnswered`. */
  save(step: number, { publish, keep }: { publish: boolean; keep: boolean }): void {
    this.#saving = { type: "Save", session: this.#options.session, step, publish, keep };
    if (this.#canSend) this.#send(this.#saving);
  }

  /**
   * End the conversation; may be called twice.
   *
   * Where it is not `forGood` only the connection is over, and the server keeps the session.
   */
  close({ forGood }: { forGood: boolean }): void {
    const isSeeking = this.#state === "waiting" || this.#state === "dialing";
    if (isSeeking) this.#fail(new ConnectionLost("the server", "closed here"));
    try {
      if (forGood && this.#isConnected) this.#send({ type: "Bye" });
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error; // the other side may be gone already
    }
    const unsent = this.#effects;
    this.#hangUp();
    this.#effects = [...unsent, ...this.#effects];
    this.#state = "closed";
  }

  // What the shell reports.

  /** The connection that was asked for is there. */
  connected(): void {
    if (this.#state !== "dialing") {
      this.#effects.push({ type: "HangUp" }); // it was closed meanwhile
      return;
    }
    this.#protocol = new Protocol(this.#options.manifest);
    this.#generation += 1;
    this.#state = "greeting";
    const { token } = this.#options;
    if (token !== undefined) this.#send({ type: "Login", token });
    this.#send(this.#makeHello());
  }

  /** No connection could be had, or it ended. */
  lost(error: Error, now: number): void {
    const state = this.#state;
    if (state === "closed") {
      this.#fail(error);
    } else if (state === "dialing" || state === "greeting") {
      this.#refuse(error, now);
    } else if (!(error instanceof ConnectionLost)) {
      this.#fail(error);
    } else if (error.code === REPLACED) {
      this.#hangUp();
      this.#fail(new StaleConnection(this.#generation, this.#generation + 1)); // at the least
    } else if (state !== "waiting") {
      this.#hangUp();
      this.#options.onReconnect?.(error);
      this.#seek(error, now);
    }
  }

  /** A whole message came. */
  receive(content: Uint8Array, now: number): void {
    if (!this.#isConnected) return;
    try {
      this.#take(content);
    } catch (error) {
      if (this.#state === "greeting") this.#refuse(error as Error, now);
      else this.#fail(error as Error);
    }
  }

  /** The time that {@link wakeAt} names has come. */
  wake(now: number): void {
    if (this.#state === "waiting" && now >= this.wakeAt!) this.#dial();
  }

  get #canSend(): boolean {
    return this.#state === "open" && !this.#repeated;
  }

  get #isConnected(): boolean {
    return ["greeting", "open"].includes(this.#state);
  }

  #take(content: Uint8Array): void {
    const { message, tensors } = this.#protocol.receive(content);
    switch (message.type) {
      case "Fault":
        throw translateFault(message, this.#generation);
      case "Welcome":
        return this.#enter(message); // digest and wires were compared
      case "Tensors":
        return this.#takeReply(message, tensors);
      default:
        return this.#takeAnswer(message as MessageOf<"Saved" | "Unsaved">); // no other is let in
    }
  }

  #takeReply(message: TensorsMessage, tensors: NdArrays): void {
    const last = this.#repeated;
    const task = this.#tasks.takeReply(message, last);
    if (task) {
      this.#noteProgress();
      this.#outcomes.push({ type: "Replied", key: task.key, tensors });
    } else if (last && last.due === last.received) this.#resume();
  }

  #takeAnswer(message: MessageOf<"Saved" | "Unsaved">): void {
    const [{ step, keep }, saved] = [this.#saving!, message.step];
    if (saved !== step) throw new RemoteProtocolError(`it saved step ${saved}, not ${step}`);
    this.#saving = undefined;
    this.#noteProgress();
    this.#outcomes.push({ type: "SaveAnswered", reason: explainUnsaved(message, keep) });
  }

  /** Continue with the server where its answer to the greeting says. */
  #enter(welcome: MessageOf<"Welcome">): void {
    const { step } = this.#options.findResumePoint();
    const isFirst = !this.terms;
    this.terms = checkWelcome(welcome, this.#options, this.terms);
    this.step = welcome.step;
    this.#granted = Math.max(1, welcome.inFlight);
    this.#state = "open";
    if (isFirst) {
      this.#lostAt = undefined;
      this.#outcomes.push({ type: "Greeted", step: this.step });
      return;
    }
    if (!this.#isReturning) this.reconnects += 1;
    if (this.step !== step) throw new StepsLost(this.step);
    // a server that permits fewer tasks than before is another one, and has none of the step's
    const isForgotten = this.#tasks.count > this.inFlight;
    const restarts = welcome.restarts && this.#tasks.microBatch;
    if (restarts || isForgotten) throw new StepRestarted(this.step);
    if (welcome.wantsRepeat) {
      const last = this.#findLast();
      if (!last) {
        throw new RemoteProtocolError("it wants messages again that the client does not have");
      }
      last.due = 0;
      this.#sendAll(last.sent);
      if (last.received) {
        this.#repeated = last;
        return;
      }
    }
    this.#resume();
  }

  /** Send again what the server may not have had, in the order in which it was sent. */
  #resume(): void {
    this.#state = "open";
    this.#repeated = undefined;
    this.#sendAll(this.#tasks.repeat());
    if (this.#saving) this.#send(this.#saving);
    if (!this.#isReturning) return;
    this.#isReturning = false;
    this.#noteProgress();
    this.#outcomes.push({ type: "Greeted", step: this.step });
  }

  /** Something new came: whatever breaks from now on is another fault than before. */
  #noteProgress(): void {
    this.#delays = undefined;
    this.#lostAt = undefined;
  }

  /** A greeting failed: fail with it, or greet again. */
  #refuse(error: Error, now: number): void {
    this.#hangUp();
    const isStale = error instanceof StaleConnection && error.newest >= this.#generation;
    if (isStale && this.#attempts < GREETINGS) {
      this.#generation = error.newest; // an earlier run of this client had it
      this.#dial(this.#attempts);
      return;
    }
    const canWait = this.terms || this.#options.isPatient;
    const isPassing = error instanceof ConnectionLost || error instanceof ServerBusy;
    if (canWait && isPassing) this.#seek(error, now);
    else this.#fail(error);
  }

  /** Connect when it is time for the next attempt, or give up. */
  #seek(cause: Error | undefined, now: number): void {
    this.#lostAt ??= now;
    this.#delays ??= listDelays(this.#options.random);
    const delay = this.#delays.next().value;
    const left = this.#lostAt + (this.#options.giveUpAfter ?? Infinity) - now;
    if (cause && left <= 0) {
      this.#fail(cause);
      return;
    }
    this.#state = "waiting";
    this.wakeAt = now + Math.min(delay, left);
    this.wake(now);
  }

  #dial(attempts = 0): void {
    this.#attempts = attempts + 1;
    this.wakeAt = undefined;
    this.#state = "dialing";
    this.#effects.push({ type: "Dial" });
  }

  /** End the connection; what was not sent of it is sent again on the next one, or not at all. */
  #hangUp(): void {
    this.#effects = this.#isConnected ? [{ type: "HangUp" }] : [];
    this.#repeated = undefined;
    this.wakeAt = undefined;
    this.#state = "lost";
  }

  #fail(error: Error): void {
    this.#saving = undefined;
    this.#isReturning = false;
    this.#outcomes.push({ type: "Failed", error });
  }

  #makeHello(): MessageOf<"Hello"> {
    return makeHello(this.#options, {
      generation: this.#generation,
      isOpen: this.#tasks.isOpen,
      canRepeat: !!this.#findLast(),
      microBatch: this.#tasks.microBatch,
      inFlight: this.#wanted,
    });
  }

  #findLast(): OpenTask | undefined {
    return this.#tasks.findLast(this.#options.findResumePoint().step);
  }

  #send(message: Message): void {
    this.#effects.push({ type: "Transmit", content: this.#protocol.send(message) });
  }

  #sendAll(messages: readonly SentMessage[]): void {
    for (const { message, content } of messages) {
      this.#protocol.note(message);
      this.#effects.push({ type: "Transmit", content });
    }
  }
}
