/**
 * A client's side of a session as an event machine: it sends, receives and waits for nothing.
 *
 * It greets the server, and after a lost connection connects again, greets, and sends the messages of
 * the unfinished tasks again, byte for byte, so that its caller sends and receives each tensor exactly
 * once.  Which step both sides continue from comes out of the greeting; going back there is the
 * caller's business.  Its shell reports what happens outside, with the time in seconds, and does what
 * {@link Exchange.takeEffects} asks for.
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
import type { Aim, Effect, Outcome, State } from "./exchange_events.js";
import { readSaved, translateFault } from "./faults.js";
import { checkWelcome, makeHello } from "./greetings.js";
import type { Greeter, SharingTerms } from "./greetings.js";
import { SentTasks, takeDue } from "./open_tasks.js";
import type { OpenTask, SentMessage } from "./open_tasks.js";
import { Attempts } from "./retries.js";

/** Times in a row that a connection may prove too old before it is taken for a second client's. */
export const GREETINGS = 10;

export interface ExchangeOptions extends Greeter {
  /** Shown before the greeting. */
  readonly token?: string | undefined;
  /** Seconds without anything new after which the client gives up; never by default. */
  readonly giveUpAfter?: number | undefined;
  /** Called with the cause whenever the connection is lost. */
  readonly onReconnect?: ((cause: Error) => void) | undefined;
  /** Draws numbers from 0 to 1, which spread the attempts to reconnect. */
  readonly random?: (() => number) | undefined;
}

/**
 * One client's exchange with its server.
 *
 * `step` is where both sides are since the last greeting: the client's own step, or an earlier one
 * that it kept.  `reconnects` counts the connections that were lost.  `terms` say how the server
 * joins what its clients learn, and stay as they are.  `inFlight` is how many tasks of a step may be
 * open at once.  `wakeAt` is when to call {@link wake}.
 */
export class Exchange {
  step = 0;
  reconnects = 0;
  terms: SharingTerms | undefined;
  inFlight = 1;
  wakeAt: number | undefined;
  readonly #options: ExchangeOptions;
  readonly #attempts: Attempts;
  readonly #tasks = new SentTasks();
  #state: State = "closed";
  #aim: Aim = "start";
  #isPatient = false;
  #generation = 0;
  #greetings = 0; // rejected in a row
  #wanted = 1; // tasks in flight
  #protocol: Protocol;
  #repeated: OpenTask | undefined; // whose replies come once more
  #saving: MessageOf<"Save"> | undefined;
  #effects: Effect[] = [];
  #outcomes: Outcome[] = [];

  constructor(options: ExchangeOptions) {
    this.#options = options;
    this.#attempts = new Attempts(options.giveUpAfter, options.random);
    this.#protocol = new Protocol(options.manifest);
  }

  /** Return what is to be done now, in order. */
  takeEffects(): readonly Effect[] {
    return this.#effects.splice(0);
  }

  /** Return what came first of what the caller waits for, if anything did. */
  takeOutcome(): Outcome | undefined {
    return this.#outcomes.shift();
  }

  /** Connect for the first time, and try again if that fails and the client is patient. */
  start(now: number, { isPatient }: { isPatient: boolean }): void {
    [this.#aim, this.#isPatient] = ["start", isPatient];
    if (isPatient) this.#seek(undefined, now);
    else this.#dial();
  }

  /** Connect again, so that the server goes back to the client's step. */
  returnToStep(now: number): void {
    [this.#aim, this.#isPatient] = ["return", true];
    this.#seek(undefined, now);
  }

  /**
   * Ask for more tasks in flight from the next greeting on; return whether one is needed.
   *
   * If it is, call {@link returnToStep}.  The server may permit fewer.
   */
  widen(inFlight: number): boolean {
    const isMore = inFlight > this.#wanted;
    if (isMore) this.#wanted = inFlight;
    return isMore;
  }

  /**
   * Send wires of a task, which the first ones open, now or as soon as there is a connection again.
   *
   * @throws LocalProtocolError, ArrayMismatch: its phase does not have these wires.
   */
  send(key: TaskKey, wires: NdArrays, seed: number, learningRate: number): void {
    const sent = this.#tasks.record(key, { seed, learningRate }, (message) => {
      return this.#protocol.write(message, wires);
    });
    if (this.#canSend()) this.#repeat([sent]);
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

  /** Ask the server to write its state. */
  save(step: number, { publish, keep }: { publish: boolean; keep: boolean }): void {
    this.#saving = { type: "Save", session: this.#options.session, step, publish, keep };
    if (this.#canSend()) this.#send(this.#saving);
  }

  /**
   * End the exchange; may be called twice.
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
    this.#hangUp();
  }

  /** The connection is open. */
  connected(): void {
    if (this.#state !== "dialing") {
      this.#effects.push({ type: "HangUp" }); // it was closed meanwhile
      return;
    }
    this.#state = "greeting";
    this.#protocol = new Protocol(this.#options.manifest);
    this.#generation += 1;
    this.#tasks.beginConnection();
    const { token } = this.#options;
    if (token !== undefined) this.#send({ type: "Login", token });
    this.#send(this.#makeHello());
  }

  /** It is the time that {@link wakeAt} names. */
  wake(now: number): void {
    if (this.wakeAt !== undefined && now >= this.wakeAt) this.#dial();
  }

  /** The connection has ended, or could not be opened. */
  lost(error: Error, now: number): void {
    this.#effects = []; // it was for that connection
    if (this.#state === "dialing" || this.#state === "greeting") this.#failGreeting(error, now);
    else if (!this.#isConnected || !(error instanceof ConnectionLost)) this.#fail(error);
    else if (error.code === REPLACED) {
      this.#hangUp();
      this.#fail(new StaleConnection(this.#generation, this.#generation + 1)); // at the least
    } else {
      this.#options.onReconnect?.(error);
      [this.#aim, this.#isPatient] = ["resume", true];
      this.#seek(error, now);
    }
  }

  /** A whole message has arrived; the tensors of an outcome are views of it. */
  receive(content: Uint8Array, now: number): void {
    if (!this.#isConnected) return;
    try {
      this.#take(this.#protocol.receive(content));
    } catch (error) {
      if (this.#state === "greeting") this.#failGreeting(error as Error, now);
      else this.#fail(error as Error);
    }
  }

  get #isConnected(): boolean {
    return ["greeting", "repeating", "open"].includes(this.#state);
  }

  /** Check whether a message can go now; otherwise it goes with all others, if there is a later. */
  #canSend(): boolean {
    if (this.#state === "closed") {
      this.#fail(new ConnectionLost("the server", "the connection is closed"));
    }
    return this.#state === "open";
  }

  #take({ message, tensors }: { message: Message; tensors: NdArrays }): void {
    if (message.type === "Fault") throw translateFault(message, this.#generation);
    if (message.type === "Welcome") this.#enter(message); // digest and wires were compared
    else if (this.#saving && this.#state === "open") {
      const reason = readSaved(this.#saving, message);
      this.#attempts.noteProgress();
      this.#saving = undefined;
      this.#outcomes.push({ type: "SaveAnswered", reason });
    } else this.#takeReply(message as TensorsMessage, tensors); // no other is let in
  }

  #takeReply(message: TensorsMessage, wires: NdArrays): void {
    const repeated = this.#state === "repeating" ? this.#repeated : undefined;
    if (repeated) {
      takeDue(repeated, message);
      if (repeated.due === repeated.received) this.#repeatOpen();
      return;
    }
    const task = this.#tasks.takeReply(message);
    if (!task) return;
    this.#attempts.noteProgress();
    this.#outcomes.push({ type: "Replied", key: task.key, wires });
  }

  /** Continue with the server where its answer to the greeting says. */
  #enter(welcome: MessageOf<"Welcome">): void {
    const { step } = this.#options.findResumePoint();
    this.terms = checkWelcome(welcome, this.#options, this.terms);
    [this.step, this.#state, this.#greetings] = [welcome.step, "open", 0];
    this.inFlight = Math.max(1, Math.min(welcome.inFlight, this.#wanted));
    if (this.#aim === "start") {
      this.#attempts.forgetLoss(); // nothing was lost before the start
      this.#outcomes.push({ type: "Greeted" });
      return;
    }
    if (this.#aim === "resume") this.reconnects += 1;
    if (this.step !== step) throw new StepsLost(this.step);
    // a server that permits fewer tasks than before is another one, and has none of the step's
    const isForgotten = this.#tasks.count > this.inFlight;
    const restarts = welcome.restarts && this.#tasks.microBatch;
    if (restarts || isForgotten) throw new StepRestarted(this.step);
    if (this.#aim === "return") {
      this.#attempts.noteProgress();
      this.#outcomes.push({ type: "Greeted" });
    }
    if (welcome.wantsRepeat) this.#repeatLast();
    else this.#repeatOpen();
  }

  /** Send the messages of the last task again, before those of the open ones. */
  #repeatLast(): void {
    const last = this.#findLast();
    if (!last) {
      throw new RemoteProtocolError("it wants messages again that the client does not have");
    }
    last.due = 0;
    this.#repeat(last.sent);
    [this.#repeated, this.#state] = [last, "repeating"];
    if (!last.received) this.#repeatOpen();
  }

  /** Send again what the server may not have had. */
  #repeatOpen(): void {
    this.#state = "open";
    this.#repeat(this.#tasks.repeat());
    if (this.#saving) this.#send(this.#saving);
  }

  /** A greeting failed: greet again if that can help. */
  #failGreeting(error: Error, now: number): void {
    this.#hangUp();
    const isStale = error instanceof StaleConnection;
    this.#greetings = isStale ? this.#greetings + 1 : 0;
    if (isStale && error.newest >= this.#generation && this.#greetings < GREETINGS) {
      this.#generation = error.newest; // an earlier run of this client had it
      this.#dial();
      return;
    }
    this.#greetings = 0;
    const isPassing = error instanceof ConnectionLost || error instanceof ServerBusy;
    if (this.#isPatient && isPassing) this.#seek(error, now);
    else this.#fail(error);
  }

  /** Wait before the next attempt to connect, or give up. */
  #seek(cause: Error | undefined, now: number): void {
    this.#hangUp();
    const { delay, left } = this.#attempts.findDelay(now);
    if (cause && left <= 0) this.#fail(cause);
    else [this.#state, this.wakeAt] = ["waiting", now + delay];
  }

  #dial(): void {
    this.wakeAt = undefined;
    this.#state = "dialing";
    this.#effects.push({ type: "Connect" });
  }

  #hangUp(): void {
    this.wakeAt = undefined;
    if (this.#state !== "closed") this.#effects.push({ type: "HangUp" });
    this.#state = "closed";
  }

  #fail(error: Error): void {
    this.#saving = undefined;
    this.#outcomes.push({ type: "Failed", error });
  }

  #makeHello(): MessageOf<"Hello"> {
    return makeHello(this.#options, {
      generation: this.#generation,
      isOpen: this.#tasks.count > 0,
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

  #repeat(messages: readonly SentMessage[]): void {
    for (const { message, content } of messages) {
      this.#protocol.note(message);
      this.#effects.push({ type: "Transmit", content });
    }
  }
}
