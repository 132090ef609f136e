/** Outcomes beside a server that lies, loses its answer or refuses: what is saved, and when a client says good-bye.

tests/runtime/client/test_half_published.py holds the client in Python to the same. */

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import * as client from "../src/index.js";
import { ORT, SESSION_OPTIONS } from "./fixtures.js";
import { DATA, FILES, HANG_UP, Liar, connectTo, gradients, reply, startLiar } from "./liars.js";
import type { Lies } from "./liars.js";
import { openSocket } from "./peers.js";

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

describe("a server that may have published", () => {
  const answers: [string, Lies["saved"], new (...facts: never[]) => Error][] = [
    ["and loses its answer", () => HANG_UP, client.ConnectionLost],
    ["and lies of it", (answer) => ({ ...answer, step: 7 }), client.RemoteProtocolError],
    ["and refuses", (a) => ({ ...a, type: "Unsaved", reason: "no room" }), client.NotSaved],
  ];
  for (const [what, saved, error] of answers) {
    test(`${what} is not told good-bye`, async (t) => {
      const liar = await startLiar(t);
      liar.lies = { saved: saved! };
      const trained = await connectTo(liar, { giveUpAfter: 0 });
      await trained.step(DATA);
      await assert.rejects(trained.save(), error);
      await trained.close();
      await liar.quiet();
      assert.ok(liar.heard.includes("Save"));
      assert.ok(!liar.heard.includes("Bye"));
    });
  }

  test("is not told good-bye by a client that closes meanwhile", async (t) => {
    const liar = await startLiar(t);
    const trained = await connectTo(liar);
    await trained.step(DATA);
    let closed: Promise<void> | undefined;
    liar.lies = {
      saved: (answer) => {
        closed = trained.close();
        return answer;
      },
    };
    await assert.rejects(trained.save(), client.ConnectionLost);
    await closed;
    await liar.quiet();
    assert.deepEqual(liar.heard, ["Hello", "Tensors", "Save"]);
  });

  test("is told good-bye once the client has too", async (t) => {
    const liar = await startLiar(t);
    const trained = await connectTo(liar);
    await trained.step(DATA);
    await trained.save();
    await trained.close();
    await liar.quiet();
    assert.equal(liar.heard.at(-1), "Bye");
  });
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
