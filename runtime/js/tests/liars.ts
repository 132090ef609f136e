/** A server that says what it is told to, and the client's part that it is told to. */

import { once } from "node:events";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import type { TestContext } from "node:test";

import { WebSocketServer } from "ws";
import type { WebSocket } from "ws";

import * as client from "../src/index.js";
import { decodeManifest } from "../src/manifests.js";
import { decodeMessage, encodeMessage } from "../src/messages.js";
import type { Message, MessageOf, TensorsMessage } from "../src/messages.js";
import type { NdArrays } from "../src/tensors.js";
import { listWires } from "../src/wire/protocols.js";
import { ORT, SESSION_OPTIONS, VECTORS, makeArray } from "./fixtures.js";
import { openSocket } from "./peers.js";

const TINY = join(VECTORS, "tiny");
/** The client's part, by file. */
export const FILES: Record<string, Uint8Array> = Object.fromEntries(
  readdirSync(TINY).map((name) => [name, new Uint8Array(readFileSync(join(TINY, name)))]),
);
export const MANIFEST = decodeManifest(FILES["manifest.json"]!, "manifest.json");
export const DATA = {
  x: { dims: [6, 3], data: new Float32Array(18).fill(0.5) },
  labels: { dims: [6, 2], data: new Float32Array(12) },
};

/** What the server sends, whatever it was asked: a message, or text or bytes that are none. */
export type CannedResponse = { message: Message; tensors?: NdArrays } | string | Uint8Array;
/** In place of a message: the connection ends. */
export const HANG_UP = "";
export interface Lies {
  welcome?: (hello: MessageOf<"Hello">) => CannedResponse;
  reply?: (asked: TensorsMessage, say: (response: CannedResponse) => void) => CannedResponse;
  saved?: (saved: MessageOf<"Saved">) => MessageOf<"Saved" | "Unsaved"> | typeof HANG_UP;
}

export function welcome(hello: MessageOf<"Hello">, changes = {}): CannedResponse {
  const { session, digest, step } = hello;
  const wires = listWires(MANIFEST);
  const terms = {
    policy: "per-client", localSteps: 0, rounds: 0, canAccumulate: true, restarts: false, inFlight: 1,
  };
  return {
    message: { type: "Welcome", session, digest, step, wantsRepeat: false, ...terms, wires, ...changes },
  };
}

export function reply(asked: TensorsMessage, changes = {}, tensors = gradients(6, 4)): CannedResponse {
  return { message: { ...asked, turn: 0, ...changes }, tensors };
}

/** Half of a response: the gradient is missing. */
export const ONE: NdArrays = new Map([["loss", makeArray("F32", [], [1])]]);

export function gradients(rows: number, columns: number, value = 0.1): NdArrays {
  const values = Array<number>(rows * columns).fill(value);
  return new Map([
    ["h.grad", makeArray("F32", [rows, columns], values)],
    ["loss", makeArray("F32", [], [1])],
  ]);
}

/** A server that says what it is told to. */
export class Liar {
  url = "";
  lies: Lies = {};
  /** The messages' types. */
  heard: string[] = [];
  readonly #server = new WebSocketServer({ port: 0, host: "127.0.0.1" });

  async start(): Promise<void> {
    if (!this.#server.address()) await once(this.#server, "listening");
    this.url = `ws://127.0.0.1:${(this.#server.address() as { port: number }).port}`;
    this.#server.on("connection", (socket) => {
      socket.on("message", (content: Buffer) => this.#respond(socket, new Uint8Array(content)));
    });
  }

  async end(): Promise<void> {
    for (const socket of this.#server.clients) socket.terminate();
    this.#server.close();
    await once(this.#server, "close");
  }

  /** Wait until every connection has ended, and all that came over it is heard. */
  async quiet(): Promise<void> {
    await Promise.all([...this.#server.clients].map((socket) => once(socket, "close")));
  }

  /** Say something to everybody. */
  shout(response: CannedResponse): void {
    for (const socket of this.#server.clients) this.#say(socket, response);
  }

  #respond(socket: WebSocket, content: Uint8Array): void {
    const { message } = decodeMessage(content);
    this.heard.push(message.type);
    if (message.type === "Save") {
      const { session, step } = message;
      const saved = { type: "Saved", session, step, keep: false } as const;
      const said = this.lies.saved?.(saved) ?? saved;
      this.#say(socket, said === HANG_UP ? HANG_UP : { message: said });
    }
    if (message.type === "Hello") this.#say(socket, (this.lies.welcome ?? welcome)(message));
    if (message.type === "Tensors") {
      const { lies } = this;
      const say = (response: CannedResponse) => this.#say(socket, response);
      say(lies.reply ? lies.reply(message, say) : reply(message));
    }
  }

  #say(socket: WebSocket, response: CannedResponse): void {
    if (response === HANG_UP) socket.terminate();
    else if (typeof response === "string" || response instanceof Uint8Array) socket.send(response);
    else socket.send(encodeMessage(response.message, response.tensors));
  }
}

export async function startLiar(t: TestContext): Promise<Liar> {
  const liar = new Liar();
  await liar.start();
  t.after(() => liar.end());
  return liar;
}

export function connectTo(
  { url }: Liar,
  options: Partial<client.ConnectOptions> = {},
): Promise<client.SplitClient> {
  return client.SplitClient.connect(url, {
    ort: ORT,
    openSocket,
    bundle: FILES,
    storage: new client.MemoryStorage(),
    sessionOptions: SESSION_OPTIONS,
    ...options,
  });
}
