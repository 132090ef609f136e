/**
 * Check received tensors before a step uses them: for NaN, infinity and gradients out of bounds.
 *
 * It knows arrays and numbers; which tensors are checked is the protocol's business.
 */

import { NormTooLarge, NotFinite } from "../errors.js";
import { findNotFinite } from "../tensors.js";
import type { NdArray } from "../tensors.js";

/**
 * Check that a floating-point array holds neither NaN nor infinity.
 *
 * @throws NotFinite: it does; it names the array and `where`.
 */
export function checkFinite(name: string, array: NdArray, where: string): void {
  if (findNotFinite(array) >= 0) throw new NotFinite(name, where);
}

/**
 * Check that the L2 norm of a floating-point array is at most `limit`.
 *
 * @throws NormTooLarge: it is not; it names the norm and the limit.
 */
export function checkNorm(name: string, array: NdArray, limit: number): void {
  if (array.dtype !== "F32" && array.dtype !== "F64") return;
  let square = 0;
  for (const value of array.data as Float32Array | Float64Array) square += value * value;
  if (Math.sqrt(square) > limit) throw new NormTooLarge(name, Math.sqrt(square), limit);
}
