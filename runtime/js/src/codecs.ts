/**
 * Tensors to bytes and back, in the layout of safetensors, for the wire and for weight files.
 *
 * A message is 8 bytes of header length (little-endian), a JSON header padded with spaces to a
 * multiple of 64 bytes, then the raw tensors.  The reader trusts nothing: every size is checked by
 * arithmetic before anything is looked at, the tensors must fill the bytes without gap, overlap or
 * rest.  This module knows neither messages nor bundles.
 */

import { decodeText, isRecord, parseJson } from "./decoders.js";
import { FormatError } from "./errors.js";
import { MAX_RANK } from "./graph_limits.js";
import { DTYPES, describe, isDtype, viewBytes, viewElements } from "./tensors.js";
import type { Dtype, NdArray, NdArrays } from "./tensors.js";

/** Bytes; the raw data start at a multiple of it, so that views of them are aligned. */
export const ALIGNMENT = 64;

const LENGTH = 8;
const METADATA = "__metadata__";

/**
 * Write tensors as one safetensors message; each is copied once.
 *
 * The larger element types come first, so that every tensor is aligned to its elements.
 */
export function encodeTensors(
  tensors: NdArrays,
  metadata?: Readonly<Record<string, string>>,
): Uint8Array<ArrayBuffer> {
  const header = new Map<string, unknown>(metadata ? [[METADATA, metadata]] : []);
  const ordered = [...tensors].sort(([, a], [, b]) => width(b.dtype) - width(a.dtype));
  let end = 0;
  for (const [name, { dtype, shape, data }] of ordered) {
    const start = end;
    end += data.byteLength;
    header.set(name, { dtype, shape, data_offsets: [start, end] });
  }
  const text = new TextEncoder().encode(JSON.stringify(Object.fromEntries(header)));
  const start = Math.ceil((LENGTH + text.length) / ALIGNMENT) * ALIGNMENT;
  const content = new Uint8Array(start + end);
  new DataView(content.buffer).setBigUint64(0, BigInt(start - LENGTH), true);
  content.fill(0x20, LENGTH, start);
  content.set(text, LENGTH);
  let place = start;
  for (const [, { data }] of ordered) {
    content.set(viewBytes(data), place);
    place += data.byteLength;
  }
  return content;
}

/**
 * Read tensors, as views of `content`, and the metadata; the header may take `maxHeader` bytes.
 *
 * @throws FormatError: the bytes are anything but one whole, well-formed message.
 */
export function decodeTensors(
  content: Uint8Array,
  maxHeader: number,
): { tensors: Map<string, NdArray>; metadata: Map<string, string> } {
  const { header, start } = readHeader(content, maxHeader);
  const metadata = checkMetadata(header.get(METADATA));
  header.delete(METADATA);
  const entries = [...header].map(([name, entry]) => checkEntry(name, entry));
  // Empty tensors come before what starts where they do.
  const ordered = [...entries].sort((a, b) => a.start - b.start || a.end - b.end);
  const data = content.subarray(start);
  let end = 0;
  for (const entry of ordered) {
    if (entry.start !== end) {
      throw malformed(`tensor '${entry.name}' starts at byte ${entry.start} instead of ${end}`);
    }
    end = entry.end;
    if (end > data.length) {
      throw malformed(`tensor '${entry.name}' ends at byte ${end} of ${data.length}`);
    }
  }
  if (end !== data.length) throw malformed(`${data.length - end} bytes follow the last tensor`);
  return { tensors: new Map(entries.map((entry) => [entry.name, view(data, entry)])), metadata };
}

interface Entry {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly start: number;
  readonly end: number;
}

function width(dtype: Dtype): number {
  return DTYPES[dtype].BYTES_PER_ELEMENT;
}

function malformed(reason: string): FormatError {
  return new FormatError("not a well-formed tensor message", reason);
}

function readHeader(
  content: Uint8Array,
  maxHeader: number,
): { header: Map<string, unknown>; start: number } {
  if (content.length < LENGTH) throw malformed(`${content.length} bytes are not a header`);
  const length = new DataView(content.buffer, content.byteOffset).getBigUint64(0, true);
  if (length > maxHeader) {
    throw malformed(`its header of ${length} bytes is over the limit of ${maxHeader}`);
  }
  const start = LENGTH + Number(length);
  if (start > content.length) throw malformed(`its header of ${length} bytes is cut short`);
  if (content[LENGTH] !== 0x7b || !length) throw malformed("its header is not a JSON object");
  try {
    const text = decodeText(content.subarray(LENGTH, start));
    const header = parseJson(text);
    // Read as a number, 1.0 is 1.
    if (/[.eE]/.test(text.replace(/"(?:[^"\\]|\\.)*"/g, ""))) {
      throw malformed("it holds other numbers than integers");
    }
    return { header: new Map(Object.entries(header as object)), start }; // it starts with a brace
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw malformed(`its header is not JSON (${error.message})`);
  }
}

function checkMetadata(metadata: unknown = {}): Map<string, string> {
  const pairs = isRecord(metadata) ? Object.entries(metadata) : [["", null] as const];
  return new Map(
    pairs.map(([key, value]) => {
      if (typeof value !== "string") throw malformed("its metadata do not map strings to strings");
      return [key, value];
    }),
  );
}

function isSize(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function checkEntry(name: string, entry: unknown): Entry {
  const fields = isRecord(entry) ? Object.keys(entry).sort().join() : "";
  if (!isRecord(entry) || fields !== "data_offsets,dtype,shape") {
    throw malformed(`tensor '${name}' has the fields '${fields}'`);
  }
  const { dtype, shape, data_offsets: offsets } = entry;
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize)) {
    throw malformed(`tensor '${name}' has no valid offsets`);
  }
  if (typeof dtype !== "string" || !isDtype(dtype)) {
    throw malformed(`tensor '${name}' has the unknown element type ${JSON.stringify(dtype)}`);
  }
  if (!Array.isArray(shape) || shape.length > MAX_RANK || !shape.every(isSize)) {
    throw malformed(`tensor '${name}' has no valid shape`);
  }
  const [start, end] = offsets as [number, number];
  const size = measure(name, dtype, shape);
  if (end - start !== size) {
    throw malformed(`tensor '${name}' takes ${end - start} bytes instead of ${size}`);
  }
  return { name, dtype, shape, start, end };
}

/** Compute a tensor's bytes; what no memory holds is refused, an empty tensor of it too. */
function measure(name: string, dtype: Dtype, shape: readonly number[]): number {
  let most = width(dtype);
  for (const dim of shape) {
    most *= Math.max(dim, 1);
    if (most > Number.MAX_SAFE_INTEGER) {
      throw malformed(`tensor '${name}' has a shape that no memory holds`);
    }
  }
  return shape.includes(0) ? 0 : most;
}

function view(data: Uint8Array, { name, dtype, shape, start, end }: Entry): NdArray {
  const array = { dtype, shape, data: viewElements(data.subarray(start, end), dtype) };
  if (dtype === "BOOL" && (array.data as Uint8Array).some((value) => value > 1)) {
    throw malformed(`tensor '${name}' (${describe(array)}) holds neither 0 nor 1`);
  }
  return array;
}
