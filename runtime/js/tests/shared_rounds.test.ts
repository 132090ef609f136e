/** When a client shares and keeps checkpoints: with real servers, and one that hangs up. */

import assert from "node:assert/strict";
import { after, describe, test } from "node:test";

import { ConnectionLost, MemoryStorage, SharingNotPermitted } from "../src/index.js";
import type { Outputs, StepRecord } from "../src/index.js";
import { relate } from "./fixtures.js";
import { DATA, HANG_UP, connectTo, startLiar, welcome } from "./liars.js";
import { ServerProcess, closeForks } from "./peers.js";
import { JOINED, OURS, PLAN, PLAN_STEPS, connect, serve, train } from "./sharers.js";

after(closeForks);

describe("a client alone", () => {
  test("shares nothing unless it is permitted, and is told how", async (t) => {
    const server = await serve(t);
    await assert.rejects(connect(server.url, { share: false }), (error: Error) => {
      assert.ok(error instanceof SharingNotPermitted, `${error}`);
      assert.match(error.message, /policy 'splitfed-v1' joins what .* permit it with share: true/);
      return true;
    });
    const client = await connect(server.url);
    const terms = { policy: "splitfed-v1", localSteps: 2, rounds: 0, joins: true, canAccumulate: true };
    assert.deepEqual(client.terms, terms);
    await client.close();
  });

  test("shares nothing with a server that joins nothing, though it is permitted", async (t) => {
    const server = await ServerProcess.start("dropout");
    t.after(() => server.remove());
    const phases = new Set<string>();
    const onWires = (_: string, phase: string) => void phases.add(phase);
    const { client } = await train(server.url, {}, { onWires });
    const terms = { policy: "per-client", localSteps: 0, rounds: 0 };
    assert.deepEqual(client.terms, { ...terms, joins: false, canAccumulate: true });
    assert.deepEqual([...phases], ["train"]);
  });

  test("ends when the rounds are complete", async (t) => {
    const server = await serve(t, "--rounds", "3");
    const { steps } = await train(server.url, { epochs: 9 });
    assert.equal(steps.length, 6); // two steps a round
  });

  test("trains no further after the last round, also when the page is loaded again", async (t) => {
    const server = await serve(t, "--rounds", "2");
    const storage = new MemoryStorage();
    const fit = { epochs: 3, checkpointEvery: 100 };
    const { steps, state } = await train(server.url, fit, { storage });
    const again = await train(server.url, { ...fit, save: true }, { storage, resume: true });
    assert.deepEqual([steps.length, again.steps.length], [4, 0]);
    assert.deepEqual(again.state, state);
  });

  test("that comes when the rounds are over receives the model", async (t) => {
    const server = await serve(t, "--rounds", "1");
    const { state } = await train(server.url);
    const late = await train(server.url);
    assert.equal(late.steps.length, 0);
    for (const name of JOINED) assert.deepEqual(late.state[name], state[name]);
  });

  test("asks for the model of the others where it continues a run that was saved", async (t) => {
    const server = await serve(t);
    const storage = new MemoryStorage();
    const { state } = await train(server.url, { save: true }, { storage });
    const other = await train(server.url, { epochs: 2 });
    const received: Outputs[] = [];
    const onWires = (direction: string, _: string, wires: Outputs) => {
      if (direction === "received") received.push(wires);
    };
    const options = { storage, resume: true, onWires };
    const { steps } = await train(server.url, { epochs: 2 }, options);
    assert.equal(steps.length, PLAN_STEPS); // those of the second epoch
    for (const name of JOINED) {
      assert.deepEqual(received[0]![`${name}@joined`], other.state[name]);
    }
    assert.ok(JOINED.some((name) => relate(state[name]!.data, other.state[name]!.data) > 1e-3));
  });

  test("does not wait for others where it is told to stop before it begins", async (t) => {
    const server = await serve(t, "--clients-min", "2");
    const { steps } = await train(server.url, { signal: AbortSignal.abort() });
    assert.equal(steps.length, 0);
  });

  test("keeps a checkpoint before it first shares, at the end of each round, and where it left", async (t) => {
    const server = await serve(t);
    const stop = new AbortController();
    const kept: (readonly number[])[] = [];
    const client = await connect(server.url);
    const { signal } = stop;
    const onStep = ({ step }: StepRecord) => {
      kept.push(client.checkpoints);
      if (step === 5) stop.abort();
    };
    await client.fit(OURS, { ...PLAN, epochs: 2, checkpointEvery: 100, signal, onStep });
    assert.deepEqual(kept, [[0], [0], [2, 0], [2, 0], [4, 2]]);
    assert.deepEqual(client.checkpoints, [5, 4]);
    await client.close();
  });
});

describe("a client that keeps checkpoints", () => {
  test("keeps none of a step before it leaves there, and one after", async (t) => {
    const server = await serve(t);
    const kept: (readonly number[])[] = [];
    const onWires = (direction: string, phase: string) => {
      if (phase === "share" && direction === "sent") kept.push(client.checkpoints);
    };
    const client = await connect(server.url, { onWires });
    await client.fit(OURS, { ...PLAN, checkpointEvery: 1 });
    assert.deepEqual(kept, [[0], [1, 0], [3, 2], [4, 3]]);
    assert.deepEqual(client.checkpoints, [5, 4]);
    await client.close();
  });

  test("returns as the same one where it is killed while it waits for the first round", async (t) => {
    const liar = await startLiar(t);
    liar.lies = {
      welcome: (hello) => welcome(hello, { policy: "splitfed-v1", localSteps: 1 }),
      reply: () => HANG_UP,
    };
    const storage = new MemoryStorage();
    const client = await connectTo(liar, { share: true, storage, giveUpAfter: 0 });
    await assert.rejects(client.fit(DATA, { batchSize: 6, checkpointEvery: 9 }), ConnectionLost);
    await client.close();
    const again = await connectTo(liar, { share: true, storage, resume: true });
    assert.equal(again.session, client.session);
    await again.close();
  });
});
