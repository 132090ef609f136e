/**
 * A client's channel to its server: one logical connection that reconnects where it breaks.
 *
 * It reconnects, greets, and sends the messages of an open task again, byte for byte, so that its
 * user sees tensors go and come, each exactly once.  Which step both sides continue from comes out
 * of the greeting; going back there is the client's business.
 */

import {
  ConnectionLost,
  LocalProtocolError,
  ProtocolError,
  RemoteProtocolError,
  ServerBusy,
  SplitonnxError,
  StaleConnection,
  StepRestarted,
  StepsLost,
} from "../errors.js";
import { SHARE, STEP_PHASES } from "../manifests.js";
import type { PartyManifest } from "../manifests.js";
import { REPLACED } from "../messages.js";
import type { Message, MessageOf, MessageType, TaskKey, TensorsMessage } from "../messages.js";
import type { NdArrays } from "../tensors.js";
import { Protocol } from "../wire/protocols.js";
import type { Transport } from "../wire/transports.js";
import { translateFault } from "./faults.js";
import { checkWelcome, makeHello } from "./greetings.js";
import type { ResumePoint, SharingTerms } from "./greetings.js";
import { countBefore, isLast, takeDue } from "./open_tasks.js";
import type { OpenTask } from "./open_tasks.js";
import { listDelays } from "./retries.js";

/** Times in a row that a connection may prove too old before it is taken for a second client's. */
export const GREETINGS = 10;

/** Makes a new connection; it throws ConnectionLost where none can be had now. */
export type Dial = () => Promise<Transport>;

export interface ChannelOptions {
  readonly dial: Dial;
  readonly manifest: PartyManifest;
  readonly session: string;
  /** Shown before the greeting. */
  readonly token?: string | undefined;
  /** Returns from where the client can resume; called for each greeting. */
  readonly findResumePoint: () => ResumePoint;
  /** Seconds without anything new after which the client gives up; never by default. */
  readonly giveUpAfter?: number | undefined;
  /** Whether the first connection is worth waiting for, as every later one is. */
  readonly isPatient: boolean;
  /** Whether the client may share its parameters, if the server joins what its clients learn. */
  readonly canShare: boolean;
  /** Called with the cause whenever the connection is lost. */
  readonly onReconnect?: ((cause: Error) => void) | undefined;
}

/**
 * The connection of one session; made by {@link Channel.open}.
 *
 * `step` is where both sides are since the last greeting: the client's own step, or an earlier
 * one that it kept.  `reconnects` counts the connections after the first.  `terms` say how the
 * server joins what its clients learn, and stay as they are.
 */
export class Channel {
  step = 0;
  reconnects = 0;
  terms: SharingTerms | undefined;
  readonly #options: ChannelOptions;
  readonly #ended = new AbortController();
  #generation = 0;
  #transport: Transport | undefined;
  #protocol: Protocol;
  #task: OpenTask | undefined;
  #last: OpenTask | undefined; // the last task of a step, which the server may not have made
  #wantsRepeat = false;
  #restarts = false;
  #delays: Generator<number, never> | undefined; // they grow until something new comes
  #lostAt: number | undefined; // seconds; since then nothing new has come
  #past: readonly [number, number] = [0, 0];

  private constructor(options: ChannelOptions) {
    this.#options = options;
    this.#protocol = new Protocol(options.manifest);
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
    channel.step = await (options.isPatient ? channel.#findServer() : channel.#greet());
    channel.#lostAt = undefined;
    return channel;
  }

  /** Bytes sent and received so far. */
  get traffic(): readonly [sent: number, received: number] {
    const [sent, received] = this.#past;
    const now = this.#transport;
    return [sent + (now?.bytesSent ?? 0), received + (now?.bytesReceived ?? 0)];
  }

  /** Begin a task: what is sent from now on is kept until {@link end}. */
  begin(key: TaskKey): void {
    this.#task = { key, sent: [], received: 0, due: 0 };
  }

  /** Close the task: it is complete, or the client gives it up. */
  end(): void {
    if (this.#task && STEP_PHASES.includes(this.#task.key.phase)) this.#last = this.#task;
    this.#task = undefined;
  }

  /**
   * Send wires of the open task.
   *
   * @throws StepsLost: the server lost steps; both sides continue from that step.
   * @throws StepRestarted: it lost the step's micro-batches; the step begins again.
   * @throws ConnectionLost: none came within the time.
   */
  async sendWires(wires: NdArrays, seed: number, learningRate: number): Promise<void> {
    const task = this.#requireTask();
    const { session, phase, step, microBatch } = task.key;
    const turn = task.sent.length;
    const message: TensorsMessage = {
      type: "Tensors", session, phase, step, microBatch, turn, seed, learningRate,
    };
    const content = this.#protocol.send(message, wires);
    task.sent.push({ message, content });
    try {
      this.#put(content);
    } catch (error) {
      await this.#reconnect(asLost(error));
    }
  }

  /**
   * Wait for the next wires of the open task that did not come before.
   *
   * @throws StepsLost, ConnectionLost: as {@link sendWires}.
   * @throws RemoteFault: the server reported an error of its own.
   */
  async receiveWires(): Promise<NdArrays> {
    const task = this.#requireTask();
    for (;;) {
      const { message, tensors } = await this.#again(() => this.#receive("Tensors"));
      takeDue(task, message);
      if (message.turn < task.received) continue;
      task.received += 1;
      // the server is beyond it, and after a share, a repeated step is not enough
      if ([...STEP_PHASES, SHARE].includes(task.key.phase)) this.#last = undefined;
      this.#noteProgress();
      return tensors;
    }
  }

  /**
   * Ask the server to write its state; return the reason where it could not, or nothing.
   *
   * @throws StepsLost, ConnectionLost, RemoteFault: as {@link receiveWires}.
   */
  async save(step: number, { publish }: { publish: boolean }): Promise<string> {
    const session = this.#options.session;
    const { message } = await this.#again(() => {
      this.#send({ type: "Save", session, step, publish, keep: false });
      return this.#receive("Saved", "Unsaved");
    });
    if (message.step !== step) {
      throw new RemoteProtocolError(`it saved step ${message.step}, not ${step}`);
    }
    this.#noteProgress();
    return message.type === "Unsaved" ? message.reason || "no reason given" : "";
  }

  /**
   * End the session with a Bye message.  May be called twice.
   *
   * Where it is not `forGood` only the connection is over, and the server keeps the session.
   */
  close({ forGood }: { forGood: boolean }): void {
    this.#ended.abort();
    try {
      if (this.#transport && forGood) this.#send({ type: "Bye" });
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error; // the other side may be gone already
    }
    this.#hangUp();
  }

  #requireTask(): OpenTask {
    if (!this.#task) throw new LocalProtocolError("no task is open");
    return this.#task;
  }

  /** Do something, and whenever the connection breaks over it, once more on the next. */
  async #again<T>(act: () => Promise<T>): Promise<T> {
    for (;;) {
      try {
        return await act();
      } catch (error) {
        await this.#reconnect(asLost(error));
      }
    }
  }

  /** Come back to the session and send again what the server may not have had. */
  async #reconnect(cause: ConnectionLost): Promise<void> {
    for (;;) {
      if (this.#ended.signal.aborted) throw cause;
      if (cause.code === REPLACED) {
        throw new StaleConnection(this.#generation, this.#generation + 1); // at the least
      }
      this.#options.onReconnect?.(cause);
      this.step = await this.#findServer(cause);
      this.reconnects += 1;
      if (this.step !== this.#options.findResumePoint().step) throw new StepsLost(this.step);
      if (this.#restarts && countBefore(this.#task)) throw new StepRestarted(this.step);
      try {
        await this.#repeat();
        return;
      } catch (error) {
        cause = asLost(error);
      }
    }
  }

  /** Send the last step's messages, where the server wants them, and the open task's. */
  async #repeat(): Promise<void> {
    if (this.#wantsRepeat) {
      const last = this.#findLast();
      if (!last) {
        throw new RemoteProtocolError("it wants messages again that the client does not have");
      }
      this.#sendAll(last);
      for (let turn = 0; turn < last.received; turn++) {
        takeDue(last, (await this.#receive("Tensors")).message);
      }
    }
    if (this.#task) this.#sendAll(this.#task);
  }

  /** Something new came: whatever breaks from now on is another fault than before. */
  #noteProgress(): void {
    this.#delays = undefined;
    this.#lostAt = undefined;
  }

  #sendAll(task: OpenTask): void {
    task.due = 0;
    for (const { message, content } of task.sent) {
      this.#protocol.note(message);
      this.#put(content);
    }
  }

  /** Return the last task of a step, if it was kept and comes right before the next one. */
  #findLast(): OpenTask | undefined {
    const { step } = this.#options.findResumePoint();
    const last = this.#last;
    return last && isLast(last.key, step, countBefore(this.#task)) ? last : undefined;
  }

  /** Greet until somebody answers. */
  async #findServer(cause?: SplitonnxError): Promise<number> {
    const limit = this.#options.giveUpAfter ?? Infinity;
    const begun = (this.#lostAt ??= performance.now() / 1000);
    this.#delays ??= listDelays();
    for (;;) {
      const delay = this.#delays.next().value;
      const left = begun + limit - performance.now() / 1000;
      if (cause && left <= 0) throw cause;
      await this.#sleep(Math.min(delay, left));
      if (this.#ended.signal.aborted) throw cause ?? new ConnectionLost("the server", "closed here");
      try {
        return await this.#greet();
      } catch (error) {
        if (!(error instanceof ConnectionLost || error instanceof ServerBusy)) throw error;
        cause = error;
      }
    }
  }

  /** Wait; closing the channel ends it at once. */
  async #sleep(seconds: number): Promise<void> {
    const { signal } = this.#ended;
    if (!seconds || signal.aborted) return;
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

  /** Connect, greet, and return the step at which both sides continue. */
  async #greet(): Promise<number> {
    for (let attempt = 1; ; attempt++) {
      this.#hangUp();
      this.#transport = await this.#options.dial();
      if (this.#ended.signal.aborted) this.#hangUp();
      this.#protocol = new Protocol(this.#options.manifest);
      this.#generation += 1;
      try {
        const { token } = this.#options;
        if (token !== undefined) this.#send({ type: "Login", token });
        this.#send(this.#makeHello());
        const { message } = await this.#receive("Welcome"); // digest and wires were compared
        this.#checkWelcome(message);
        [this.#wantsRepeat, this.#restarts] = [message.wantsRepeat, message.restarts];
        return message.step;
      } catch (error) {
        const isStale = error instanceof StaleConnection && error.newest >= this.#generation;
        if (!isStale || attempt === GREETINGS) {
          this.#hangUp();
          throw error;
        }
        this.#generation = error.newest; // an earlier run of this client had it
      }
    }
  }

  #makeHello(): MessageOf<"Hello"> {
    const { manifest, session, findResumePoint, canShare } = this.#options;
    return makeHello(manifest, session, findResumePoint(), {
      generation: this.#generation,
      isOpen: !!this.#task?.sent.length,
      canRepeat: !!this.#findLast(),
      canShare,
      microBatch: countBefore(this.#task),
    });
  }

  #checkWelcome(welcome: MessageOf<"Welcome">): void {
    const point = this.#options.findResumePoint();
    const terms = checkWelcome(welcome, { ...this.#options, point });
    const { canAccumulate } = terms; // a server of another version may differ in it
    const known = { ...(this.terms ?? terms), canAccumulate };
    const [now, before] = [terms, known].map((one) => JSON.stringify(one));
    if (now !== before) throw new RemoteProtocolError(`it has other terms, ${now}, not ${before}`);
    this.terms = terms;
  }

  #hangUp(): void {
    this.#past = this.traffic;
    const transport = this.#transport;
    this.#transport = undefined;
    transport?.close();
  }

  #send(message: Message): void {
    this.#put(this.#protocol.send(message));
  }

  #put(content: Uint8Array<ArrayBuffer>): void {
    this.#requireTransport().send(content);
  }

  #requireTransport(): Transport {
    if (!this.#transport) throw new ConnectionLost("the server", "the connection is closed");
    return this.#transport;
  }

  async #receive<T extends MessageType>(
    ...expected: readonly T[]
  ): Promise<{ message: MessageOf<T>; tensors: NdArrays }> {
    const content = await this.#requireTransport().receive();
    const { message, tensors } = this.#protocol.receive(content);
    if (message.type === "Fault") throw translateFault(message, this.#generation);
    if (!expected.some((type) => type === message.type)) {
      throw new RemoteProtocolError(`it sent ${message.type} where ${expected[0]} was due`);
    }
    return { message: message as MessageOf<T>, tensors };
  }
}

/** Return the error if the connection is lost; rethrow any other. */
function asLost(error: unknown): ConnectionLost {
  if (error instanceof ConnectionLost) return error;
  throw error;
}
