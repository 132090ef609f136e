/**
 * Messages over a websocket: the browser's, Node's, or one of the same make.
 *
 * Browsers say little about why a connection fails; what there is, is translated here.
 */

import {
  ConnectionLost,
  MessageTooLarge,
  RemoteProtocolError,
  Unauthorized,
  UsageError,
} from "../errors.js";
import { NORMAL, POLICY, TOO_BIG } from "../wire/close_codes.js";
import type { Transport } from "../wire/transports.js";

/** Seconds to connect. */
export const OPEN_SECONDS = 10;
/** Seconds that a client waits for a reply, the server's computing included. */
export const REPLY_SECONDS = 600;
/** Bytes of messages that wait to be read, over which a client ends the connection. */
export const MAX_REPLY = 1 << 28;
/** Messages that wait to be read, over which a client ends the connection. */
export const MAX_WAITING = 64;

/** As much of a WebSocket as is used here. */
export interface WebSocketLike {
  binaryType: string;
  send(content: Uint8Array<ArrayBuffer>): void;
  close(code?: number, reason?: string): void;
  addEventListener(type: "open", listener: () => void): void;
  addEventListener(type: "error", listener: (event: object) => void): void;
  addEventListener(type: "message", listener: (event: { data: unknown }) => void): void;
  addEventListener(
    type: "close",
    listener: (event: { code: number; reason: string }) => void,
  ): void;
}

/** How to connect. */
export interface SocketOptions {
  /** Makes the websocket; `new WebSocket(url)` by default. */
  readonly openSocket?: ((url: string) => WebSocketLike) | undefined;
  /** Seconds to wait for a reply. */
  readonly replySeconds?: number | undefined;
  /** Bytes of a message from the server at the most. */
  readonly maxReplyBytes?: number | undefined;
}

/**
 * Connect to a server, such as `ws://127.0.0.1:8765`.
 *
 * @throws ConnectionLost: nobody answers there: try again.
 * @throws UsageError: `url` is not a websocket address, or the platform has no WebSocket.
 */
export async function connect(url: string, options: SocketOptions = {}): Promise<Transport> {
  const transport = new WebSocketTransport(url, makeSocket(url, options.openSocket), options);
  await transport.opened;
  return transport;
}

function makeSocket(url: string, open: SocketOptions["openSocket"]): WebSocketLike {
  const parts = URL.canParse(url) ? new URL(url) : undefined;
  if (!parts || !["ws:", "wss:"].includes(parts.protocol)) {
    throw new UsageError(`'${url}' is not a websocket address such as ws://host:8765`);
  }
  if (parts.username || parts.password) {
    throw new UsageError("leave names and passwords out of the server's address; use a token");
  }
  if (open) return open(url);
  if (typeof WebSocket === "undefined") {
    throw new UsageError("this platform has no WebSocket; pass connect one as openSocket");
  }
  return new WebSocket(url) as WebSocketLike;
}

interface Waiter {
  readonly resolve: (content: Uint8Array) => void;
  readonly reject: (error: Error) => void;
}

class WebSocketTransport implements Transport {
  bytesSent = 0;
  bytesReceived = 0;
  readonly opened: Promise<void>;
  readonly #url: string;
  readonly #socket: WebSocketLike;
  readonly #replySeconds: number;
  readonly #maxReply: number;
  #waiting: Uint8Array[] = [];
  #waiter: Waiter | undefined;
  #ended: Error | undefined;
  #said = ""; // the reason in an error event, if it has one

  constructor(url: string, socket: WebSocketLike, options: SocketOptions) {
    this.#url = url;
    this.#socket = socket;
    this.#replySeconds = options.replySeconds ?? REPLY_SECONDS;
    this.#maxReply = options.maxReplyBytes ?? MAX_REPLY;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("message", (event) => this.#take(event.data));
    socket.addEventListener("close", (event) => this.#end(this.#explain(event)));
    socket.addEventListener("error", (event) => {
      if ("message" in event) this.#said = String(event.message);
    });
    this.opened = this.#open();
  }

  send(content: Uint8Array<ArrayBuffer>): void {
    if (this.#ended) throw this.#ended;
    this.#socket.send(content);
    this.bytesSent += content.length;
  }

  async receive(): Promise<Uint8Array> {
    const next = this.#waiting.shift() ?? (await this.#wait());
    this.bytesReceived += next.length;
    return next;
  }

  close(): void {
    this.#end(new ConnectionLost(this.#url, "it was closed here"));
    this.#socket.close(NORMAL);
  }

  async #open(): Promise<void> {
    await this.#limit<void>(OPEN_SECONDS, (resolve, reject) => {
      this.#waiter = { resolve: () => {}, reject };
      this.#socket.addEventListener("open", () => {
        this.#waiter = undefined; // a message may follow at once
        resolve();
      });
    });
  }

  async #wait(): Promise<Uint8Array> {
    if (this.#ended) throw this.#ended;
    return this.#limit(this.#replySeconds, (resolve, reject) => {
      this.#waiter = { resolve, reject };
    });
  }

  /** Wait for something, but not longer than so many seconds. */
  async #limit<T>(
    seconds: number,
    begin: (resolve: (value: T) => void, reject: (error: Error) => void) => void,
  ): Promise<T> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    try {
      return await new Promise<T>((resolve, reject) => {
        timer = setTimeout(() => {
          const late = new ConnectionLost(this.#url, `no answer within ${seconds} s`);
          this.#end(late);
          this.#socket.close();
        }, seconds * 1000);
        begin(resolve, reject);
        if (this.#ended) reject(this.#ended);
      });
    } finally {
      clearTimeout(timer);
    }
  }

  #take(data: unknown): void {
    if (this.#ended) return;
    if (!(data instanceof ArrayBuffer)) {
      this.#refuse(new RemoteProtocolError("it sent text"), POLICY);
      return;
    }
    const held = this.#waiting.reduce((sum, content) => sum + content.length, data.byteLength);
    if (held > this.#maxReply) {
      const reason = `${held} bytes, over the limit of ${this.#maxReply}`;
      this.#refuse(new MessageTooLarge(this.#url, false, reason), TOO_BIG);
      return;
    }
    if (this.#waiting.length >= MAX_WAITING) {
      this.#refuse(new RemoteProtocolError(`it sent ${MAX_WAITING} messages too many`), POLICY);
      return;
    }
    const waiter = this.#waiter;
    this.#waiter = undefined;
    if (waiter) waiter.resolve(new Uint8Array(data));
    else this.#waiting.push(new Uint8Array(data));
  }

  #refuse(error: Error, code: number): void {
    this.#end(error);
    // Browsers allow a page only closing codes from 3000 on.
    this.#socket.close(3000 + code, error.message.slice(0, 80));
  }

  #end(error: Error): void {
    this.#ended ??= error;
    this.#waiter?.reject(this.#ended);
    this.#waiter = undefined;
  }

  #explain({ code, reason }: { code: number; reason: string }): Error {
    if (code === POLICY) {
      return new Unauthorized(this.#url, code, reason || "no reason given");
    }
    if (code === TOO_BIG) return new MessageTooLarge(this.#url, true, reason);
    const told = reason || this.#said || "it closed, or there is none that lets this page in";
    return new ConnectionLost(this.#url, `${told} (${code})`, code);
  }
}
