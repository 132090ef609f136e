/** Clients that train one model together: with real servers and Python clients, and with liars. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { translateFault } from "../src/channels/faults.js";
import { decodeTensors, encodeTensors } from "../src/codecs.js";
import { takeTensor } from "../src/engine/engines.js";
import {
  ArrayMismatch,
  ConnectionLost,
  MemoryStorage,
  NotFinite,
  RemoteProtocolError,
  SharingNotPermitted,
} from "../src/index.js";
import type { Outputs } from "../src/index.js";
import { MAX_HEADER } from "../src/messages.js";
import type { TensorsMessage } from "../src/messages.js";
import { LEAVES, ROUND, SAMPLES, nameOwn } from "../src/sharing.js";
import type { NdArray, NdArrays } from "../src/tensors.js";
import { makeArray, relate } from "./fixtures.js";
import { DATA, FILES, connectTo, reply, startLiar, welcome } from "./liars.js";
import { Proxy, PythonPeer, ServerProcess, closeForks } from "./peers.js";
import { CLIENT, JOINED, OTHERS, OURS, PLAN, PLAN_STEPS, SEED, TWO } from "./sharers.js";
import { followPolicy, serve, train } from "./sharers.js";

after(closeForks);

describe("a client in Node and one in Python", () => {
  let folder: string;
  let peer: PythonPeer;
  let files: string[];
  const expected = new Map<string, readonly NdArrays[]>(); // what two clients in Python train

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "splitonnx-joint-"));
    peer = new PythonPeer(["-m", "tests.support.joint_clients"]);
    files = [join(folder, "ours"), join(folder, "others")];
    for (const [index, data] of [OURS, OTHERS].entries()) {
      const arrays = Object.entries(data).map(([name, one]) => [name, takeTensor(name, one)] as const);
      await writeFile(files[index]!, encodeTensors(new Map(arrays)));
    }
    for (const policy of ["splitfed-v1", "sequential"]) {
      const server = await ServerProcess.start("dropout", ...followPolicy(policy), ...TWO);
      tell(server.url, files);
      assert.deepEqual(JSON.parse(await peer.hear()), [PLAN_STEPS, PLAN_STEPS]);
      await server.remove();
      expected.set(policy, files.map(readState));
    }
  });

  after(async () => {
    await peer.end();
    await rm(folder, { recursive: true });
  });

  function tell(url: string, data: readonly string[]): void {
    const { epochs, batchSize } = PLAN;
    peer.say(JSON.stringify({ url, bundle: CLIENT, data, seed: SEED, epochs, batch_size: batchSize }));
  }

  function readState(file: string): NdArrays {
    return decodeTensors(new Uint8Array(readFileSync(`${file}.state`)), MAX_HEADER).tensors;
  }

  function relateAll(state: (name: string) => Outputs[string]["data"], other: NdArrays): number {
    return Math.max(...JOINED.map((name) => relate(state(name), other.get(name)!.data)));
  }

  /** Hold what a client here has trained against what two in Python have. */
  function distance(state: Outputs, policy = "splitfed-v1"): number {
    return relateAll((name) => state[name]!.data, expected.get(policy)![0]!);
  }

  for (const policy of ["splitfed-v1", "sequential"]) {
    test(`train the model that two in Python train, with the policy ${policy}`, async (t) => {
      const server = await ServerProcess.start("dropout", ...followPolicy(policy), ...TWO);
      t.after(() => server.remove());
      const shown: string[] = [];
      const onWires = (direction: string, phase: string, wires: Outputs) => {
        if (phase !== "share" || shown.push(direction) > 1) return;
        const names = [SAMPLES, LEAVES, ...JOINED.map(nameOwn)];
        assert.deepEqual(Object.keys(wires).sort(), names.sort());
        tell(server.url, files.slice(1)); // the other comes when this one waits already
      };
      const { state, steps } = await train(server.url, {}, { onWires });
      assert.deepEqual([JSON.parse(await peer.hear()), steps.length], [[PLAN_STEPS], PLAN_STEPS]);
      assert.equal(shown.join(), Array<string>(4).fill("sent,received").join());
      const [ours, others] = [distance(state, policy), readState(files[1]!)];
      assert.ok(JOINED.length > 3);
      assert.ok(ours <= 1e-6, `${ours}`);
      const other = relateAll((name) => others.get(name)!.data, expected.get(policy)![1]!);
      assert.ok(other <= 1e-6, `${other}`);
      const between = relateAll((name) => state[name]!.data, others);
      if (policy === "splitfed-v1") assert.equal(between, 0); // they end with one model
      const alone = await ServerProcess.start("dropout");
      t.after(() => alone.remove());
      const lone = await train(alone.url);
      assert.ok(distance(lone.state, policy) > 1e-3); // which is another than each would learn
    });
  }

  test("do so over connections that break anywhere", async (t) => {
    const server = await serve(t, ...TWO);
    const proxy = await Proxy.start(() => server.url);
    t.after(() => proxy.end());
    let word = 7;
    const random = () => (word = (Math.imul(word, 1664525) + 1013904223) >>> 0) / 2 ** 32;
    proxy.budget = () => 10_000 + random() * 14_000;
    tell(server.url, files.slice(1));
    const options = { giveUpAfter: 60 };
    const { client, state } = await train(proxy.url, { checkpointEvery: 2 }, options);
    await peer.hear();
    assert.ok(client.reconnects > 3, `${client.reconnects} reconnects`);
    assert.ok(distance(state) <= 1e-6, `${distance(state)}`);
  });

  const ends: readonly [what: string, kept: number, isNow: (shares: number, steps: number) => boolean][] = [
    ["before it shares", 1, (_, steps) => steps === 2],
    ["when the first joined weights have come", 0, (shares) => shares === 1],
    ["when the joined weights have come, and are not kept", 1, (shares) => shares === 2],
    ["after it shared", 2, (_, steps) => steps === 3],
    ["in the middle of a round", 3, (_, steps) => steps === 4],
    ["when the weights that it leaves with have come, and are not kept", 4, (shares) => shares === 4],
  ];
  for (const [what, kept, isNow] of ends) {
    test(`do so where the page is loaded again ${what}`, async (t) => {
      const server = await serve(t, ...TWO);
      const proxy = await Proxy.start(() => server.url);
      t.after(() => proxy.end());
      tell(server.url, files.slice(1));
      const storage = new MemoryStorage();
      let [shares, steps] = [0, 0];
      const breakIf = (isTime: boolean) => {
        if (!isTime) return;
        proxy.budget = () => 0;
        proxy.cut();
      };
      const onWires = (direction: string, phase: string) => {
        if (direction === "received" && phase === "share") breakIf(isNow(++shares, steps));
      };
      const onStep = () => breakIf(isNow(shares, ++steps));
      const fit = { checkpointEvery: 1, onStep };
      const left = train(proxy.url, fit, { storage, giveUpAfter: 0, onWires });
      await assert.rejects(left, ConnectionLost);
      const resumed = { storage, resume: true };
      const { state, steps: others } = await train(server.url, { checkpointEvery: 1 }, resumed);
      await peer.hear();
      assert.equal(others.length, PLAN_STEPS - kept);
      assert.ok(distance(state) <= 1e-6, `${distance(state)}`);
    });
  }
});

/** What an honest server would send. */
function join1(value = 1, round = 1): Map<string, NdArray> {
  return new Map([
    [ROUND, makeArray("I64", [], [round])],
    ["W1@joined", makeArray("F32", [3, 4], Array<number>(12).fill(value))],
  ]);
}

function leaveOut(name: string): NdArrays {
  return new Map([...join1()].filter(([one]) => one !== name));
}

describe("a server that", () => {
  const wrong: [string, NdArrays, new (...facts: never[]) => Error][] = [
    ["no weights", leaveOut("W1@joined"), RemoteProtocolError],
    ["no round", leaveOut(ROUND), RemoteProtocolError],
    ["nothing", new Map(), RemoteProtocolError],
    ["its own weights", new Map([...join1(), ["W2@joined", makeArray("F32", [1], [1])]]), RemoteProtocolError],
    ["weights of another shape", new Map([...join1(), ["W1@joined", makeArray("F32", [1, 4], [1, 1, 1, 1])]]), ArrayMismatch],
    ["weights that are not numbers", join1(NaN), NotFinite],
    ["weights without end", join1(Infinity), NotFinite],
  ];
  const terms = { policy: "splitfed-v1", localSteps: 1 };

  for (const [what, tensors, error] of wrong) {
    test(`sends ${what} is refused, and nothing is changed`, async (t) => {
      const liar = await startLiar(t);
      const initial = await loadBundle(FILES);
      liar.lies = {
        welcome: (hello) => welcome(hello, terms),
        reply: (asked: TensorsMessage) => reply(asked, {}, tensors),
      };
      const client = await connectTo(liar, { share: true });
      await assert.rejects(client.fit(DATA, { batchSize: 6 }), error);
      assert.deepEqual(client.state()["W1"]!.data, initial.state.get("W1")!.data);
      assert.equal(client.steps, 0);
      await client.close();
    });
  }

  test("joins honestly is believed", async (t) => {
    const liar = await startLiar(t);
    liar.lies = {
      welcome: (hello) => welcome(hello, { ...terms, rounds: 1 }),
      reply: (asked) => (asked.phase === "share" ? reply(asked, {}, join1(1, asked.step)) : reply(asked)),
    };
    const client = await connectTo(liar, { share: true });
    await client.fit(DATA, { batchSize: 6, epochs: 5 });
    assert.deepEqual([...(client.state()["W1"]!.data as Float32Array)], Array<number>(12).fill(1));
    assert.equal(client.steps, 1);
    await client.close();
  });

  test("asks without permission gets nothing but a greeting", async (t) => {
    const liar = await startLiar(t);
    liar.lies = { welcome: (hello) => welcome(hello, { ...terms, policy: "x\n".repeat(99) }) };
    await assert.rejects(connectTo(liar), (error: Error) => {
      assert.ok(error instanceof SharingNotPermitted, `${error}`);
      assert.match(error.message, /^[^\p{C}]{10,500}$/u);
      return true;
    });
    await liar.quiet();
    assert.deepEqual(liar.heard, ["Hello"]);
  });

  test("asks for what its bundle does not share is refused", async (t) => {
    const liar = await startLiar(t);
    const manifest = JSON.parse(new TextDecoder().decode(FILES["manifest.json"])) as {
      phases: { name: string; wires: unknown }[];
    };
    manifest.phases = manifest.phases.filter(({ name }) => name !== "share");
    const bundle = { ...FILES, "manifest.json": new TextEncoder().encode(JSON.stringify(manifest)) };
    liar.lies = { welcome: ({ wires, ...hello }) => welcome({ ...hello, wires }, { ...terms, wires }) };
    await assert.rejects(connectTo(liar, { bundle, share: true }), RemoteProtocolError);
  });

  test("asks on a later connection alone is refused", async (t) => {
    const liar = await startLiar(t);
    let greeted = 0;
    liar.lies = {
      welcome: (hello) => welcome(hello, greeted++ ? terms : {}),
      reply: (asked) => (greeted > 1 ? reply(asked) : ""),
    };
    const client = await connectTo(liar, { share: true });
    await assert.rejects(client.fit(DATA, { batchSize: 6 }), /other terms/);
    await client.close();
    const fault = { type: "Fault", code: "SharingNotPermitted", reason: "", newest: 0, needed: 0, limit: 0 } as const;
    assert.match(translateFault({ ...fault, subject: "p" }, 1).message, /policy 'p' joins/);
  });
});
