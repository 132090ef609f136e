/**
 * Tensors as plain values, what is declared of them, and checking the ones against the others.
 *
 * Element types carry the names of the safetensors format (`F32`, `I64`, ...).  A dimension is a
 * number, a name or an expression of names (`"N"`, `"2*N + 1"`), each with one size throughout a
 * task, or `null` where nothing is known in advance.  This module knows nothing of ONNX Runtime.
 */

import { ArrayMismatch, ValueOutOfRange, flatten } from "./errors.js";
import {
  UNKNOWN,
  describeBound,
  describeLeast,
  describeSize,
  findUnnamed,
  fitsShape,
  listKeys,
} from "./expressions.js";
import type { Sizes } from "./expressions.js";

/** The elements of a tensor; 16-bit floats are their bits, truth values bytes of 0 and 1. */
export type Elements =
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | BigUint64Array
  | BigInt64Array
  | Float64Array;

interface ElementsConstructor {
  readonly BYTES_PER_ELEMENT: number;
  new (length: number): Elements;
  new (buffer: ArrayBufferLike, offset: number, length: number): Elements;
}

/** Element types that may travel or be stored, by their safetensors name; little-endian. */
export const DTYPES = {
  BOOL: Uint8Array,
  U8: Uint8Array,
  I8: Int8Array,
  U16: Uint16Array,
  I16: Int16Array,
  F16: Uint16Array,
  U32: Uint32Array,
  I32: Int32Array,
  F32: Float32Array,
  U64: BigUint64Array,
  I64: BigInt64Array,
  F64: Float64Array,
} as const satisfies Record<string, ElementsConstructor>;

export type Dtype = keyof typeof DTYPES;

/** A tensor as a value; `data` holds it row by row, and is not written to by this package. */
export interface NdArray {
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly data: Elements;
}

/** Arrays by name; a Map, since the names may come from others and be anything. */
export type NdArrays = ReadonlyMap<string, NdArray>;

/**
 * A tensor as declared; `bounds` is a half-open range for an integer tensor's values, and one more
 * value that is allowed, if there are three numbers.
 */
export interface TensorSpec {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly (number | string | null)[];
  readonly bounds: readonly number[] | null;
}

/** Check whether text names an element type. */
export function isDtype(name: string): name is Dtype {
  return Object.hasOwn(DTYPES, name);
}

/** Count elements. */
export function countElements(shape: readonly number[]): number {
  return shape.reduce((product, dim) => product * dim, 1);
}

/** Make a tensor of zeros. */
export function makeZeros(dtype: Dtype, shape: readonly number[]): NdArray {
  const kind: ElementsConstructor = DTYPES[dtype];
  return { dtype, shape, data: new kind(countElements(shape)) };
}

/** View bytes as a tensor's elements; they are copied only where they are not aligned. */
export function viewElements(bytes: Uint8Array, dtype: Dtype): Elements {
  const kind: ElementsConstructor = DTYPES[dtype];
  const aligned = bytes.byteOffset % kind.BYTES_PER_ELEMENT ? bytes.slice() : bytes;
  const length = bytes.byteLength / kind.BYTES_PER_ELEMENT;
  return new kind(aligned.buffer, aligned.byteOffset, length);
}

/** View a tensor's elements as bytes. */
export function viewBytes(data: Elements): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/** Describe a tensor or a declaration: `F32[32, 1, 8, 8]`. */
export function describe(tensor: { dtype: string; shape: TensorSpec["shape"] }): string {
  return `${tensor.dtype}[${tensor.shape.map((dim) => describeSize(dim ?? "?")).join(", ")}]`;
}

/** Select rows along the first dimension, in the order given. */
export function takeRows(array: NdArray, rows: ArrayLike<number>): NdArray {
  const width = countElements(array.shape.slice(1));
  const kind: ElementsConstructor = DTYPES[array.dtype];
  const data = new kind(rows.length * width);
  const [from, to] = [viewBytes(array.data), viewBytes(data)];
  const size = width * kind.BYTES_PER_ELEMENT;
  for (let index = 0; index < rows.length; index++) {
    const row = rows[index]! * size;
    to.set(from.subarray(row, row + size), index * size);
  }
  return { dtype: array.dtype, shape: [rows.length, ...array.shape.slice(1)], data };
}

/** Return the part of a tensor from `start` to `end` on an axis. */
export function sliceAxis(array: NdArray, axis: number, start: number, end: number): NdArray {
  const { dtype, shape } = array;
  const sliced = makeZeros(dtype, [...shape.slice(0, axis), end - start, ...shape.slice(axis + 1)]);
  const [from, to] = [viewBytes(array.data), viewBytes(sliced.data)];
  const blocks = countElements(shape.slice(0, axis));
  const [whole, part] = [from.length / blocks, to.length / blocks];
  const first = (whole / shape[axis]!) * start;
  for (let block = 0; block < blocks; block++) {
    const begin = block * whole + first;
    to.set(from.subarray(begin, begin + part), block * part);
  }
  return sliced;
}

/** Join tensors along an axis; numbers become one dimension. */
export function concatenate(parts: readonly NdArray[], axis: number): NdArray {
  const { dtype, shape: sizes } = parts[0]!;
  const count = parts.reduce((sum, { shape }) => sum + (shape[axis] ?? 1), 0);
  const shape = [...sizes.slice(0, axis), count, ...sizes.slice(axis + 1)];
  const joined = makeZeros(dtype, shape);
  const bytes = viewBytes(joined.data);
  const blocks = countElements(shape.slice(0, axis));
  let end = 0;
  for (let block = 0; block < blocks; block++) {
    for (const { data } of parts) {
      const size = data.byteLength / blocks;
      bytes.set(viewBytes(data).subarray(block * size, (block + 1) * size), end);
      end += size;
    }
  }
  return joined;
}

/** Find the first element that is NaN or infinite, or -1. */
export function findNotFinite({ dtype, data }: NdArray): number {
  if (dtype === "F16") {
    return (data as Uint16Array).findIndex((bits) => (bits & 0x7c00) === 0x7c00);
  }
  if (dtype !== "F32" && dtype !== "F64") return -1;
  const numbers = data as Float32Array | Float64Array;
  let sum = 0;
  // One pass without a branch: nothing but NaN and infinity gives anything but 0 here.
  for (let index = 0; index < numbers.length; index++) sum += numbers[index]! * 0;
  return sum === 0 ? -1 : numbers.findIndex((value) => !Number.isFinite(value));
}

/**
 * Raise unless `array` has the element type, shape and value range that `spec` declares.
 *
 * `sizes` holds those of the names seen so far in this task and is extended; a name that
 * takes a second size is a mismatch, and so is a size of 0 where the declaration names no number;
 * of a model's output, a dimension that nothing bound before may be 0.
 *
 * @throws ArrayMismatch: element type or shape differ.
 * @throws ValueOutOfRange: an integer is outside `spec.bounds`.
 */
export function checkArray(
  array: NdArray,
  spec: TensorSpec,
  sizes: Sizes,
  isOutput = false,
): void {
  if (array.dtype !== spec.dtype || !fitsShape(array.shape, spec.shape, sizes, isOutput)) {
    throw new ArrayMismatch(spec.name, describeExpected(array, spec, sizes), describe(array));
  }
  if (spec.bounds !== null) checkBounds(array, spec.name, spec.bounds);
}

function describeExpected({ shape }: NdArray, spec: TensorSpec, sizes: Sizes): string {
  const isEmpty = shape.includes(0);
  const dims = isEmpty ? spec.shape : spec.shape.map((dim) => findUnnamed(dim, sizes) ?? dim);
  const expected = flatten(describe({ dtype: spec.dtype, shape: dims }));
  const keys = spec.shape.flatMap((dim) => (typeof dim === "string" ? listKeys(dim) : []));
  const known = [...sizes].filter(([key]) => keys.includes(key) && !key.includes(UNKNOWN));
  const open = [...new Set(keys)].filter((key) => !sizes.has(key));
  const bound = [
    ...known.map(([key, size]) => describeBound(key, size)),
    ...open.flatMap((key) => describeLeast(key) ?? []),
  ];
  if (bound.length) return `${expected} where ${bound.map(flatten).join(", ")}`;
  return expected + (isEmpty && !spec.shape.includes(0) ? " without an empty dimension" : "");
}

function checkBounds(array: NdArray, name: string, bounds: readonly number[]): void {
  const [lower, upper, other] = bounds as [number, number, number?];
  for (const value of array.data) {
    // Numbers and big integers compare with each other exactly.
    const isWithin = value >= lower && value < upper;
    if (!isWithin && (other === undefined || Number(value) !== other)) {
      throw new ValueOutOfRange(name, value, lower, upper, other);
    }
  }
}
