/**
 * What no training survives is refused before the step: NaN, infinity, gradients out of bounds.
 *
 * It knows arrays and numbers; which tensors are guarded is the protocol's business.
 */

import { NormTooLarge, NotFinite } from "../errors.js";
import { findNotFinite } from "../tensors.js";
import type { NdArray } from "../tensors.js";

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
