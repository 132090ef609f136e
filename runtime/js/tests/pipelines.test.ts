/** Pipelined steps: their schedules, and that what an executor computes does not depend on timing. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import type { PartyBundle } from "../src/bundles.js";
import type { TaskWires } from "../src/channels/exchange_events.js";
import { Job } from "../src/client/jobs.js";
import { canOverlap } from "../src/engine/dataflows.js";
import { Engine } from "../src/engine/engines.js";
import { Executor } from "../src/engine/executors.js";
import { LocalProtocolError } from "../src/errors.js";
import { ACCUMULATE, UPDATE, findPhase } from "../src/manifests.js";
import type { Phase } from "../src/manifests.js";
import type { TaskKey } from "../src/messages.js";
import { MICRO_BATCHES, MICRO_BATCH_WEIGHT } from "../src/micro_batches.js";
import { openFolder } from "../src/node.js";
import { listPieces, makeSchedule, spellSchedule } from "../src/pipelines.js";
import type { NdArray, NdArrays } from "../src/tensors.js";
import { RUNTIMES, SESSION_OPTIONS, VECTORS, makeArray, sameBytes } from "./fixtures.js";

describe("a schedule", () => {
  const spell = (...given: Parameters<typeof makeSchedule>) => spellSchedule(makeSchedule(...given));

  test("of one task in flight is the unpipelined step", () => {
    assert.equal(spell(2, 3, 1), "F0 B0 F1 B1 F2 B2 U E");
    assert.equal(spell(3, 2, 1), "F0 T0 B0 F1 T1 B1 U E");
  });

  test("begins as many tasks as may be in flight, and then runs first what was sent first", () => {
    assert.equal(spell(2, 3, 2), "F0 F1 B0 F2 B1 U B2 E");
    assert.equal(spell(3, 3, 2), "F0 F1 T0 T1 B0 F2 B1 T2 U B2 E");
    assert.equal(spell(2, 2, 16), "F0 F1 U B0 B1 E");
    assert.equal(spell(5, 1, 2), "F0 T1.0 T2.0 T3.0 U B0 E");
    assert.equal(spell(2, 5, 3), "F0 F1 F2 B0 F3 B1 F4 B2 U B3 B4 E");
    assert.equal(spell(4, 2, 2), "F0 F1 T1.0 T1.1 T2.0 T2.1 B0 U B1 E");
    assert.equal(spell(1, 2, 3), "F0 F1 U E");
    assert.equal(spell(1, 2, 1, { updatePieces: 1 }), "F0 F1 U");
  });

  test("begins an update that needs what the client computed after that", () => {
    const late = { updatePieces: 3, isUpdateEarly: false };
    assert.equal(spell(2, 3, 2, late), "F0 F1 B0 F2 B1 B2 U T3 E");
  });

  test("has each piece once, in order within its task, and never too many in flight", () => {
    for (const [pieces, count, limit] of [[2, 8, 4], [3, 5, 3], [4, 7, 16], [3, 1, 2]] as const) {
      const next = new Map<number, number>();
      const operations = makeSchedule(pieces, count, limit);
      for (const { task, piece } of operations) {
        assert.equal(piece, next.get(task) ?? 0);
        next.set(task, piece + 1);
        const open = [...next].filter(([one, done]) => done < (one === count ? 2 : pieces));
        assert.ok(open.length <= limit);
      }
      assert.equal(operations.length, pieces * count + 2);
      assert.deepEqual([...next.keys()], Array.from({ length: count + 1 }, (_, task) => task));
    }
  });
});

describe("the pieces of a phase", () => {
  let party: PartyBundle;
  before(async () => {
    party = await loadBundle(openFolder(join(VECTORS, "dropout/client")));
  });

  const phase = (...stages: [string, string[], string[]][]): Phase => ({
    ...findPhase(party.manifest, "none"),
    stages: stages.map(([name, inputs, outputs]) => ({
      name,
      graph: name,
      inputs: inputs.map((input) => {
        const source = input.startsWith("s:") ? "state" : input.startsWith("w:") ? "wire" : "stash";
        return { name: input, source } as const;
      }),
      outputs,
      after: [],
    })),
    wires: [...new Set(stages.flatMap(([, inputs]) => inputs))]
      .filter((name) => name.startsWith("w:"))
      .map((name) => ({
        tensor: { name, dtype: "F32", shape: [], bounds: null },
        sender: "server",
        receiver: "client",
        kind: "gradient",
      })),
    commits: new Map([["s:sum", "sum"]]),
  });

  test("are told apart by the wires that they wait for", async () => {
    const pieces = listPieces(findPhase(party.manifest, ACCUMULATE), "client");
    assert.deepEqual(pieces, [[], ["flat@client"], ["r1@server_grad"]]);
    const update = listPieces(findPhase(party.manifest, UPDATE), "client");
    assert.deepEqual(update, [[], ["splitonnx.confirmed"]]);
    const { manifest } = await loadBundle(openFolder(join(VECTORS, "tiny")));
    assert.deepEqual(listPieces(findPhase(manifest, "train"), "client"), [[], ["h.grad", "loss"]]);
    assert.deepEqual(listPieces(findPhase(manifest, "evaluate"), "client"), [[]]);
  });

  test("overlap unless an earlier one reads a state that a later one replaces", () => {
    assert.ok(canOverlap(findPhase(party.manifest, ACCUMULATE), "client"));
    const good = phase(["a", ["x"], ["h"]], ["b", ["w:g", "h", "s:sum"], ["sum"]]);
    assert.ok(canOverlap(good, "client"));
    const bad = phase(["a", ["x", "s:sum"], ["h"]], ["b", ["w:g", "h"], ["sum"]]);
    assert.ok(!canOverlap(bad, "client"));
  });
});

for (const [title, ort] of RUNTIMES) {
  describe(`an executor under ${title}, whose micro-batches overlap`, () => {
    const [count, rows] = [3, 4];
    const engine = new Engine(ort, SESSION_OPTIONS);
    let party: PartyBundle;
    let expected: NdArrays;
    let word = 1;
    const next = () => (word = (Math.imul(word, 1664525) + 1013904223) >>> 0) / 2 ** 32;
    const draw = (...shape: number[]): NdArray => {
      const size = shape.reduce((product, dim) => product * dim, 1);
      return makeArray("F32", shape, Array.from({ length: size }, () => next() * 2 - 1));
    };
    let given: NdArrays[];
    let replies: { features: NdArrays; gradients: NdArrays }[];

    const name = (microBatch: number): TaskKey => {
      const phase = microBatch === count ? UPDATE : ACCUMULATE;
      return { session: "s", phase, step: 0, microBatch };
    };
    const begin = async (executor: Executor, task: number): Promise<void> => {
      const data = given[task] ?? new Map([[MICRO_BATCHES, makeArray("I64", [], [count])]]);
      await executor.begin(name(task), { data, seed: 5, learningRate: 0.1 });
    };
    const advance = async (executor: Executor, task: number): Promise<string[]> => {
      const sent: string[] = [];
      for await (const wires of executor.advance(name(task))) sent.push(...wires.keys());
      return sent;
    };
    const confirm = (executor: Executor) => {
      executor.deliver(name(count), new Map([["splitonnx.confirmed", makeArray("I64", [], [count])]]));
    };

    before(async () => {
      party = await loadBundle(openFolder(join(VECTORS, "dropout/client")));
      given = Array.from({ length: count }, () => new Map([
        ["x", draw(rows, 2, 5, 5)],
        ["labels", makeArray("I64", [rows], [0, 1, 2, 1])],
        [MICRO_BATCH_WEIGHT, makeArray("F32", [], [1 / count])],
      ]));
      const probe = new Executor(party, engine);
      await begin(probe, 0);
      let shape: readonly number[] = [];
      for await (const wires of probe.advance(name(0))) shape = wires.get("r1@server")!.shape;
      const phase = findPhase(party.manifest, ACCUMULATE);
      const [, features = 0] = phase.wires.find(({ tensor }) => tensor.name === "flat@client")!
        .tensor.shape;
      replies = Array.from({ length: count }, () => ({
        features: new Map([["flat@client", draw(rows, Number(features))]]),
        gradients: new Map([["r1@server_grad", draw(...shape)]]),
      }));
      const executor = new Executor(party, engine);
      for (let task = 0; task < count; task++) {
        await begin(executor, task);
        await advance(executor, task);
        executor.deliver(name(task), replies[task]!.features);
        await advance(executor, task);
        executor.deliver(name(task), replies[task]!.gradients);
        await advance(executor, task);
        executor.finish(name(task));
      }
      await begin(executor, count);
      await advance(executor, count);
      confirm(executor);
      executor.finish(name(count));
      expected = executor.state();
      const moved = [...expected].filter(([key, { data }]) => {
        return data.some((value, index) => value !== party.state.get(key)!.data[index]);
      });
      assert.ok(moved.length > 5);
    });

    after(() => engine.release());

    const sameState = (executor: Executor) => {
      assert.equal(executor.step, 1);
      for (const [key, array] of executor.state()) sameBytes(array, expected.get(key)!);
    };

    test("computes the same whenever the replies come", async () => {
      const executor = new Executor(party, engine);
      for (let task = 0; task <= count; task++) {
        await begin(executor, task);
        await advance(executor, task);
      }
      for (const task of [2, 0, 1]) executor.deliver(name(task), replies[task]!.features);
      for (const task of [1, 2, 0]) await advance(executor, task);
      confirm(executor);
      for (const task of [2, 1, 0]) executor.deliver(name(task), replies[task]!.gradients);
      // all wires of the last ones are there, and none of them is added up before those before it
      for (const task of [count, 2, 1]) {
        await advance(executor, task);
        assert.ok(!executor.isFinished(name(task)));
      }
      for (const task of [0, 1, 2, count]) {
        await advance(executor, task);
        executor.finish(name(task));
      }
      sameState(executor);
    });

    test("is driven by a job in the order of the schedule, whatever comes first", async () => {
      for (const [inFlight, eager] of [[1, false], [2, false], [2, true], [4, true]] as const) {
        const executor = new Executor(party, engine);
        const log: string[] = [];
        const tasks = [...given, new Map([[MICRO_BATCHES, makeArray("I64", [], [count])]])].map(
          (data, task) => ({ key: name(task), data }),
        );
        const job = new Job(executor, tasks, { inFlight, seed: 5, learningRate: 0.1 });
        const coming: TaskWires[] = []; // replies, each to one message
        await job.begin();
        while (!job.isDone) {
          if (!job.isReady) {
            job.deliver((eager ? coming.pop() : coming.shift())!); // the newest first, or the oldest
            continue;
          }
          for await (const { key: { microBatch }, wires } of job.work()) {
            log.push(`${wires ? "send" : "end"} ${microBatch}`);
            if (!wires) continue;
            const { features, gradients } = replies[microBatch] ?? {};
            const confirmed = new Map([["splitonnx.confirmed", makeArray("I64", [], [count])]]);
            const found = wires.has("r1@server") ? features : gradients;
            coming.push({ key: name(microBatch), wires: found ?? confirmed });
          }
        }
        sameState(executor);
        assert.deepEqual(job.results.map(({ size }) => size), [2, 2, 2, 0]);
        for (let task = inFlight; task <= count; task++) {
          assert.ok(log.indexOf(`send ${task}`) > log.indexOf(`end ${task - inFlight}`), log.join());
        }
        const sent = log.filter((line) => line.startsWith("send")).map((line) => line.slice(5));
        const sending = makeSchedule(3, count, inFlight).filter(({ task, piece }) => {
          return task === count ? !piece : piece < 2;
        });
        assert.deepEqual(sent, sending.map(({ task }) => `${task}`));
      }
    });

    test("sends the update's message before the last micro-batch ends", async () => {
      const executor = new Executor(party, engine);
      for (let task = 0; task < count; task++) await begin(executor, task);
      await begin(executor, count);
      assert.deepEqual(await advance(executor, count), [MICRO_BATCHES]);
    });

    test("takes tasks in order only, and forgets a step whole", async () => {
      const executor = new Executor(party, engine);
      await assert.rejects(begin(executor, 1), LocalProtocolError);
      await begin(executor, 0);
      await begin(executor, 1);
      await assert.rejects(begin(executor, count), LocalProtocolError);
      for (const task of [0, 1]) {
        await advance(executor, task);
        executor.deliver(name(task), replies[task]!.features);
        executor.deliver(name(task), replies[task]!.gradients);
        await advance(executor, task);
      }
      assert.throws(() => executor.finish(name(1)), /0 micro-batches have ended/);
      executor.finish(name(0));
      executor.abandon(name(1));
      for (const [key, array] of executor.state()) sameBytes(array, party.state.get(key)!);
      assert.throws(() => executor.isFinished(name(1)), LocalProtocolError);
      await begin(executor, 0);
    });
  });
}
