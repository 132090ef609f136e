/** Servers that lie: clear errors, and nothing is stored. */

import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { translateFault } from "../src/channels/faults.js";
import { connect } from "../src/channels/websockets.js";
import { MOST_RETURNS } from "../src/client/training_loops.js";
import * as client from "../src/index.js";
import { encodeMessage } from "../src/messages.js";
import type { TensorsMessage } from "../src/messages.js";
import { FolderStorage } from "../src/node.js";
import { listWires } from "../src/wire/protocols.js";
import { ORT, SESSION_OPTIONS, makeArray } from "./fixtures.js";
import {
  DATA,
  FILES,
  HANG_UP,
  Liar,
  MANIFEST,
  ONE,
  connectTo,
  gradients,
  reply,
  startLiar,
  welcome,
} from "./liars.js";
import type { Lies } from "./liars.js";
import { openSocket } from "./peers.js";

const LIES: [string, Lies, new (...facts: never[]) => Error][] = [
  ["text", { welcome: () => "hello" }, client.RemoteProtocolError],
  ["bytes that are not a message", { welcome: () => Uint8Array.of(1) }, client.RemoteProtocolError],
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
    {
      reply: ({ session }) => ({ message: { type: "Saved", session, step: 0, keep: false } }),
    },
    client.RemoteProtocolError,
  ],
  ["an answer without tensors", { reply: (a) => reply(a, {}, new Map()) }, client.RemoteProtocolError],
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

test("a server that greets and hangs up without end is given up", async (t) => {
  const liar = await startLiar(t);
  liar.lies = { reply: () => HANG_UP };
  const trained = await connectTo(liar, { giveUpAfter: 0.5 });
  await assert.rejects(trained.fit(DATA, { batchSize: 6 }), client.ConnectionLost);
  const greetings = liar.heard.filter((type) => type === "Hello").length;
  assert.ok(greetings > 1 && greetings < 12, `${greetings}`); // the delays grew
  await trained.close();
});

test("a time to give up after that is none is refused before anybody is asked", async (t) => {
  const liar = await startLiar(t);
  for (const giveUpAfter of [-1, NaN]) {
    await assert.rejects(connectTo(liar, { giveUpAfter }), (error: Error) => {
      assert.ok(error instanceof client.UsageError, `${error}`);
      assert.match(error.message, new RegExp(`0 seconds or more, not ${giveUpAfter}`));
      return true;
    });
  }
  assert.deepEqual(liar.heard, []);
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

test("a client that gives up lets others train with its storage before it closes", async (t) => {
  const liar = await startLiar(t);
  liar.lies = loseAfter(Array<number>(2 * MOST_RETURNS).fill(1));
  const folder = await mkdtemp(join(tmpdir(), "splitonnx-"));
  t.after(() => rm(folder, { recursive: true }));
  const run = { batchSize: 6, epochs: 3, checkpointEvery: 100 };
  const trained = await connectTo(liar, { storage: new FolderStorage(folder) });
  await assert.rejects(trained.fit(DATA, run), client.StepsLost);
  liar.lies = {};
  const other = await connectTo(liar, { storage: new FolderStorage(folder) });
  assert.equal((await other.fit(DATA, { ...run, restart: true })).steps.length, 3);
  await other.close();
  await trained.close();
});

test("a resumed training makes steps again from before it was resumed", async (t) => {
  const liar = await startLiar(t);
  const folder = await mkdtemp(join(tmpdir(), "splitonnx-"));
  t.after(() => rm(folder, { recursive: true }));
  const run = { batchSize: 6, epochs: 4, checkpointEvery: 1 };
  const stop = new AbortController();
  const first = await connectTo(liar, { storage: new FolderStorage(folder) });
  const begun = await first.fit(DATA, {
    ...run,
    signal: stop.signal,
    onStep: ({ step }) => {
      if (step === 2) stop.abort();
    },
  });
  assert.equal(begun.steps.length, 2);
  await first.close();
  const lost = [3];
  let isLost = false;
  liar.lies = {
    welcome: (hello) => welcome(hello, isLost ? { step: Math.min(...hello.kept) } : {}),
    reply: (asked) => {
      if (asked.step + 1 !== lost[0]) return reply(asked);
      lost.shift();
      isLost = true;
      return HANG_UP;
    },
  };
  const again = await connectTo(liar, { storage: new FolderStorage(folder), resume: true });
  const { steps } = await again.fit(DATA, run);
  assert.deepEqual(
    steps.map(({ step }) => step),
    [2, 3, 4],
  );
  await again.close();
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
