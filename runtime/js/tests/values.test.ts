/** Small things: hashes, delays, norms, the codec on what is random, dataflows. */

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { test } from "node:test";

import { LONGEST_DELAY, listDelays } from "../src/channels/retries.js";
import { decodeTensors, encodeTensors } from "../src/codecs.js";
import { DatasetMeans } from "../src/client/metrics/dataset_means.js";
import { Dataflow } from "../src/engine/dataflows.js";
import { FormatError, NormTooLarge, NotFinite, ValueOutOfRange } from "../src/errors.js";
import { LARGEST, fitsShape } from "../src/expressions.js";
import { hashBytes, hashPlainly } from "../src/hashes.js";
import type { Phase } from "../src/manifests.js";
import { checkArray } from "../src/tensors.js";
import { checkFinite, checkNorm } from "../src/wire/validation.js";
import { makeArray, sameBytes } from "./fixtures.js";

test("bytes of every length are hashed as SHA-256 has it, with and without crypto.subtle", async () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000]) {
    const content = randomBytes(length);
    const expected = createHash("sha256").update(content).digest("hex");
    assert.equal(hashPlainly(content), expected);
    assert.equal(await hashBytes(content), expected);
  }
});

test("delays double from attempt to attempt, and spread", () => {
  const delays = (random: () => number) => {
    const all = listDelays(random);
    return Array.from({ length: 12 }, () => all.next().value);
  };
  assert.deepEqual(delays(() => 1).slice(0, 4), [0, 0.05, 0.1, 0.2]);
  assert.deepEqual(delays(() => 0).slice(0, 4), [0, 0.025, 0.05, 0.1]);
  assert.equal(delays(() => 1).at(-1), LONGEST_DELAY);
});

test("NaN, infinity and large norms are found", () => {
  const array = makeArray("F32", [3], [1, 2, 2]);
  checkNorm("g", array, 3);
  assert.throws(() => checkNorm("g", array, 2.9), NormTooLarge);
  for (const dtype of ["F32", "F64"] as const) {
    for (const value of [NaN, Infinity, -Infinity]) {
      const bad = makeArray(dtype, [3], [1, value, 2]);
      assert.throws(() => checkFinite("g", bad, "step 1"), NotFinite);
    }
  }
  assert.throws(() => checkFinite("g", makeArray("F16", [2], [0, 0x7c00]), "step 1"), NotFinite);
  checkFinite("g", makeArray("F16", [2], [0, 0x7bff]), "step 1");
  checkFinite("g", makeArray("F32", [1], [3e38]), "step 1");
  checkFinite("g", makeArray("I64", [1], [1]), "step 1");
});

test("no size of a dimension without a number is 0, nor more than an integer of 32 bits", () => {
  for (const [size, fits] of [[0, false], [1, true], [LARGEST, true], [LARGEST + 1, false]] as const) {
    for (const dim of ["N", "2*N + 1", "unk__x:0", null]) {
      const isOdd = dim === "2*N + 1" && size === 1; // N would be 0
      assert.equal(fitsShape([size], [dim], new Map()), fits && !isOdd, `${dim} ${size}`);
    }
    assert.ok(fitsShape([size], [size], new Map()));
  }
});

test("a message that was altered in one byte is read or refused", () => {
  const content = encodeTensors(
    new Map([
      ["x", makeArray("I64", [3], [1, 2, 3])],
      ["y", makeArray("F32", [2, 2], [1, 2, 3, 4])],
      ["z", makeArray("BOOL", [2], [0, 1])],
    ]),
    { note: "ü" },
  );
  for (let place = 0; place < content.length; place++) {
    for (const value of [0, 0x22, 0x30, 0x5c, 0x7b, 0xff]) {
      const altered = content.slice();
      altered[place] = value;
      try {
        decodeTensors(altered, 1 << 16);
      } catch (error) {
        assert.ok(error instanceof FormatError, String(error));
      }
    }
  }
});

test("a message at an odd place in memory is read", () => {
  const array = makeArray("F64", [2], [0.1, 0.2]);
  const content = encodeTensors(new Map([["x", array]]));
  const shifted = new Uint8Array(content.length + 3).subarray(3);
  shifted.set(content);
  sameBytes(decodeTensors(shifted, 1 << 16).tensors.get("x")!, array);
});

test("stages run as their inputs come, and values go when nothing needs them", () => {
  const stage = (name: string, inputs: string[], outputs: string[]) => ({
    name,
    graph: "",
    inputs: inputs.map((input) => ({ name: input, source: "wire" as const })),
    outputs,
    after: [] as string[],
  });
  const wire = (name: string, sender: string, receiver: string) => ({
    tensor: { name, dtype: "F32", shape: [], bounds: null },
    sender,
    receiver,
    kind: "activation" as const,
  });
  const phase: Phase = {
    name: "train",
    stages: [stage("late", ["a", "back"], ["w.new"]), stage("early", ["x"], ["a"])],
    data: [],
    wires: [wire("a", "client", "server"), wire("back", "server", "client")],
    results: [],
    commits: new Map([["w", "w.new"]]),
    encoded: [],
  };
  const progress = new Dataflow(phase, "client").start();
  assert.equal(progress.nextStage(), undefined);
  progress.arrive(["x"]);
  assert.equal(progress.nextStage()!.name, "early");
  assert.equal(progress.nextStage(), undefined);
  progress.arrive(["a"]);
  assert.deepEqual(progress.release(["x"]), ["x"]);
  assert.deepEqual(progress.nextWires(), ["a"]);
  assert.deepEqual(progress.release(["a"]), []); // the late stage takes it too
  assert.deepEqual(progress.missing, ["back"]);
  progress.arrive(["back"]);
  assert.equal(progress.nextStage()!.name, "late");
  progress.arrive(["w.new"]);
  assert.deepEqual(progress.release(["a", "back"]), ["a", "back"]);
  assert.ok(progress.isFinished);
});

test("what is made again is dropped until then", () => {
  const stage = (name: string, inputs: string[], outputs: string[], after: string[] = []) => ({
    name,
    graph: "",
    inputs: inputs.map((input) => ({
      name: input, source: input === "w" ? ("state" as const) : ("stash" as const),
    })),
    outputs,
    after,
  });
  const phase: Phase = {
    name: "train",
    stages: [
      stage("forward", ["x", "w"], ["kept", "h"]),
      stage("middle", ["kept"], ["m"]),
      stage("again", ["x", "w"], ["kept"], ["g"]),
      stage("backward", ["kept", "g"], ["new"]),
    ],
    data: [], wires: [], results: [], commits: new Map([["w", "new"]]), encoded: [],
  };
  const flow = new Dataflow(phase, "client");
  const progress = flow.start();
  progress.arrive(["x"]);
  assert.equal(progress.nextStage()!.name, "forward");
  progress.arrive(["kept"]);
  assert.ok(progress.wants("kept"));
  assert.deepEqual(progress.release(["x"]), []); // it is needed to make the value again
  assert.equal(progress.nextStage()!.name, "middle");
  assert.deepEqual(progress.release(["kept"]), ["kept"]);
  assert.equal(progress.nextStage(), undefined); // the gradient is not there
  assert.ok(!progress.wants("kept"));
  progress.arrive(["g"]);
  assert.equal(progress.nextStage()!.name, "again");
  assert.ok(progress.wants("kept"));
  assert.deepEqual(progress.release(["x", "g"]), ["x"]);
  assert.equal(progress.nextStage()!.name, "backward");
  assert.deepEqual(progress.release(["kept", "g"]), ["kept", "g"]);
  assert.deepEqual([...flow.reread], ["w"]);
});

test("batches weigh by their size or by what counted, and a mean of nothing is 0", () => {
  const means = new DatasetMeans();
  means.add(new Map(Object.entries({ loss: 1, accuracy: 0.5, "accuracy@counted": 3 })), 4);
  means.add(new Map(Object.entries({ loss: 4, accuracy: 1, "accuracy@counted": 1 })), 2);
  assert.deepEqual(means.compute(), { loss: 2, accuracy: 0.625 });
  const none = new DatasetMeans();
  none.add(new Map(Object.entries({ loss: 0, "loss@counted": 0 })), 4);
  assert.deepEqual(none.compute(), { loss: 0 });
});

test("a batch adds its total also where nothing counts", () => {
  const means = new DatasetMeans();
  means.add(new Map(Object.entries({ loss: 0, "loss@counted": 0, "loss@total": 3 })), 1);
  means.add(new Map(Object.entries({ loss: 2, "loss@counted": 2, "loss@total": 4 })), 4);
  assert.deepEqual(means.compute(), { loss: 3.5 });
});

test("a sum of losses is the sum of their means", () => {
  const means = new DatasetMeans();
  const weights = { "loss.a@weight": 0.5, "loss.b@weight": 2 };
  const first = { loss: 2.5, "loss.a": 1, "loss.a@counted": 1, "loss.b": 1, ...weights };
  means.add(new Map(Object.entries(first)), 2);
  const second = { loss: 5, "loss.a": 2, "loss.a@counted": 3, "loss.b": 2, ...weights };
  means.add(new Map(Object.entries(second)), 2);
  assert.deepEqual(means.compute(), { loss: 3.875, "loss.a": 1.75, "loss.b": 1.5 });
});

test("labels are classes, or the one value that is allowed beside them", () => {
  const spec = { name: "labels", dtype: "I64", shape: ["N"], bounds: [0, 4, -100] };
  const labels = (...values: number[]) => makeArray("I64", [values.length], values);
  checkArray(labels(0, -100, 3), spec, new Map());
  const told = /'labels' holds -1; allowed are 0 to 3, and -100/;
  assert.throws(() => checkArray(labels(-1), spec, new Map()), told);
  assert.throws(() => checkArray(labels(4), spec, new Map()), ValueOutOfRange);
});

test("a tensor that is sent is named as in the model", () => {
  const named = {
    "x": "'x'",
    "h@server": "'h' (sent to the server)",
    "h@client_grad#int8": "the gradient of 'h'",
    "h@client_grad": "the gradient of 'h'",
    "table@2": "'table@2'",
  };
  for (const [name, told] of Object.entries(named)) {
    assert.ok(new NotFinite(name, "step 1").message.startsWith(`${told} holds NaN or infinity`));
  }
});
