/** Exports for mobile apps: graphs in ORT format run as the vectors say, for who trusts them. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { decodeTensors } from "../src/codecs.js";
import { Engine } from "../src/engine/engines.js";
import { ForbiddenGraph } from "../src/errors.js";
import { MAX_HEADER } from "../src/messages.js";
import { openFolder } from "../src/node.js";
import { ORT, ROOT, RUNTIMES, SESSION_OPTIONS, VECTORS, relate } from "./fixtures.js";

const scratch = mkdtempSync(join(tmpdir(), "splitonnx-"));
const folder = join(scratch, "client");
const python = process.env["SPLITONNX_PYTHON"] ?? join(ROOT, ".venv/bin/python");
const command = ["-m", "splitonnx", "export", join(VECTORS, "dropout/client"), "--for", "mobile"];
execFileSync(python, [...command, "-o", folder, "--quiet"], { cwd: ROOT });
after(() => rmSync(scratch, { recursive: true }));

test("a graph in ORT format is refused unless its maker is trusted", async () => {
  const party = await loadBundle(openFolder(folder));
  const graph = party.graphs.get("head.forward.ort")!;
  const wary = new Engine(ORT, SESSION_OPTIONS);
  await assert.rejects(wary.load("head.forward", graph), /own format, which is run for who trusts/);
  const trusting = new Engine(ORT, SESSION_OPTIONS, { trusted: true });
  await assert.rejects(trusting.load("head.forward", new Uint8Array(99)), ForbiddenGraph);
});

describe("every stage of an export gives what the vectors say", () => {
  const content = new Uint8Array(readFileSync(join(VECTORS, "stages.safetensors")));
  const { tensors } = decodeTensors(content, MAX_HEADER);
  for (const [name, ort] of RUNTIMES) {
    test(`under ${name}`, async () => {
      const party = await loadBundle(openFolder(folder));
      const engine = new Engine(ort, SESSION_OPTIONS, { trusted: true });
      const stages = party.manifest.phases.flatMap((phase) => phase.stages);
      for (const stage of stages) {
        assert.ok(stage.graph.endsWith(".ort"));
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
      }
      assert.equal(stages.length, 14);
      await engine.release();
    });
  }
});
