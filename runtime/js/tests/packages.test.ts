/** The package as apps import it: built, by its name, without anything of ONNX Runtime in it. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync, readdirSync } from "node:fs";
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, join, relative } from "node:path";
import { test } from "node:test";

import * as source from "../src/index.js";
import { ROOT } from "./fixtures.js";

const HERE = join(ROOT, "runtime/js");
/** Not a literal, so that the compiler takes no types from what is only built. */
const NAME: string = "@splitonnx/client";
/** What the entry for Node alone may reach. */
const NODE_FILES = ["node.js", "storage/folders.js"];

test("the built package has all names, in both entries", async () => {
  const built = (await import(NAME)) as object;
  assert.deepEqual(Object.keys(built).sort(), Object.keys(source).sort());
  const node = (await import(`${NAME}/node`)) as object;
  assert.deepEqual(Object.keys(node).sort(), ["FolderStorage", "openFolder"]);
});

test("nothing is imported but the package's own files, and Node's in the entry for Node", () => {
  const dist = join(HERE, "dist");
  const names = readdirSync(dist, { recursive: true, encoding: "utf-8" });
  for (const name of names.filter((file) => file.endsWith(".js"))) {
    const text = readFileSync(join(dist, name), "utf-8");
    for (const [, from] of text.matchAll(/\bfrom "([^"]+)"/g)) {
      const target = from!.startsWith(".") ? relative(dist, join(dist, name, "..", from!)) : from!;
      const isNodes = target.startsWith("node:") || NODE_FILES.includes(target);
      assert.ok(isNodes ? NODE_FILES.includes(name) : names.includes(target), `${name}: ${from}`);
    }
  }
});

test("what is published is what is built, its types and the README", () => {
  const listed = execFileSync("npm", ["pack", "--dry-run", "--json", "--ignore-scripts"], { cwd: HERE });
  const [{ files }] = JSON.parse(listed.toString()) as [{ files: { path: string }[] }];
  const others = files.map(({ path }) => path).filter((path) => !path.startsWith("dist/"));
  assert.deepEqual(others.sort(), ["README.md", "package.json"]);
  assert.ok(files.some(({ path }) => path === "dist/index.d.ts"));
});

/** What a clone has not: what was installed or built. */
const NOT_CLONED = ["node_modules", "dist", "build"];

test("in a fresh clone the package is built before it is packed", async () => {
  const folder = await mkdtemp(join(tmpdir(), "splitonnx-clone-"));
  const listFiles = (place: string, ...options: string[]) => {
    const listed = execFileSync("npm", ["pack", "--json", "--silent", ...options], { cwd: place });
    const text = listed.toString();
    const [{ files }] = JSON.parse(text.slice(text.indexOf("[\n"))) as [{ files: { path: string }[] }];
    return files.map(({ path }) => path).sort();
  };
  try {
    const clone = join(folder, "js");
    await cp(HERE, clone, {
      recursive: true,
      filter: (path) => !NOT_CLONED.includes(basename(path)),
    });
    await symlink(join(HERE, "node_modules"), join(clone, "node_modules"));
    assert.ok(!readdirSync(clone).includes("dist"));
    const packed = listFiles(clone, "--pack-destination", folder);
    assert.ok(packed.includes("dist/index.js") && packed.includes("dist/index.d.ts"));
    assert.deepEqual(packed, listFiles(HERE, "--dry-run", "--ignore-scripts"));
    assert.ok(readdirSync(folder).some((name) => name.endsWith(".tgz")));
  } finally {
    await rm(folder, { recursive: true });
  }
});

const APP = `
import * as ort from "onnxruntime-web/wasm";
import { SplitClient, type History } from "@splitonnx/client";

export async function train(url: string): Promise<History> {
  const client = await SplitClient.connect(url, { ort });
  return client.fit({ x: { dims: [2, 1], data: new Float32Array(2) } }, { batchSize: 2 });
}
`;
const PROBE = `
import { SplitClient } from "@splitonnx/client";
import { FolderStorage } from "@splitonnx/client/node";
console.log(typeof SplitClient.connect, typeof FolderStorage);
`;

test("an app runs, type-checks and bundles the tarball that is published", async () => {
  const folder = await mkdtemp(join(tmpdir(), "splitonnx-app-"));
  const run = (command: string, ...options: string[]) => {
    return execFileSync(command, options, { cwd: folder, encoding: "utf-8" });
  };
  try {
    const pack = ["pack", "--silent", "--ignore-scripts", "--pack-destination", folder];
    const tarball = execFileSync("npm", pack, { cwd: HERE, encoding: "utf-8" }).trim();
    const place = join(folder, "node_modules/@splitonnx/client");
    await mkdir(place, { recursive: true });
    run("tar", "-xzf", tarball, "-C", place, "--strip-components", "1");
    for (const name of ["onnxruntime-common", "onnxruntime-web"]) {
      await symlink(join(HERE, "node_modules", name), join(folder, "node_modules", name));
    }
    await writeFile(join(folder, "package.json"), '{"type": "module"}');
    await writeFile(join(folder, "app.ts"), APP);
    await writeFile(join(folder, "probe.js"), PROBE);
    assert.equal(run("node", "probe.js").trim(), "function function");
    for (const resolution of ["bundler", "nodenext"]) {
      const module = resolution === "bundler" ? "esnext" : "nodenext";
      const options = ["--moduleResolution", resolution, "--module", module, "--target", "es2022"];
      const own = ["--strict", "--noEmit", "--lib", "es2023,dom,dom.iterable", "--types", ""];
      run(join(HERE, "node_modules/.bin/tsc"), ...options, ...own, "app.ts");
    }
    const bundle = ["--bundle", "--format=esm", "--platform=browser", "--outfile=app.js"];
    run(join(HERE, "node_modules/.bin/esbuild"), ...bundle, "--log-level=error", "app.ts");
    assert.match(readFileSync(join(folder, "app.js"), "utf-8"), /StaleConnection/);
  } finally {
    await rm(folder, { recursive: true });
  }
});
