/**
 * Draws what is new, after taps and strokes.
 *
 * On a slow phone all that a step of training changes, drawn at once, would keep a tap waiting. So
 * it is drawn one thing a frame, and nothing for a moment after the page was touched.
 */

/** Milliseconds that nothing is drawn after a finger comes down or goes up. */
const REST = 100;

/** What is yet to be drawn, by name. */
const undrawn = new Map<string, () => void>();
let touched = -Infinity;

for (const kind of ["pointerdown", "pointerup"]) {
  addEventListener(kind, () => (touched = performance.now()), { capture: true, passive: true });
}

/** Draw a thing with one of the next frames; of its name only the newest is drawn. */
export function draw(name: string, show: () => void): void {
  if (!undrawn.size) requestAnimationFrame(drawNext);
  undrawn.set(name, show);
}

function drawNext(): void {
  const rest = touched + REST - performance.now();
  if (rest > 0) {
    setTimeout(() => requestAnimationFrame(drawNext), rest);
    return;
  }
  const [next] = undrawn;
  if (!next) return;
  const [name, show] = next;
  undrawn.delete(name);
  if (undrawn.size) requestAnimationFrame(drawNext);
  show();
}
