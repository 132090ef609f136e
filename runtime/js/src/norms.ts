/**
 * What no training survives is refused before the step: NaN, infinity, gradients out of bounds.
 *
 * It knows arrays and numbers; which tensors are guarded is the protocol's business.
 */

import { NormTooLarge, NotFinite } from "./errors.js";
import type { NdArray } from "./tensors.js";

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
 * Raise where a floating-point array holds NaN or infinity, or its L2 norm is over `limit`.
 *
 * @throws NotFinite: it names the array and `where`.
 * @throws NormTooLarge: it names the norm and the limit.
 */
export function checkValues(name: string, array: NdArray, where: string, limit?: number): void {
  if (findNotFinite(array) >= 0) throw new NotFinite(name, where);
  if (limit === undefined || (array.dtype !== "F32" && array.dtype !== "F64")) return;
  let square = 0;
  for (const value of array.data as Float32Array | Float64Array) square += value * value;
  if (Math.sqrt(square) > limit) throw new NormTooLarge(name, Math.sqrt(square), limit);
}
