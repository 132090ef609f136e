/** Curves over steps, drawn on a canvas in the page's own colours. */

import { resize } from "./pictures.js";

export interface Point {
  readonly step: number;
  readonly value: number;
}

export interface Curves {
  /** One value a step: drawn faintly, and smoothed over it. */
  readonly noisy: readonly Point[];
  /** Few values, drawn as dots on a line. */
  readonly dots?: readonly Point[];
  /** The value axis: from 0 to this, or as far as the values reach. */
  readonly top?: number;
  readonly format: (value: number) => string;
}

const MARGIN = { left: 46, right: 12, top: 10, bottom: 22 };
const SMOOTHING = 0.8; // the share that a smoothed value keeps of those before it
const MOST = 200; // points of a line; more cannot be told apart on a phone

interface Frame {
  readonly context: CanvasRenderingContext2D;
  readonly width: number;
  readonly height: number;
  readonly x: (step: number) => number;
  readonly y: (value: number) => number;
}

/** Smooth values as they come: an exponential mean without the bias of its beginning. */
export function smooth(points: readonly Point[]): Point[] {
  let [sum, weight] = [0, 0];
  return points.map(({ step, value }) => {
    sum = sum * SMOOTHING + value * (1 - SMOOTHING);
    weight = weight * SMOOTHING + (1 - SMOOTHING);
    return { step, value: sum / weight };
  });
}

/** Redraw the curves, at the size that the canvas has on the page. */
export function drawCurves(canvas: HTMLCanvasElement, curves: Curves): void {
  const style = getComputedStyle(canvas);
  const colour = (name: string) => style.getPropertyValue(name).trim();
  const frame = makeFrame(canvas, curves);
  drawAxes(frame, curves, colour);
  const { noisy, dots = [] } = curves;
  drawLine(frame, thin(noisy), { colour: colour("--curve-faint"), width: 1 });
  drawLine(frame, thin(smooth(noisy)), { colour: colour("--curve"), width: 2 });
  drawLine(frame, dots, { colour: colour("--dots"), width: 2 });
  for (const { step, value } of dots) {
    frame.context.beginPath();
    frame.context.arc(frame.x(step), frame.y(value), 3.5, 0, 2 * Math.PI);
    frame.context.fillStyle = colour("--dots");
    frame.context.fill();
  }
}

function makeFrame(canvas: HTMLCanvasElement, { noisy, top }: Curves): Frame {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = window.devicePixelRatio || 1;
  resize(canvas, Math.round(width * ratio), Math.round(height * ratio));
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const first = noisy[0]?.step ?? 0;
  const last = Math.max(noisy.at(-1)?.step ?? 0, first + 20);
  const most = top ?? Math.max(1, ...thin(noisy).map((point) => point.value));
  const [left, right] = [MARGIN.left, width - MARGIN.right];
  const [above, below] = [MARGIN.top, height - MARGIN.bottom];
  return {
    context,
    width,
    height,
    x: (step) => left + ((step - first) / (last - first)) * (right - left),
    y: (value) => below - (Math.min(value, most) / most) * (below - above),
  };
}

function drawAxes(frame: Frame, curves: Curves, colour: (name: string) => string): void {
  const { context, width, height, x, y } = frame;
  const first = curves.noisy[0]?.step ?? 0;
  const last = Math.max(curves.noisy.at(-1)?.step ?? 0, first + 20);
  const most = curves.top ?? Math.max(1, ...thin(curves.noisy).map((point) => point.value));
  context.font = "12px system-ui, sans-serif";
  context.fillStyle = colour("--muted");
  context.strokeStyle = colour("--line");
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of [0, most / 2, most]) {
    const level = Math.round(y(value)) + 0.5;
    context.beginPath();
    context.moveTo(MARGIN.left, level);
    context.lineTo(width - MARGIN.right, level);
    context.stroke();
    context.fillText(curves.format(value), MARGIN.left - 6, level);
  }
  context.textBaseline = "alphabetic";
  context.fillText(`step ${last}`, x(last), height - 5);
  context.textAlign = "left";
  context.fillText(String(first), x(first), height - 5);
}

function drawLine(
  { context, x, y }: Frame,
  points: readonly Point[],
  { colour, width }: { colour: string; width: number },
): void {
  context.beginPath();
  points.forEach(({ step, value }, index) => {
    if (index) context.lineTo(x(step), y(value));
    else context.moveTo(x(step), y(value));
  });
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.lineJoin = "bevel";
  context.stroke();
}

/** Leave points out where there are more than can be seen; the last stays. */
function thin(points: readonly Point[]): readonly Point[] {
  if (points.length <= MOST) return points;
  const every = Math.ceil(points.length / MOST);
  return points.filter((_, index) => (points.length - 1 - index) % every === 0);
}
