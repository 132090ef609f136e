/**
 * A page that trains on a GPU: tests/browser/test_webgpu.py builds it, and calls what stands in `window`.
 *
 * Nothing here waits for anything but the client, and what is asked for comes back as plain values.
 */

import * as ort from "onnxruntime-web/webgpu";

import { MemoryStorage, SplitClient } from "../../src/index.js";
import type { ConnectOptions } from "../../src/index.js";

/** A batch after the other, in order, as JSON holds them. */
interface Samples {
  readonly images: number[];
  readonly labels: number[];
}

type SessionOptions = NonNullable<ConnectOptions["sessionOptions"]>;

const SIDE = 8; // pixels

ort.env.wasm.numThreads = 1;

/** Say whether WebGPU has an adapter here. */
async function hasAdapter(): Promise<boolean> {
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<unknown> } };
  return Boolean(await gpu?.requestAdapter());
}

/** Train one pass; an error ends it, and is given by name beside what there is until then. */
async function train({ images, labels }: Samples, sessionOptions: SessionOptions) {
  const losses: number[] = [];
  const url = location.origin.replace(/^http/, "ws");
  const storage = new MemoryStorage();
  const client = await SplitClient.connect(url, { ort, storage, sessionOptions });
  const data = {
    image: { dims: [labels.length, 1, SIDE, SIDE], data: Float32Array.from(images) },
    labels: { dims: [labels.length], data: BigInt64Array.from(labels, BigInt) },
  };
  let error = "";
  try {
    await client.fit(data, { onStep: ({ loss }) => void losses.push(loss) });
  } catch (caught) {
    error = String(caught);
  }
  const state = Object.entries(client.state()).map(([name, array]) => {
    return [name, { dims: array.dims, data: Array.from(array.data, Number) }] as const;
  });
  await client.close();
  return { losses, error, state: Object.fromEntries(state) };
}

Object.assign(globalThis, { hasAdapter, train });
