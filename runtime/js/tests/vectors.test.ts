/** The vectors that the Python side writes and runs too: what it says is understood here. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { planRates } from "../src/schedules.js";
import type { Schedule } from "../src/schedules.js";
import { shuffleRows } from "../src/client/shuffles.js";
import { decodeTensors } from "../src/codecs.js";
import { spell } from "../src/decoders.js";
import { Engine } from "../src/engine/engines.js";
import { ArrayMismatch, FormatError, ForbiddenGraph, SplitonnxError } from "../src/errors.js";
import { checkGraph } from "../src/gate/gates.js";
import { decodeManifest } from "../src/manifests.js";
import { MAX_HEADER, PROTOCOL, decodeMessage, encodeMessage } from "../src/messages.js";
import type { Message } from "../src/messages.js";
import { openFolder } from "../src/node.js";
import { findSampleAxis } from "../src/sample_axes.js";
import { checkArray } from "../src/tensors.js";
import type { Dtype, NdArrays, TensorSpec } from "../src/tensors.js";
import { Protocol, listWires } from "../src/wire/protocols.js";
import type { State } from "../src/wire/protocols.js";
import {
  RUNTIMES,
  SESSION_OPTIONS,
  VECTORS,
  fromBase64,
  readArrays,
  readVectors,
  relate,
  sameBytes,
} from "./fixtures.js";

interface Said {
  bytes: string;
  message: Record<string, unknown>;
  tensors: Record<string, { dtype: Dtype; shape: number[]; bytes: string }>;
}
type Refusal = { bytes: string; reason: string };

/** Write a message's fields as they stand in JSON. */
function asJson(message: Message): unknown {
  const fields = Object.entries(message).map(([name, value]) => [
    spell(name),
    value instanceof Map ? Object.fromEntries(value) : value,
  ]);
  return JSON.parse(JSON.stringify(Object.fromEntries(fields)));
}

function sameTensors(actual: NdArrays, expected: NdArrays): void {
  assert.deepEqual([...actual.keys()].sort(), [...expected.keys()].sort());
  for (const [name, array] of expected) sameBytes(actual.get(name)!, array);
}

test("messages mean what is written beside them, and come back when written here", () => {
  for (const { bytes, message, tensors } of readVectors<Said[]>("messages")) {
    const read = decodeMessage(fromBase64(bytes));
    assert.deepEqual(asJson(read.message), message);
    sameTensors(read.tensors, readArrays(tensors));
    const again = decodeMessage(encodeMessage(read.message, read.tensors));
    assert.deepEqual(again.message, read.message);
    sameTensors(again.tensors, read.tensors);
  }
});

describe("what must be refused is refused", () => {
  const refusals = readVectors<Record<string, Refusal[]>>("refusals");
  const readers: [string, (content: Uint8Array) => unknown, typeof FormatError | typeof ForbiddenGraph][] = [
    ["tensors", (content) => decodeTensors(content, MAX_HEADER), FormatError],
    ["messages", decodeMessage, FormatError],
    ["graphs", (content) => checkGraph("stage", content), ForbiddenGraph],
  ];
  for (const [kind, read, error] of readers) {
    test(kind, () => {
      assert.ok(refusals[kind]!.length > 5);
      for (const { bytes, reason } of refusals[kind]!) {
        assert.throws(() => read(fromBase64(bytes)), error, `${bytes} (${reason})`);
      }
    });
  }
});

test("a changed manifest is refused", () => {
  const text = readFileSync(join(VECTORS, "tiny/manifest.json"), "utf-8");
  const read = (one: string) => decodeManifest(new TextEncoder().encode(one), "manifest.json");
  assert.equal(read(text).party, "client");
  const { manifests } = readVectors<{ manifests: { before: string; after: string }[] }>("refusals");
  for (const { before, after } of manifests) {
    assert.throws(() => read(text.replace(before, after)), FormatError, after);
  }
  assert.throws(() => read("{"), FormatError);
});

test("a graph is refused for the reason that the Python side gives", () => {
  const { graphs } = readVectors<{ graphs: Refusal[] }>("refusals");
  for (const { bytes, reason } of graphs) {
    assert.throws(() => checkGraph("stage", fromBase64(bytes)), new RegExp(reason));
  }
});

test("replies are taken and refused as the vectors say", async () => {
  const { manifest } = await loadBundle(openFolder(join(VECTORS, "tiny")));
  const wires = listWires(manifest);
  const replies = readVectors<{ state: State; bytes: string; error: string }[]>("replies");
  for (const { state, bytes, error } of replies) {
    const protocol = new Protocol(manifest);
    protocol.send({
      type: "Hello", protocol: PROTOCOL, digest: manifest.digest, session: "s", origin: "",
      start: 0, generation: 1, step: 0, kept: [], isOpen: false, canRepeat: false, canShare: false,
      microBatch: 0, inFlight: 1, wires,
    });
    protocol.state = state;
    let caught = "";
    try {
      protocol.receive(fromBase64(bytes));
    } catch (thrown) {
      assert.ok(thrown instanceof SplitonnxError);
      caught = thrown.name;
    }
    assert.equal(caught, error);
  }
});

test("the axis of an output's samples is found as the Python side finds it", () => {
  type Shape = TensorSpec["shape"];
  type Case = [data: Shape[], output: Shape, own: boolean, axis: number | null];
  for (const [data, output, own, axis] of readVectors<Case[]>("sample_axes")) {
    const found = findSampleAxis({ shape: output }, data.map((shape) => ({ shape })), own);
    assert.equal(found, axis ?? undefined, JSON.stringify([data, output, own]));
  }
});

test("shapes are taken and refused as the Python side does, in the same words", () => {
  interface Case {
    declared: (number | string | null)[];
    shape: number[];
    sizes: Record<string, number>;
    is_output: boolean;
    bound: Record<string, number>;
    error: string;
  }
  const cases = readVectors<Case[]>("shapes");
  assert.ok(cases.length > 200);
  for (const { declared, shape, sizes, is_output, bound, error } of cases) {
    const found = new Map(Object.entries(sizes));
    const spec = { name: "h", dtype: "F32", shape: declared, bounds: null };
    const array = { dtype: "F32", shape, data: new Float32Array(0) } as const;
    let caught = "";
    try {
      checkArray(array, spec, found, is_output);
    } catch (thrown) {
      assert.ok(thrown instanceof ArrayMismatch);
      caught = thrown.message;
    }
    assert.equal(caught, error);
    assert.deepEqual(Object.fromEntries(found), bound, `${declared} = ${shape}`);
  }
});

test("a bundle with nameless dimensions on its wires is refused", () => {
  const text = readFileSync(join(VECTORS, "tiny/manifest.json"), "utf-8");
  const manifest = JSON.parse(text) as { phases: { wires: { tensor: { shape: unknown[] } }[] }[] };
  manifest.phases[0]!.wires[0]!.tensor.shape[1] = null;
  const content = new TextEncoder().encode(JSON.stringify(manifest));
  assert.throws(() => decodeManifest(content, "manifest.json"), /cut the model again/);
});

test("learning rates follow a schedule as in Python", () => {
  const cases = readVectors<{ schedule: Schedule; factors: number[] }[]>("schedules");
  assert.ok(cases.length > 5);
  for (const { schedule, factors } of cases) {
    const plan = planRates(schedule, 2, 5);
    for (const [step, factor] of factors.entries()) {
      const made = plan.getFactor(Math.floor(step / 5), step % 5);
      assert.ok(Math.abs(made - factor) <= 1e-12, `${plan.description}: ${made}, not ${factor}`);
    }
  }
});

test("rows are shuffled as numpy shuffles them", () => {
  interface Shuffle {
    seed: number;
    epoch: number;
    size: number;
    first: number[];
    sum: number;
  }
  for (const { seed, epoch, size, first, sum } of readVectors<Shuffle[]>("shuffles")) {
    const rows = shuffleRows(size, seed, epoch);
    assert.deepEqual([...rows.subarray(0, 100)], first);
    assert.equal(rows.reduce((total, row, index) => total + row * index, 0), sum);
  }
});

describe("a quantized stage gives what its graph says, unlike in a session of usual settings", () => {
  interface Quantized {
    graph: string;
    inputs: Said["tensors"];
    outputs: Said["tensors"];
  }
  const vector = readVectors<Quantized>("quantized_stage");
  const graph = fromBase64(vector.graph);
  const expected = readArrays(vector.outputs);
  const x = readArrays(vector.inputs).get("x")!;
  for (const [name, ort] of RUNTIMES) {
    for (const extra of [undefined, { session: { intra_op: { allow_spinning: "0" } } }]) {
      test(`under ${name}${extra === undefined ? "" : ", with settings of the app's"}`, async () => {
        const options = extra === undefined ? SESSION_OPTIONS : { ...SESSION_OPTIONS, extra };
        const engine = new Engine(ort, options);
        const feed = engine.fromArray(x);
        const usual = await ort.InferenceSession.create(graph, SESSION_OPTIONS);
        const others = (await usual.run({ x: feed })) as Record<string, { data: Float32Array }>;
        const found = await engine.run(await engine.load("predict", graph), new Map([["x", feed]]));
        for (const [output, array] of expected) {
          assert.ok(relate(engine.toArray(found.get(output)!).data, array.data as Float32Array) < 1e-6);
          assert.ok(relate(others[output]!.data, array.data as Float32Array) > 1e-2, output);
        }
        await usual.release();
        await engine.release();
      });
    }
  }
});

describe("every stage gives what the vectors say", () => {
  const content = new Uint8Array(readFileSync(join(VECTORS, "stages.safetensors")));
  const { tensors } = decodeTensors(content, MAX_HEADER);
  for (const [name, ort] of RUNTIMES) {
    test(`under ${name}`, async () => {
      const party = await loadBundle(openFolder(join(VECTORS, "dropout/client")));
      const engine = new Engine(ort, SESSION_OPTIONS);
      let ran = 0;
      for (const stage of party.manifest.phases.flatMap((phase) => phase.stages)) {
        const loaded = await engine.load(stage.name, party.graphs.get(stage.graph)!);
        const feeds = stage.inputs.map((input) => {
          const array = tensors.get(`client/${stage.name}/in/${input.name}`)!;
          return [input.name, engine.fromArray(array)] as const;
        });
        for (const [output, value] of await engine.run(loaded, new Map(feeds))) {
          const expected = tensors.get(`client/${stage.name}/out/${output}`)!;
          const found = engine.toArray(value);
          assert.deepEqual([...found.shape], [...expected.shape]);
          assert.ok(relate(found.data, expected.data) < 1e-4, `${stage.name} ${output}`);
        }
        ran += 1;
      }
      assert.equal(ran, 14);
      await engine.release();
    });
  }
});
