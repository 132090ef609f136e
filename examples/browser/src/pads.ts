/** The pad to draw on: pointers to strokes, on a canvas. */

import { drawStrokes } from "./drawings.js";
import type { Stroke } from "./drawings.js";

/** Canvas units of the pad's side, and of the pen. */
export const PAD = 280;
const PEN = 20;

/** Receives strokes of finger, pen or mouse; calls `onStroke` when one ends. */
export class Pad {
  readonly strokes: Stroke[] = [];
  readonly #canvas: HTMLCanvasElement;
  #current: Stroke | undefined;

  constructor(canvas: HTMLCanvasElement, onStroke: () => void) {
    this.#canvas = canvas;
    canvas.width = canvas.height = PAD * 2; // sharp on dense screens, too
    canvas.addEventListener("pointerdown", (event) => {
      if (!event.isPrimary || event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.#current = [this.#locate(event)];
      this.strokes.push(this.#current);
      this.draw();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.#current || !event.isPrimary) return;
      for (const part of event.getCoalescedEvents?.() ?? []) this.#current.push(this.#locate(part));
      this.#current.push(this.#locate(event));
      this.draw();
    });
    const end = () => {
      if (!this.#current) return;
      this.#current = undefined;
      onStroke();
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
  }

  clear(): void {
    this.strokes.length = 0;
    this.#current = undefined;
    this.draw();
  }

  draw(): void {
    const context = this.#canvas.getContext("2d")!;
    context.setTransform(2, 0, 0, 2, 0, 0);
    context.clearRect(0, 0, PAD, PAD);
    context.strokeStyle = getComputedStyle(this.#canvas).color;
    drawStrokes(context, this.strokes, PEN);
  }

  #locate({ clientX, clientY }: PointerEvent): { x: number; y: number } {
    const box = this.#canvas.getBoundingClientRect();
    const scale = PAD / box.width;
    return { x: (clientX - box.left) * scale, y: (clientY - box.top) * scale };
  }
}
