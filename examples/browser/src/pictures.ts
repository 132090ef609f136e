/** Numbers as pictures: an image as the model sees it, an activation as the server does. */

import type { Activation } from "./messages.js";

const COLUMNS = 8; // maps in a row
const GAP = 1; // between two maps, in their pixels

/** Show a square image of numbers in [0, 1] as ink on nothing. */
export function drawImage(canvas: HTMLCanvasElement, image: ArrayLike<number>): void {
  const side = Math.sqrt(image.length);
  paint(canvas, side, side, (x, y) => image[y * side + x]!);
}

/** Show an activation's channels side by side, each brightest where it is largest. */
export function drawActivation(canvas: HTMLCanvasElement, { dims, data }: Activation): void {
  const [channels, height, width] = dims;
  const rows = Math.ceil(channels / COLUMNS);
  const most = data.reduce((largest, value) => Math.max(largest, Math.abs(value)), 1e-9);
  const wide = COLUMNS * (width + GAP) - GAP;
  paint(canvas, wide, rows * (height + GAP) - GAP, (x, y) => {
    const [column, row] = [Math.floor(x / (width + GAP)), Math.floor(y / (height + GAP))];
    const [left, top] = [x % (width + GAP), y % (height + GAP)];
    const channel = row * COLUMNS + column;
    if (left >= width || top >= height || channel >= channels) return 0;
    // a floor, so that a map that is all zeros is seen to be one
    return 0.08 + 0.92 * (Math.abs(data[(channel * height + top) * width + left]!) / most);
  });
}

/** Set a canvas's size in pixels; one that has it already is not laid out again. */
export function resize(canvas: HTMLCanvasElement, width: number, height: number): void {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
}

function paint(
  canvas: HTMLCanvasElement,
  width: number,
  height: number,
  shade: (x: number, y: number) => number,
): void {
  resize(canvas, width, height);
  const context = canvas.getContext("2d")!;
  const [red, green, blue] = readInk(canvas);
  const pixels = context.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const pixel = (y * width + x) * 4;
      pixels.data[pixel] = red;
      pixels.data[pixel + 1] = green;
      pixels.data[pixel + 2] = blue;
      pixels.data[pixel + 3] = 255 * shade(x, y);
    }
  }
  context.putImageData(pixels, 0, 0);
}

/** Return the canvas's colour in the page: red, green and blue, 0 to 255. */
function readInk(canvas: HTMLCanvasElement): [red: number, green: number, blue: number] {
  const [red = 0, green = 0, blue = 0] = getComputedStyle(canvas).color.match(/\d+/g) ?? [];
  return [Number(red), Number(green), Number(blue)];
}
