/** Digits that were drawn on a grid, as the model of `examples/digits.onnx` expects them. */

import type { Batch } from "@splitonnx/client";

/** Cells of a drawing along each side. */
export const SIDE = 8;
const CELLS = SIDE * SIDE;

/** Which cells are black, row by row, and the digit that they show. */
export interface Drawing {
  readonly cells: readonly boolean[];
  readonly digit: number;
}

export const BLANK: readonly boolean[] = new Array<boolean>(CELLS).fill(false);

/** Convert drawings to the arrays for training: `image` (N, 1, 8, 8) and `labels` (N). */
export function toBatch(drawings: readonly Drawing[]): Batch {
  const labels = BigInt64Array.from(drawings, ({ digit }) => BigInt(digit));
  return { ...toImages(drawings), labels: { type: "int64", dims: [drawings.length], data: labels } };
}

/** Convert drawings to the array for prediction: `image` (N, 1, 8, 8), 0 white and 1 black. */
export function toImages(drawings: readonly { readonly cells: readonly boolean[] }[]): Batch {
  const data = new Float32Array(drawings.length * CELLS);
  drawings.forEach(({ cells }, row) => data.set(cells.map(Number), row * CELLS));
  return { image: { type: "float32", dims: [drawings.length, 1, SIDE, SIDE], data } };
}
