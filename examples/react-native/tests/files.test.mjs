/** State on a phone outlives an app that ends at any moment, on a file system as strict as iOS's. */

import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const { build } = createRequire(join(here, "../../../runtime/js/package.json"))("esbuild");

/** Files in memory, with the interface of react-native-fs; `globalThis.phone` holds them. */
const FILES = `
const act = (work) => async (...given) => {
  if (phone.left-- === 0) throw new Error("the app ended");
  return work(...given);
};
const need = (path) => {
  if (!phone.files.has(path)) throw new Error(path + " is not there");
};
export const DocumentDirectoryPath = "/documents";
export const MainBundlePath = "/app";
export const exists = act((path) => path === "/documents/splitonnx" || phone.files.has(path));
export const mkdir = act(() => undefined);
export const readdir = act((folder) =>
  [...phone.files.keys()].filter((path) => path.startsWith(folder)).map((path) => path.slice(folder.length + 1)));
export const readFile = act((path) => (need(path), phone.files.get(path)));
export const readFileAssets = act((path) => (need("assets/" + path), phone.files.get("assets/" + path)));
export const unlink = act((path) => (need(path), phone.files.delete(path)));
export const writeFile = (path, text) => {
  phone.files.set(path, text.slice(0, 4)); // all that is there if the app ends now
  return act(() => phone.files.set(path, text))();
};
export const moveFile = act((from, to) => {
  need(from);
  if (phone.files.has(to)) throw new Error(to + " is there already");
  phone.files.set(to, phone.files.get(from));
  phone.files.delete(from);
});
`;

const folder = mkdtempSync(join(tmpdir(), "splitonnx-"));
after(() => rmSync(folder, { recursive: true }));
mkdirSync(join(folder, "fakes"));
writeFileSync(join(folder, "fakes/files.mjs"), FILES);
writeFileSync(join(folder, "fakes/react-native.mjs"), `export const Platform = { OS: "ios" };`);
await build({
  entryPoints: [join(here, "../files.ts")],
  outfile: join(folder, "files.mjs"),
  bundle: true,
  format: "esm",
  alias: {
    "@dr.pogodin/react-native-fs": join(folder, "fakes/files.mjs"),
    "react-native": join(folder, "fakes/react-native.mjs"),
  },
});
const { FileStorage, readShipped } = await import(pathToFileURL(join(folder, "files.mjs")));

const use = (files = new Map()) => (globalThis.phone = { files, left: Infinity });
const [OLD, NEW] = [Uint8Array.from({ length: 70_000 }, (_, at) => at % 251), new Uint8Array(9)];

test("bytes come back as they were put, under names of any kind", async () => {
  use();
  const storage = new FileStorage();
  assert.equal(await storage.get("a/b"), undefined);
  assert.deepEqual(await storage.list(""), []);
  await storage.put("a/b", OLD);
  await storage.put("a/c", NEW);
  await storage.put("a/b", NEW);
  await storage.put("a/b", OLD);
  assert.deepEqual(await storage.get("a/b"), OLD);
  assert.deepEqual([...(await storage.list("a/"))].sort(), ["a/b", "a/c"]);
  await storage.delete("a/b");
  await storage.delete("a/b");
  assert.equal(await storage.get("a/b"), undefined);
  assert.deepEqual(await storage.list(""), ["a/c"]);
});

test("wherever the app ends while it writes, the old bytes or the new ones are there", async () => {
  const found = new Set();
  let ended = 0;
  for (; ; ended++) {
    use();
    await new FileStorage().put("state", OLD);
    phone.left = ended;
    const isDone = await new FileStorage().put("state", NEW).then(() => true, () => false);
    phone.left = Infinity;
    assert.deepEqual(await new FileStorage().list(""), ["state"]);
    const kept = await new FileStorage().get("state");
    assert.ok([OLD.length, NEW.length].includes(kept.length), `ended at ${ended}`);
    assert.deepEqual(kept, kept.length === OLD.length ? OLD : NEW);
    found.add(kept.length);
    await new FileStorage().put("state", OLD); // and it continues from there
    assert.deepEqual(await new FileStorage().get("state"), OLD);
    if (isDone) break;
  }
  assert.ok(ended > 5);
  assert.equal(found.size, 2);
});

test("the part that the app ships is read from its folder", async () => {
  const manifest = readFileSync(join(here, "../../../tests/vectors/tiny/manifest.json"));
  use(new Map([["/app/client/manifest.json", manifest.toString("base64")]]));
  assert.deepEqual(await readShipped("manifest.json"), new Uint8Array(manifest));
});
