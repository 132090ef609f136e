/**
 * Digits drawn by hand: strokes to 8x8 pixels, and the keeping of those that were given a label.
 *
 * The model's digits were made thus: a bitmap of 32x32, of which each 4x4 block became a number of
 * dark pixels (Alpaydin and Kaynak, 1998).
 */

import type { Samples } from "./messages.js";

export const SIDE = 8;
export const PIXELS = SIDE * SIDE;
/** One's own drawings are few among the others: each counts as so many. */
export const WEIGHT = 10;
/** Drawings that are kept; beyond it nothing is. */
export const MAX_DRAWINGS = 500;

const BITMAP = 32;
const INK = 4; // the pen's width, in pixels of the bitmap
const DARK = 128; // of 255
const KEY = "splitonnx-drawings";

export interface Point {
  readonly x: number;
  readonly y: number;
}
export type Stroke = Point[];

export interface Drawing {
  readonly label: number;
  /** Dark pixels of each block, 0 to 16. */
  readonly blocks: readonly number[];
}

/** Count the dark pixels of each block, the drawing brought to the bitmap's size. */
export function countBlocks(strokes: readonly Stroke[]): number[] {
  const { data } = rasterize(strokes).getImageData(0, 0, BITMAP, BITMAP);
  const blocks = new Array<number>(PIXELS).fill(0);
  const step = BITMAP / SIDE;
  for (let y = 0; y < BITMAP; y++) {
    for (let x = 0; x < BITMAP; x++) {
      const block = Math.floor(y / step) * SIDE + Math.floor(x / step);
      if (data[(y * BITMAP + x) * 4 + 3]! >= DARK) blocks[block]! += 1;
    }
  }
  return blocks;
}

function rasterize(strokes: readonly Stroke[]): CanvasRenderingContext2D {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = BITMAP;
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  const points = strokes.flat();
  const [left, right] = extent(points.map((point) => point.x));
  const [top, bottom] = extent(points.map((point) => point.y));
  const scale = (BITMAP - INK) / Math.max(right - left, bottom - top, 1);
  context.translate(BITMAP / 2, BITMAP / 2);
  context.scale(scale, scale);
  context.translate(-(left + right) / 2, -(top + bottom) / 2);
  drawStrokes(context, strokes, INK / scale);
  return context;
}

/** Draw strokes with a round pen. */
export function drawStrokes(
  context: CanvasRenderingContext2D,
  strokes: readonly Stroke[],
  width: number,
): void {
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = width;
  for (const [first, ...rest] of strokes) {
    if (!first) continue;
    context.beginPath();
    context.moveTo(first.x, first.y);
    for (const { x, y } of rest.length ? rest : [first]) context.lineTo(x, y);
    context.stroke();
  }
}

function extent(values: readonly number[]): readonly [least: number, most: number] {
  return [Math.min(...values), Math.max(...values)];
}

/** Convert blocks of 0 to 16 to the model's input. */
export function toImage(blocks: ArrayLike<number>): Float32Array {
  return Float32Array.from(blocks, (count) => count / 16);
}

/** The drawings kept in this browser, oldest first. */
export function readDrawings(): Drawing[] {
  try {
    const found: unknown = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter(isDrawing) : [];
  } catch {
    return [];
  }
}

/** Keep the drawings in this browser. */
export function keepDrawings(drawings: readonly Drawing[]): void {
  localStorage.setItem(KEY, JSON.stringify(drawings));
}

function isDrawing(value: Partial<Drawing> | null): value is Drawing {
  return (
    Number.isInteger(value?.label) && Array.isArray(value?.blocks) && value.blocks.length === PIXELS
  );
}

/** Put one's own drawings behind other samples, each as many times as it counts. */
export function addDrawings(samples: Samples, drawings: readonly Drawing[]): Samples {
  const rows = drawings.flatMap((drawing) => new Array<Drawing>(WEIGHT).fill(drawing));
  const count = samples.labels.length;
  const images = new Float32Array((count + rows.length) * PIXELS);
  const labels = new BigInt64Array(count + rows.length);
  images.set(samples.images);
  labels.set(samples.labels);
  rows.forEach(({ label, blocks }, row) => {
    images.set(toImage(blocks), (count + row) * PIXELS);
    labels[count + row] = BigInt(label);
  });
  return { images, labels };
}

/**
 * Fetch the digits that come with the page, to train on and held out.
 *
 * The file: two 32-bit counts, little-endian; then each digit's 64 blocks and its label, a byte
 * each.
 */
export async function fetchDigits(url: string): Promise<{ training: Samples; heldOut: Samples }> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: HTTP ${response.status}`);
  const content = new DataView(await response.arrayBuffer());
  const trained = content.getUint32(0, true);
  const held = content.getUint32(4, true);
  return { training: readRows(content, 0, trained), heldOut: readRows(content, trained, held) };
}

function readRows(content: DataView, first: number, count: number): Samples {
  const images = new Float32Array(count * PIXELS);
  const labels = new BigInt64Array(count);
  for (let row = 0; row < count; row++) {
    const start = 8 + (first + row) * (PIXELS + 1);
    for (let pixel = 0; pixel < PIXELS; pixel++) {
      images[row * PIXELS + pixel] = content.getUint8(start + pixel) / 16;
    }
    labels[row] = BigInt(content.getUint8(start + PIXELS));
  }
  return { images, labels };
}
