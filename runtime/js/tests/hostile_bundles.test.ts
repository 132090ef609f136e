/** Bundles that are not what they say: clear errors, before anything is used. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import type { Server } from "node:http";
import { after, before, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { encodeTensors } from "../src/codecs.js";
import { hashBytes } from "../src/hashes.js";
import * as client from "../src/index.js";
import { ORT } from "./fixtures.js";
import { DATA, FILES, Liar, MANIFEST } from "./liars.js";
import { openSocket } from "./peers.js";

/** Flip a bit of the last value. */
function flip(content: Uint8Array): Uint8Array {
  const flipped = content.slice();
  flipped[flipped.length - 2]! ^= 1;
  return flipped;
}

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
        assert.match(error.message, /sends less than a MiB within 0.2 s/);
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
