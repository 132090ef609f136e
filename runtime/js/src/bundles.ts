/**
 * The client's part of a cut model: its manifest, stage graphs and weights, from files or a server.
 *
 * What is read is checked against the manifest before anything uses it, and nothing larger is
 * taken than the manifest has room for.  This module runs no graph.
 */

import { decodeTensors } from "./codecs.js";
import { BundleError, ConnectionLost, FormatError, Unauthorized, quote } from "./errors.js";
import { hashBytes } from "./hashes.js";
import { decodeManifest, hasValidChecksum } from "./manifests.js";
import type { PartyManifest, StateSpec } from "./manifests.js";
import { DTYPES, checkArray, countElements, makeZeros } from "./tensors.js";
import type { Dtype, NdArrays } from "./tensors.js";

export const MANIFEST = "manifest.json";
export const WEIGHTS = "weights.safetensors";

/**
 * Bytes of a manifest; a large model's has some hundred thousand.  Python accepts 64 MiB: read as
 * JSON it comes to many times its size, which a server has room for and a phone's tab has not.
 */
export const MAX_MANIFEST = 16 << 20;
/**
 * Bytes of one stage's graph, which holds no weights.  Python accepts 2 GiB, where Protocol Buffers
 * end, and more than a phone's tab could hold twice, as bytes and in ONNX Runtime.
 */
export const MAX_GRAPH = 256 << 20;
/** Bytes of a tensor file's header; some hundred for each tensor. */
export const MAX_FILE_HEADER = 64 << 20;

/** Bytes of a fetched file, or the rest of it, that must come within {@link BLOCK_SECONDS}. */
const BLOCK = 1 << 20;
const BLOCK_SECONDS = 300;

const ALTERED = "it was altered since the bundle was written";

/** Reads one file of the part, of at most `limit` bytes. */
export type ReadFile = (name: string, limit: number) => Promise<Uint8Array>;

/**
 * Where the client's part is: the files of its folder by name, the address of the folder, or a
 * function that reads them.
 */
export type BundleSource = Readonly<Record<string, Uint8Array>> | string | ReadFile;

/** All that the client needs; `state` is what training starts from, the optimizer's zeros too. */
export interface PartyBundle {
  readonly manifest: PartyManifest;
  readonly graphs: ReadonlyMap<string, Uint8Array>;
  readonly state: NdArrays;
}

/** How a part is fetched. */
export interface FetchOptions {
  /** Sent to the server that has the files. */
  readonly token?: string | undefined;
  /** Seconds to wait for each MiB; 300 by default. */
  readonly blockSeconds?: number | undefined;
}

/**
 * Read the client's part.
 *
 * @throws BundleError: a file is missing, was altered or is too large, or it is not a client's part.
 * @throws FormatError: the manifest or the weights cannot be read as such.
 * @throws ConnectionLost, Unauthorized: it cannot be fetched, or comes too slowly.
 */
export async function loadBundle(
  source: BundleSource,
  options: FetchOptions = {},
): Promise<PartyBundle> {
  const read = makeReader(source, options);
  const content = await read(MANIFEST, MAX_MANIFEST);
  const manifest = decodeManifest(content, MANIFEST);
  if (!(await hasValidChecksum(content))) throw new BundleError(MANIFEST, ALTERED);
  if (manifest.party !== "client") {
    throw new BundleError(MANIFEST, `this is the part of '${manifest.party}', not the client's`);
  }
  if (manifest.target !== "portable") {
    throw new BundleError(
      MANIFEST,
      `this part is cut for '${manifest.target}'; cut it with the client target portable`,
    );
  }
  if (!/^[0-9a-f]{64}$/.test(manifest.digest)) {
    throw new FormatError(MANIFEST, "its digest is not 64 hexadecimal digits");
  }
  const graphs = await readGraphs(manifest, read);
  const initial = manifest.state.filter((spec) => spec.role !== "optimizer");
  const limit = initial.reduce((sum, spec) => sum + measure(spec), MAX_FILE_HEADER);
  const weights = await read(WEIGHTS, limit);
  // Bundles of before have no sum of them.
  if (manifest.weights && (await hashBytes(weights)) !== manifest.weights) {
    throw new BundleError(WEIGHTS, ALTERED);
  }
  const { tensors } = decodeState(WEIGHTS, weights, initial);
  const state = manifest.state.map(({ tensor }) => {
    const weight = tensors.get(tensor.name);
    // The manifest's reader saw to it that these are an element type and numbers.
    const zeros = () => makeZeros(tensor.dtype as Dtype, tensor.shape as readonly number[]);
    return [tensor.name, weight ?? zeros()] as const;
  });
  return { manifest, graphs, state: new Map(state) };
}

/**
 * Read the tensors that `declared` lists, as views of `content`, and the metadata.
 *
 * @throws FormatError: the bytes are not one whole, well-formed tensor file.
 * @throws BundleError: a tensor is missing, undeclared, or of another element type or shape.
 */
export function decodeState(
  source: string,
  content: Uint8Array,
  declared: readonly StateSpec[],
): { tensors: NdArrays; metadata: ReadonlyMap<string, string> } {
  const { tensors, metadata } = decodeFile(source, content);
  const names = new Set(declared.map((spec) => spec.tensor.name));
  const differing = [
    ...[...names].filter((name) => !tensors.has(name)),
    ...[...tensors.keys()].filter((name) => !names.has(name)),
  ];
  if (differing.length) {
    throw new BundleError(source, `it and the manifest differ in ${quote(differing.slice(0, 5))}`);
  }
  for (const { tensor } of declared) checkArray(tensors.get(tensor.name)!, tensor, new Map());
  return { tensors, metadata };
}

function decodeFile(source: string, content: Uint8Array): ReturnType<typeof decodeTensors> {
  try {
    return decodeTensors(content, MAX_FILE_HEADER);
  } catch (error) {
    if (!(error instanceof FormatError)) throw error;
    throw new FormatError(source, error.reason);
  }
}

async function readGraphs(
  manifest: PartyManifest,
  read: ReadFile,
): Promise<Map<string, Uint8Array>> {
  const used = new Set(manifest.phases.flatMap((phase) => phase.stages.map((s) => s.graph)));
  const undeclared = [...used].filter((name) => !manifest.files.has(name));
  if (undeclared.length) {
    throw new BundleError(MANIFEST, `it lacks the file ${quote(undeclared)}`);
  }
  const graphs = new Map<string, Uint8Array>();
  for (const [name, hash] of manifest.files) {
    const graph = await read(name, MAX_GRAPH);
    if ((await hashBytes(graph)) !== hash) {
      throw new BundleError(name, ALTERED);
    }
    graphs.set(name, graph);
  }
  return graphs;
}

function measure({ tensor }: StateSpec): number {
  const { BYTES_PER_ELEMENT } = DTYPES[tensor.dtype as Dtype];
  return countElements(tensor.shape as readonly number[]) * BYTES_PER_ELEMENT;
}

function makeReader(source: BundleSource, options: FetchOptions): ReadFile {
  const read = chooseReader(source, options);
  return async (name, limit) => {
    if (/[/\\]|^\.\.?$/.test(name)) {
      throw new BundleError(MANIFEST, `it names '${name}', which is not a plain name`);
    }
    const content = await read(name, limit);
    if (content.length > limit) {
      throw new BundleError(name, `it takes ${content.length} bytes, over the limit of ${limit}`);
    }
    return content;
  };
}

function chooseReader(source: BundleSource, options: FetchOptions): ReadFile {
  if (typeof source === "function") return source;
  if (typeof source === "string") {
    const base = source.endsWith("/") ? source : `${source}/`;
    return (name, limit) => fetchFile(base + encodeURIComponent(name), limit, options);
  }
  return async (name) => {
    if (!Object.hasOwn(source, name)) throw new BundleError(name, "it is missing");
    return source[name]!;
  };
}

/** Fetch a file, and stop as soon as it is larger than it may be, or comes too slowly. */
async function fetchFile(url: string, limit: number, options: FetchOptions): Promise<Uint8Array> {
  const { token, blockSeconds = BLOCK_SECONDS } = options;
  const ended = new AbortController();
  const late = () => ended.abort(`it sends less than a MiB within ${blockSeconds} s`);
  let timer = setTimeout(late, blockSeconds * 1000);
  const parts: Uint8Array[] = [];
  let size = 0;
  try {
    const response = await request(url, ended.signal, token);
    const reader = response.body!.getReader();
    for (let part = await readPart(reader, url); part; part = await readPart(reader, url)) {
      const before = size;
      size += part.length;
      parts.push(part);
      if (size > limit) {
        await reader.cancel();
        throw new BundleError(url, `it takes more bytes than the limit of ${limit}`);
      }
      if (Math.floor(size / BLOCK) === Math.floor(before / BLOCK)) continue;
      clearTimeout(timer);
      timer = setTimeout(late, blockSeconds * 1000);
    }
  } finally {
    clearTimeout(timer);
  }
  return join(parts, size);
}

function join(parts: readonly Uint8Array[], size: number): Uint8Array {
  const content = new Uint8Array(size);
  let end = 0;
  for (const part of parts) {
    content.set(part, end);
    end += part.length;
  }
  return content;
}

async function readPart(
  reader: ReadableStreamDefaultReader<Uint8Array>,
  url: string,
): Promise<Uint8Array | undefined> {
  try {
    return (await reader.read()).value;
  } catch (error) {
    throw new ConnectionLost(url, String(error));
  }
}

async function request(url: string, signal: AbortSignal, token?: string): Promise<Response> {
  const headers: Record<string, string> = token ? { Authorization: `Bearer ${token}` } : {};
  let response: Response;
  try {
    // A redirect would take the token, or the page's trust, to another address.
    response = await fetch(url, { headers, redirect: "error", signal });
  } catch (error) {
    throw new ConnectionLost(url, String(error));
  }
  if (response.status === 401 || response.status === 403) {
    throw new Unauthorized(url, response.status, response.statusText || "no token known there");
  }
  if (!response.ok) throw new BundleError(url, `HTTP ${response.status}; it is not to be had there`);
  return response;
}
