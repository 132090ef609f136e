/** Outputs of several batches are joined along the axis of their samples, or refused in advance. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { UsageError } from "../src/index.js";
import type { SplitClient } from "../src/index.js";
import { decodeManifest } from "../src/manifests.js";
import type { TensorSpec } from "../src/tensors.js";
import { listWires } from "../src/wire/protocols.js";
import { makeArray } from "./fixtures.js";
import { FILES, connectTo, reply, startLiar, welcome } from "./liars.js";
import type { Liar } from "./liars.js";

const ROWS = { x: { dims: [5, 3], data: new Float32Array(15).fill(0.5) } };

/** Connect with a bundle that declares another shape of the output `y`, which the server sends. */
function connect(liar: Liar, shape: TensorSpec["shape"]): Promise<SplitClient> {
  const manifest = JSON.parse(new TextDecoder().decode(FILES["manifest.json"])) as {
    outputs: TensorSpec[];
    phases: { wires: { tensor: TensorSpec }[] }[];
    sha256?: string;
  };
  delete manifest.sha256;
  const wires = manifest.phases.flatMap((phase) => phase.wires.map(({ tensor }) => tensor));
  for (const spec of [...manifest.outputs, ...wires]) {
    if (spec.name === "y") Object.assign(spec, { shape });
  }
  const content = new TextEncoder().encode(JSON.stringify(manifest));
  const declared = listWires(decodeManifest(content, "manifest.json"));
  liar.lies.welcome = (hello) => welcome(hello, { wires: declared });
  return connectTo(liar, { bundle: { ...FILES, "manifest.json": content } });
}

/** Answer a batch of 2 rows, or the last of 1, with the columns of [[0, 1, 2, 3, 4], [10, ...]]. */
function answerInColumns(liar: Liar): void {
  let column = 0;
  liar.lies.reply = (asked) => {
    const columns = [column, column + 1].filter((one) => one < 5);
    column += 2;
    const values = [...columns, ...columns.map((one) => one + 10)];
    return reply(asked, {}, new Map([["y", makeArray("F32", [2, columns.length], values)]]));
  };
}

test("the samples of an output are on the axis that carries their name", async (t) => {
  const liar = await startLiar(t);
  answerInColumns(liar);
  const client = await connect(liar, [2, "N"]);
  const { y } = await client.predict(ROWS, { batchSize: 2 });
  assert.deepEqual(y!.dims, [2, 5]);
  assert.deepEqual([...y!.data], [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]);
  await client.close();
});

test("an output without samples is refused before anything is sent, but not alone", async (t) => {
  const liar = await startLiar(t);
  liar.lies.reply = (asked) => reply(asked, {}, new Map([["y", makeArray("F32", [2], [7, 8])]]));
  const client = await connect(liar, [2]);
  await assert.rejects(client.predict(ROWS, { batchSize: 4 }), (error: Error) => {
    assert.ok(error instanceof UsageError);
    return /the output 'y', F32\[2\].*one axis.*with batchSize 5 or larger$/.test(error.message);
  });
  await assert.rejects(client.predict([ROWS, ROWS]), /one by one with predictBatches$/);
  assert.deepEqual(liar.heard, ["Hello"]);
  const { y } = await client.predict(ROWS, { batchSize: 5 });
  assert.deepEqual([y!.dims, [...y!.data]], [[2], [7, 8]]);
  await client.close();
});
