/** A server as one of an earlier version, which knows nothing of several tasks in flight. */

import { once } from "node:events";

import { WebSocket, WebSocketServer } from "ws";

import { decodeTensors, encodeTensors } from "../src/codecs.js";
import { MAX_HEADER } from "../src/messages.js";

/** Stands before a server, and takes what is new out of greetings. */
export class EarlierServer {
  readonly #target: string;
  readonly #server = new WebSocketServer({ port: 0, host: "127.0.0.1" });

  constructor(target: string) {
    this.#target = target;
    this.#server.on("connection", (near) => {
      const far = new WebSocket(this.#target, { perMessageDeflate: false });
      const opened = once(far, "open");
      near.on("message", (content: Buffer) => void opened.then(() => far.send(strip(content))));
      far.on("message", (content: Buffer) => near.send(strip(content)));
      near.on("close", () => far.terminate());
      far.on("close", () => near.terminate());
    });
  }

  /** Return where it serves. */
  async start(): Promise<string> {
    if (!this.#server.address()) await once(this.#server, "listening");
    return `ws://127.0.0.1:${(this.#server.address() as { port: number }).port}`;
  }

  async end(): Promise<void> {
    for (const socket of this.#server.clients) socket.terminate();
    this.#server.close();
    await once(this.#server, "close");
  }
}

function strip(content: Buffer): Uint8Array {
  const { tensors, metadata } = decodeTensors(new Uint8Array(content), MAX_HEADER);
  const { in_flight: _, ...fields } = JSON.parse(metadata.get("splitonnx")!) as Record<string, unknown>;
  return encodeTensors(tensors, { splitonnx: JSON.stringify(fields) });
}
