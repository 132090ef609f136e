/** Servers that lie, and bundles that are not what they say: clear errors, and nothing is stored. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { readFileSync, readdirSync } from "node:fs";
import { createServer } from "node:http";
import type { Server } from "node:http";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import type { TestContext } from "node:test";

import { WebSocketServer } from "ws";
import type { WebSocket } from "ws";

import { loadBundle } from "../src/bundles.js";
import { translateFault } from "../src/channels/faults.js";
import { connect } from "../src/channels/websockets.js";
import { encodeTensors } from "../src/codecs.js";
import { hashBytes } from "../src/hashes.js";
import * as client from "../src/index.js";
import { decodeManifest } from "../src/manifests.js";
import { decodeMessage, encodeMessage } from "../src/messages.js";
import type { Message, MessageOf, TensorsMessage } from "../src/messages.js";
import { FolderStorage } from "../src/node.js";
import type { NdArrays } from "../src/tensors.js";
import { listWires } from "../src/wire/protocols.js";
import { ORT, SESSION_OPTIONS, VECTORS, makeArray } from "./fixtures.js";
import { openSocket } from "./peers.js";

const TINY = join(VECTORS, "tiny");
const FILES: Record<string, Uint8Array> = Object.fromEntries(
  readdirSync(TINY).map((name) => [name, new Uint8Array(readFileSync(join(TINY, name)))]),
);
/** Flip a bit of the last value. */
function flip(content: Uint8Array): Uint8Array {
  const flipped = content.slice();
  flipped[flipped.length - 2]! ^= 1;
  return flipped;
}

const MANIFEST = decodeManifest(FILES["manifest.json"]!, "manifest.json");
const DATA = {
  x: { dims: [6, 3], data: new Float32Array(18).fill(0.5) },
  labels: { dims: [6, 2], data: new Float32Array(12) },
};

type Answer = { message: Message; tensors?: NdArrays } | string | Uint8Array;
/** In place of a message: the connection ends. */
const HANG_UP = "";
interface Lies {
  welcome?: (hello: MessageOf<"Hello">) => Answer;
  reply?: (asked: TensorsMessage, say: (answer: Answer) => void) => Answer;
  saved?: (answer: MessageOf<"Saved">) => MessageOf<"Saved">;
}

function welcome(hello: MessageOf<"Hello">, changes = {}): Answer {
  const { session, digest, step } = hello;
  const wires = listWires(MANIFEST);
  return {
    message: { type: "Welcome", session, digest, step, wantsRepeat: false, wires, ...changes },
  };
}

function reply(asked: TensorsMessage, changes = {}, tensors = gradients(6, 4)): Answer {
  return { message: { ...asked, turn: 0, ...changes }, tensors };
}

/** The half of an answer. */
const ONE: NdArrays = new Map([["loss", makeArray("F32", [], [1])]]);

function gradients(rows: number, columns: number, value = 0.1): NdArrays {
  const values = Array<number>(rows * columns).fill(value);
  return new Map([
    ["h.grad", makeArray("F32", [rows, columns], values)],
    ["loss", makeArray("F32", [], [1])],
  ]);
}

/** A server that says what it is told to. */
class Liar {
  url = "";
  lies: Lies = {};
  /** The messages' types. */
  heard: string[] = [];
  readonly #server = new WebSocketServer({ port: 0, host: "127.0.0.1" });

  async start(): Promise<void> {
    if (!this.#server.address()) await once(this.#server, "listening");
    this.url = `ws://127.0.0.1:${(this.#server.address() as { port: number }).port}`;
    this.#server.on("connection", (socket) => {
      socket.on("message", (content: Buffer) => this.#answer(socket, new Uint8Array(content)));
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
  shout(answer: Answer): void {
    for (const socket of this.#server.clients) this.#say(socket, answer);
  }

  #answer(socket: WebSocket, content: Uint8Array): void {
    const { message } = decodeMessage(content);
    this.heard.push(message.type);
    if (message.type === "Save") {
      const { session, step } = message;
      const answer = { type: "Saved", session, step } as const;
      this.#say(socket, { message: this.lies.saved?.(answer) ?? answer });
    }
    if (message.type === "Hello") this.#say(socket, (this.lies.welcome ?? welcome)(message));
    if (message.type === "Tensors") {
      const { lies } = this;
      const say = (answer: Answer) => this.#say(socket, answer);
      say(lies.reply ? lies.reply(message, say) : reply(message));
    }
  }

  #say(socket: WebSocket, answer: Answer): void {
    if (answer === HANG_UP) socket.terminate();
    else if (typeof answer === "string" || answer instanceof Uint8Array) socket.send(answer);
    else socket.send(encodeMessage(answer.message, answer.tensors));
  }
}

const LIES: [string, Lies, new (...facts: never[]) => Error][] = [
  ["text", { welcome: () => "hello" }, client.RemoteProtocolError],
  ["bytes that are no message", { welcome: () => Uint8Array.of(1) }, client.RemoteProtocolError],
  [
    "another session",
    { welcome: (hello) => welcome(hello, { session: "0".repeat(32) }) },
    client.RemoteProtocolError,
  ],
  [
    "a step that was never made",
    { welcome: (hello) => welcome(hello, { step: 7 }) },
    client.RemoteProtocolError,
  ],
  [
    "another bundle",
    { welcome: (hello) => welcome(hello, { digest: "00" }) },
    client.BundleMismatch,
  ],
  [
    "wires that are not the bundle's",
    { welcome: (hello) => welcome(hello, { wires: new Map() }) },
    client.BundleMismatch,
  ],
  [
    "what was not asked for",
    { reply: (asked) => ({ message: { type: "Saved", session: asked.session, step: 0 } }) },
    client.RemoteProtocolError,
  ],
  ["an answer out of turn", { reply: (a) => reply(a, { turn: 1 }) }, client.RemoteProtocolError],
  ["an answer of another step", { reply: (a) => reply(a, { step: 5 }) }, client.RemoteProtocolError],
  [
    "an answer without end",
    {
      reply: (asked, say) => {
        for (let number = 0; number < 3; number++) say(reply(asked, {}, ONE));
        return reply(asked, {}, ONE);
      },
    },
    client.RemoteProtocolError,
  ],
  ["no rows", { reply: (a) => reply(a, {}, gradients(0, 4)) }, client.ArrayMismatch],
  [
    "an answer of another session",
    { reply: (a) => reply(a, { session: "f".repeat(32) }) },
    client.RemoteProtocolError,
  ],
  [
    "a wire that the client sends",
    { reply: (a) => reply(a, {}, new Map([["h", makeArray("F32", [1], [1])]])) },
    client.RemoteProtocolError,
  ],
  [
    "a gradient of the wrong shape",
    { reply: (a) => reply(a, {}, gradients(6, 5)) },
    client.ArrayMismatch,
  ],
  [
    "a gradient of another batch's size",
    { reply: (a) => reply(a, {}, gradients(5, 4)) },
    client.ArrayMismatch,
  ],
  [
    "a gradient that is not a number",
    { reply: (a) => reply(a, {}, gradients(6, 4, NaN)) },
    client.NotFinite,
  ],
  ["a message too large", { reply: () => new Uint8Array(1 << 20) }, client.MessageTooLarge],
  [
    "an error of its own",
    { reply: () => ({ message: { type: "Fault", code: "x\n", reason: "\u001b[2J", newest: 0, subject: "", needed: 0, limit: 0 } }) },
    client.RemoteFault,
  ],
];

const FAULT = { type: "Fault", code: "", reason: "", newest: 0, subject: "", needed: 0, limit: 0 } as const;

test("what the server says of a batch, a task or a token is said here in the same words", () => {
  const batch = { ...FAULT, code: "BatchTooLarge", subject: "h", needed: 9, limit: 8 };
  assert.match(translateFault(batch, 1).message, /'h' has 9 rows, over the server's limit of 8/);
  const task = { ...FAULT, code: "TaskTooLarge", needed: 3 << 20, limit: 1 << 20 };
  assert.match(translateFault(task, 1).message, /needs 3 MiB .* over its limit of 1 MiB; use a/);
  const role = { ...FAULT, code: "NotPermitted", subject: "train", reason: "open a session" };
  assert.match(translateFault(role, 1).message, /may not open a session: it lacks the role 'train'/);
});

describe("a server that sends", () => {
  const liar = new Liar();
  before(() => liar.start());
  after(() => liar.end());

  async function train(storage: client.StateStorage): Promise<client.SplitClient> {
    const trained = await client.SplitClient.connect(liar.url, {
      ort: ORT,
      openSocket,
      bundle: FILES,
      storage,
      sessionOptions: SESSION_OPTIONS,
      maxReplyBytes: 100_000,
    });
    try {
      await trained.fit(DATA, { batchSize: 6, checkpointEvery: 1 });
    } finally {
      const initial = await loadBundle(FILES);
      assert.deepEqual(trained.state()["W1"]!.data, initial.state.get("W1")!.data);
      await trained.close();
    }
    return trained;
  }

  for (const [what, lies, error] of LIES) {
    test(`${what} is refused`, async () => {
      liar.lies = lies;
      const storage = new client.MemoryStorage();
      await assert.rejects(train(storage), (thrown: Error) => {
        assert.ok(thrown instanceof error, `${thrown}`);
        assert.match(thrown.message, /^[^\p{C}]{10,500}$/u);
        return true;
      });
      assert.deepEqual(await storage.list(""), []);
    });
  }
});

test("messages that nobody asked for are not piled up", async () => {
  const liar = new Liar();
  await liar.start();
  liar.lies = {
    reply: (asked) => {
      // Each is a reply that came before, and the client would leave it out.
      for (let number = 0; number < 20; number++) liar.shout(reply(asked));
      return reply(asked, { turn: 7 });
    },
  };
  const transport = await connect(liar.url, { openSocket, maxReplyBytes: 1000 });
  const message: TensorsMessage = {
    type: "Tensors", session: "", phase: "train", step: 0, microBatch: 0, turn: 0, seed: 0,
    learningRate: 0,
  };
  transport.send(encodeMessage(message));
  await liar.quiet(); // the client hung up, although nobody has read a message yet
  assert.ok((await transport.receive()).length < 1000);
  await assert.rejects(async () => {
    for (;;) await transport.receive();
  }, client.MessageTooLarge);
  await liar.end();
});

test("nor are messages that hold nothing", async (t) => {
  const liar = await startLiar(t);
  liar.lies = {
    reply: (asked, say) => {
      for (let number = 0; number < 1000; number++) say(new Uint8Array(0));
      return reply(asked);
    },
  };
  const transport = await connect(liar.url, { openSocket });
  const message: TensorsMessage = {
    type: "Tensors", session: "", phase: "train", step: 0, microBatch: 0, turn: 0, seed: 0,
    learningRate: 0,
  };
  transport.send(encodeMessage(message));
  await liar.quiet();
  let read = 0;
  await assert.rejects(async () => {
    for (;;) read += 1 + (await transport.receive()).length;
  }, client.RemoteProtocolError);
  assert.ok(read <= 64, `${read}`);
});

async function startLiar(t: TestContext): Promise<Liar> {
  const liar = new Liar();
  await liar.start();
  t.after(() => liar.end());
  return liar;
}

function connectTo(
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

test("a server that greets and hangs up without end is given up", async (t) => {
  const liar = await startLiar(t);
  liar.lies = { reply: () => HANG_UP };
  const trained = await connectTo(liar, { giveUpAfter: 0.5 });
  await assert.rejects(trained.fit(DATA, { batchSize: 6 }), client.ConnectionLost);
  const greetings = liar.heard.filter((type) => type === "Hello").length;
  assert.ok(greetings > 1 && greetings < 12, `${greetings}`); // the delays grew
  await trained.close();
});

/** Lose all steps, each time when so many were made; then no more. */
function loseAfter(made: number[]): Lies {
  return {
    welcome: (hello) => welcome(hello, { step: hello.start }),
    reply: (asked) => {
      if (asked.step !== made[0]) return reply(asked);
      made.shift();
      return HANG_UP;
    },
  };
}

test("a server that loses the same step again and again is given up", async (t) => {
  const liar = await startLiar(t);
  const losses = Array<number>(2 * MOST_RETURNS).fill(1);
  liar.lies = loseAfter(losses);
  const trained = await connectTo(liar);
  await assert.rejects(trained.fit(DATA, { batchSize: 6, epochs: 3 }), (error: Error) => {
    assert.ok(error instanceof client.StepsLost, `${error}`);
    assert.match(error.message, /lost its newest steps, and both sides went back to step 0/);
    return true;
  });
  assert.equal(losses.length, MOST_RETURNS - 1); // the first one was of a step that was new
  assert.equal(trained.steps, 0);
  await trained.close();
});

test("a server that loses each step often is trained with as long as new ones come", async (t) => {
  const liar = await startLiar(t);
  const losses = [1, 2].flatMap((made) => Array<number>(MOST_RETURNS).fill(made));
  liar.lies = loseAfter(losses);
  const trained = await connectTo(liar);
  const history = await trained.fit(DATA, { batchSize: 6, epochs: 3 });
  assert.deepEqual(history.steps.map(({ step }) => step), [1, 2, 3]);
  assert.deepEqual(losses, []);
  await trained.close();
});

test("a gradient has its activation's shape, on a new connection too", async (t) => {
  const liar = await startLiar(t);
  let asked = 0;
  const wires = new Map(listWires(MANIFEST));
  const free = wires.get("train")!.map((wire) => {
    const shape = wire.tensor.name.startsWith("h") ? ["N", "T"] : wire.tensor.shape;
    return { ...wire, tensor: { ...wire.tensor, shape } }; // the data do not tell T
  });
  wires.set("train", free);
  const manifest = JSON.parse(new TextDecoder().decode(FILES["manifest.json"])) as {
    phases: { name: string; wires: unknown }[];
  };
  manifest.phases.find(({ name }) => name === "train")!.wires = free;
  const bundle = { ...FILES, "manifest.json": new TextEncoder().encode(JSON.stringify(manifest)) };
  liar.lies = {
    welcome: (hello) => welcome(hello, { wires }),
    reply: (a) => (asked++ ? reply(a, {}, gradients(6, 5)) : HANG_UP),
  };
  const trained = await connectTo(liar, { bundle });
  await assert.rejects(trained.fit(DATA, { batchSize: 6 }), client.ArrayMismatch);
  assert.equal(trained.reconnects, 1);
  await trained.close();
});

test("a batch of no rows is refused before anything is run or sent", async (t) => {
  const liar = await startLiar(t);
  const trained = await connectTo(liar);
  const none = {
    x: { dims: [0, 3], data: new Float32Array(0) },
    labels: { dims: [0, 2], data: new Float32Array(0) },
  };
  await assert.rejects(trained.step(none), client.ArrayMismatch);
  await assert.rejects(trained.fit([none]), client.ArrayMismatch);
  await assert.rejects(trained.predict([{ x: none.x }]), client.ArrayMismatch);
  await trained.close();
  await liar.quiet();
  assert.deepEqual(liar.heard, ["Hello", "Bye"]);
});

test("a second client does not train with a storage that is trained with, but takes it over", async (t) => {
  const liar = await startLiar(t);
  const folder = await mkdtemp(join(tmpdir(), "splitonnx-lock-"));
  t.after(() => rm(folder, { recursive: true }));
  const open = (options = {}) => {
    return connectTo(liar, { storage: new FolderStorage(folder), giveUpAfter: 0, ...options });
  };
  const plan = { batchSize: 6, checkpointEvery: 1 };
  const [first, second] = [await open(), await open()];
  await first.fit(DATA, plan);
  await assert.rejects(second.fit(DATA, { ...plan, restart: true }), client.StorageInUse);
  await assert.rejects(second.fit(DATA, { batchSize: 6, save: true }), client.StorageInUse);
  await second.step({ x: DATA.x, labels: DATA.labels }); // what keeps nothing is let be
  await assert.rejects(second.save(), client.StorageInUse);
  await second.close();
  assert.deepEqual(first.checkpoints, [1]);

  const third = await open({ resume: true });
  assert.equal(third.session, first.session);
  await assert.rejects(first.fit(DATA, plan), client.StorageInUse);
  await first.close();
  await third.fit(DATA, { ...plan, epochs: 2, save: true });
  const fourth = await open(); // the run is over, though the third is not closed
  assert.equal(fourth.steps, third.steps);
  await fourth.fit(DATA, plan);
  await Promise.all([third.close(), fourth.close()]);
});

test("infinite weights are nobody's outcome", async (t) => {
  const liar = await startLiar(t);
  const storage = new client.MemoryStorage();
  const trained = await connectTo(liar, { storage });
  const x = { dims: [1, 3], data: new Float32Array(3).fill(1e3) };
  const labels = { dims: [1, 2], data: new Float32Array(2) };
  liar.lies = { reply: (asked) => reply(asked, {}, gradients(1, 4, 100)) };
  await trained.step({ x, labels }, { learningRate: 3e38 });
  assert.ok(!Object.values(trained.state()).every(({ data }) => [...data].every(Number.isFinite)));
  await assert.rejects(trained.save(), client.NotSaved);
  await trained.close();
  assert.ok(!liar.heard.includes("Save")); // the server's outcome stays what it was as well
  assert.deepEqual(await storage.list(""), []);
});

describe("a server that lies in the middle of a training", () => {
  const liar = new Liar();
  before(() => liar.start());
  after(() => liar.end());

  for (const [when, lies, heard] of [
    ["in a step", { reply: (a) => reply(a, a.step === 2 ? { turn: 7 } : {}) }, false],
    ["of what it saved", { saved: (a) => ({ ...a, step: a.step === 2 ? 7 : a.step }) }, false],
    ["before there is a checkpoint", { reply: (a) => reply(a, { turn: 7 }) }, true],
  ] as [string, Lies, boolean][]) {
    test(`${when} is told good-bye: ${heard}`, async () => {
      liar.lies = lies;
      liar.heard = [];
      const storage = new client.MemoryStorage();
      const trained = await client.SplitClient.connect(liar.url, {
        ort: ORT,
        openSocket,
        bundle: FILES,
        storage,
        sessionOptions: SESSION_OPTIONS,
      });
      const plan = { batchSize: 6, epochs: 3, checkpointEvery: 1 };
      const error = await trained.fit(DATA, plan).catch((thrown: unknown) => thrown);
      await trained.close();
      assert.ok(error instanceof client.RemoteProtocolError, `${error}`);
      await liar.quiet();
      assert.equal(liar.heard.includes("Bye"), heard);
      assert.equal((await storage.list("")).length > 0, !heard);
    });
  }
});

describe("a bundle", () => {
  const text = new TextDecoder().decode(FILES["manifest.json"]);
  const change = (before: string, after: string) => {
    assert.ok(text.includes(before));
    const changed = text.replace(before, after).replace('"sha256": ', '"no sum": ');
    return { ...FILES, "manifest.json": new TextEncoder().encode(changed) };
  };
  const without = (name: string) =>
    Object.fromEntries(Object.entries(FILES).filter(([file]) => file !== name));
  const { BundleError, FormatError } = client;
  const state = (name: string) =>
    JSON.stringify({ tensor: { name, dtype: "F32", shape: [3, 4] }, role: "optimizer" });
  const zeros = `"state": [${Array.from({ length: 4 }, (_, number) => `${state(`m${number}`)},`).join("")}`;

  const old = change(MANIFEST.weights, "");
  const rate = text.replace('"learning_rate": 0.', '"learning_rate": 1.');
  const altered = { ...FILES, "manifest.json": new TextEncoder().encode(rate) };

  const broken: [string, Record<string, Uint8Array>, new (...facts: never[]) => Error][] = [
    ["without a graph", without("head.forward.onnx"), BundleError],
    ["without weights", without("weights.safetensors"), BundleError],
    ["with an altered graph", { ...FILES, "head.forward.onnx": Uint8Array.of(8) }, BundleError],
    ["whose manifest was altered", altered, BundleError],
    ["that names a file elsewhere", change('"head.forward.onnx": "', '"../x": "'), BundleError],
    ["of the server", change('"party": "client"', '"party": "server"'), BundleError],
    ["for the training wheel", change('"target": "portable"', '"target": "training"'), BundleError],
    ["whose digest is a path", change('"digest": "d1', '"digest": "..'), FormatError],
    ["of a later format", change("bundle/1", "bundle/2"), FormatError],
    ["with a state twice", change('"state": [', `"state": [${state("W1")},`), FormatError],
    ["with more zeros than an optimizer has", change('"state": [', zeros), FormatError],
    ["with other weights", { ...old, "weights.safetensors": encodeTensors(new Map()) }, BundleError],
    [
      "with weights in which a bit flipped",
      { ...FILES, "weights.safetensors": flip(FILES["weights.safetensors"]!) },
      BundleError,
    ],
    ["with broken weights", { ...old, "weights.safetensors": Uint8Array.of(1) }, FormatError],
  ];
  for (const [what, files, error] of broken) {
    test(`${what} is refused`, async () => {
      await assert.rejects(loadBundle(files), error);
    });
  }

  test("of before there were checksums of weights is taken, with whatever weights", async () => {
    await loadBundle({ ...old, "weights.safetensors": flip(FILES["weights.safetensors"]!) });
  });

  test("with a graph that the gate knows not is refused before ONNX Runtime sees it", async () => {
    const evil = new TextEncoder().encode("\b\n:\u0004evil");
    const name = "head.forward.onnx";
    const old = MANIFEST.files.get(name)!;
    const files = { ...change(old, await hashBytes(evil)), [name]: evil };
    const seen: unknown[] = [];
    const InferenceSession = { create: (...given: unknown[]) => seen.push(given) };
    const liar = new Liar();
    await liar.start();
    const trained = await client.SplitClient.connect(liar.url, {
      ort: { ...ORT, InferenceSession } as never,
      openSocket,
      bundle: files,
      storage: new client.MemoryStorage(),
    });
    await assert.rejects(trained.fit(DATA, { batchSize: 6 }), client.ForbiddenGraph);
    await trained.close();
    await liar.end();
    assert.deepEqual(seen, []);
  });
});

describe("an address that gives", () => {
  let server: Server;
  let url: string;
  const asked: (string | undefined)[] = [];

  before(async () => {
    server = createServer((request, response) => {
      const [, folder = "", name = ""] = /^\/(.*)\/([^/]*)$/.exec(request.url!) ?? [];
      asked.push(request.headers.authorization);
      if (folder === "locked") response.writeHead(401).end();
      else if (folder === "moved") {
        response.writeHead(302, { Location: `/whole/${name}` }).end();
      } else if (folder === "endless" && name === "weights.safetensors") {
        response.on("error", () => {});
        const pour = () => void (response.writable && response.write(Buffer.alloc(1 << 20), pour));
        pour();
      } else if (folder === "trickling") {
        const drip = setInterval(() => response.write("{"), 10);
        response.on("close", () => clearInterval(drip));
      } else if (folder === "silent") {
        return; // the request is taken, and nothing is said
      } else if (name in FILES && folder !== "empty") response.end(FILES[name]);
      else response.writeHead(404).end();
    });
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    url = `http://127.0.0.1:${(server.address() as { port: number }).port}`;
  });

  after(() => {
    server.closeAllConnections();
    server.close();
  });

  test("the files is read, and shown the token", async () => {
    const { manifest, graphs } = await loadBundle(`${url}/whole`, { token: "secret" });
    assert.equal(manifest.digest, MANIFEST.digest);
    assert.equal(graphs.size, MANIFEST.files.size);
    assert.ok(asked.every((token) => token === "Bearer secret"));
  });

  test("weights without end is left off", async () => {
    await assert.rejects(loadBundle(`${url}/endless/`), /more bytes than the limit/);
  });

  for (const how of ["trickling", "silent"]) {
    test(`a ${how} file is given up`, async () => {
      await assert.rejects(loadBundle(`${url}/${how}`, { blockSeconds: 0.2 }), (error: Error) => {
        assert.ok(error instanceof client.ConnectionLost, `${error}`);
        assert.match(error.message, /gives less than a MiB within 0.2 s/);
        return true;
      });
    });
  }

  test("another address is not followed there", async () => {
    asked.length = 0;
    await assert.rejects(loadBundle(`${url}/moved`, { token: "secret" }), client.ConnectionLost);
    assert.equal(asked.length, 1);
  });

  test("nothing is named", async () => {
    await assert.rejects(loadBundle(`${url}/empty`), client.BundleError);
    await assert.rejects(loadBundle(`${url}/locked`), client.Unauthorized);
    await assert.rejects(loadBundle("http://127.0.0.1:9/x"), client.ConnectionLost);
  });
});
