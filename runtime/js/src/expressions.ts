/**
 * Dimensions as text, `4*N + 1` or `(H + -1)//(2)`: read, computed, and held against sizes.
 *
 * A text is a sum of products of integers and *atoms*.  An atom is a name, or the quotient of two
 * sums, rounded down; it has one size throughout a task.  A text of another form is one atom.
 * `splitonnx/expressions.py` is the twin.  This module knows no tensor.
 */

/** Sizes by atom, or by the text of an expression whose atoms are not known. */
export type Sizes = Map<string, number>;

/** The largest size of a dimension that is declared as no number. */
export const LARGEST = 2 ** 31 - 1;

interface Atom {
  readonly text: string;
  /** What it is the quotient of. */
  readonly sides?: readonly [Terms, Terms];
}
interface Term {
  readonly factor: number;
  readonly atoms: readonly Atom[];
}
type Terms = readonly Term[];
type ReadonlySizes = ReadonlyMap<string, number>;

/** What every name contains whose size is unknown. */
export const UNKNOWN = "unk__";
const LESS_1 = "_less_1"; // the end of a name for a batch of 2 or more: N is `N_less_1 + 1`
const LONGEST = 2000; // characters; a longer text is one atom
const DEEPEST = 32; // quotients inside one another; what is deeper is one atom
const NAME = /^(?:unk__[^ \t\n\r\f\v*+()]+|[A-Za-z0-9_.]+)$/;
const NUMBER = /^-?[0-9]{1,15}$/; // they are exact
const MOST = 10_000; // texts that are kept as read; a bundle has far fewer

const known = new Map<string, Terms>();

/** Read a dimension as the products that add up to it. */
function parse(text: string): Terms {
  let terms = known.get(text);
  if (terms) return terms;
  terms = (text.length <= LONGEST && parseSum(text)) || [{ factor: 1, atoms: [{ text }] }];
  if (known.size < MOST) known.set(text, terms);
  return terms;
}

function parseSum(text: string): Terms | undefined {
  const terms: Term[] = [];
  for (const part of split(text, " + ")) {
    let factor = 1;
    const atoms: Atom[] = [];
    for (const one of split(part, "*")) {
      const read = readFactor(one.replace(/^ +| +$/g, ""));
      if (read === undefined) return undefined;
      if (typeof read === "number") factor *= read;
      else atoms.push(read);
    }
    terms.push({ factor, atoms });
  }
  return terms;
}

function readFactor(text: string): number | Atom | undefined {
  if (NUMBER.test(text)) return Number(text);
  if (NAME.test(text)) return { text };
  if (measureDepth(text) > DEEPEST) return undefined;
  const sides = split(text, "//");
  if (sides.length !== 2 || !sides.every((one) => one.startsWith("(") && one.endsWith(")"))) {
    return undefined;
  }
  const [left, right] = sides.map((side) => parseSum(side.slice(1, -1)));
  return left && right && { text, sides: [left, right] };
}

function measureDepth(text: string): number {
  let [depth, deepest] = [0, 0];
  for (const character of text) {
    if (character === "(") depth += 1;
    if (character === ")") depth -= 1;
    deepest = Math.max(deepest, depth);
  }
  return deepest;
}

/** Split a text at a sign outside all parentheses. */
function split(text: string, sign: string): string[] {
  const parts: string[] = [];
  let [depth, start] = [0, 0];
  for (let place = 0; place < text.length; place++) {
    if (text[place] === "(") depth += 1;
    if (text[place] === ")") depth -= 1;
    if (depth === 0 && place >= start && text.startsWith(sign, place)) {
      parts.push(text.slice(start, place));
      start = place + sign.length;
    }
  }
  return [...parts, text.slice(start)];
}

/** Compute a sum; `undefined` where an atom has no size, NaN where it is not an exact integer. */
function compute(terms: Terms, sizes: ReadonlySizes): number | undefined {
  let sum = 0;
  for (const { factor, atoms } of terms) {
    let product = factor;
    for (const atom of atoms) {
      const size = computeAtom(atom, sizes);
      if (size === undefined) return undefined;
      product *= size;
    }
    sum += Number.isSafeInteger(product) ? product : NaN;
  }
  return Number.isSafeInteger(sum) ? sum : NaN;
}

function computeAtom({ text, sides }: Atom, sizes: ReadonlySizes): number | undefined {
  const size = sizes.get(text);
  if (size !== undefined || !sides) return size;
  const [left, right] = [compute(sides[0], sizes), compute(sides[1], sizes)];
  if (left === undefined || right === undefined || right < 1) return undefined;
  return Math.floor(left / right);
}

/** Compute the only open atom of a sum from the sum's size, where a whole number solves it. */
function solve(terms: Terms, open: string, size: number, sizes: ReadonlySizes): number | undefined {
  const isOpen = ({ atoms }: Term) => atoms.some(({ text }) => text === open);
  const strip = ({ factor, atoms }: Term): Term => {
    return { factor, atoms: atoms.filter(({ text }) => text !== open) };
  };
  const slope = compute(terms.filter(isOpen).map(strip), sizes)!;
  const offset = compute(terms.filter((term) => !isOpen(term)), sizes)!;
  const solution = (size - offset) / slope;
  return Number.isSafeInteger(solution) ? solution : undefined;
}

/** Write a dimension for a reader: `N` in place of `N_less_1 + 1`, `?` if it is unknown. */
export function describeSize(dim: number | string): string {
  if (typeof dim === "number") return String(dim);
  if (dim.includes(UNKNOWN)) return "?";
  return dim.includes(LESS_1) ? describeTerms(parse(dim)) : dim;
}

/** Return whether a dimension is a sum of products that each have exactly one of the names. */
export function isMultiple(dim: string, names: readonly string[]): boolean {
  return parse(describeSize(dim)).every(({ atoms }) => {
    return atoms.filter(({ text }) => names.includes(text)).length === 1;
  });
}

function describeTerms(terms: Terms): string {
  const total = new Map<string, [names: readonly string[], factor: number]>();
  for (const { factor, atoms } of terms) {
    let products: [names: string[], factor: number][] = [[[], factor]];
    for (const { text, sides } of atoms) {
      const name = sides ? sides.map((side) => `(${describeTerms(side)})`).join("//") : text;
      const isLess = !sides && text.endsWith(LESS_1);
      products = products.flatMap(([names, own]): typeof products => {
        if (!isLess) return [[[...names, name], own]];
        return [[[...names, text.slice(0, -LESS_1.length)], own], [names, -own]];
      });
    }
    for (const [names, own] of products) {
      const key = names.sort().join("*");
      total.set(key, [names, (total.get(key)?.[1] ?? 0) + own]);
    }
  }
  const parts = [...total.values()].filter(([, factor]) => factor);
  const written = parts.map(([names, factor]) => {
    return (names.length && factor === 1 ? names : [String(factor), ...names]).join("*");
  });
  return written.join(" + ") || "0";
}

/** Write the size of a name for a reader. */
export function describeBound(name: string, size: number): string {
  if (!name.endsWith(LESS_1)) return `${name} = ${size}`;
  return `${name.slice(0, -LESS_1.length)} = ${size + 1}`;
}

/** Write the least size of a name for a reader, if it is more than 1. */
export function describeLeast(name: string): string | undefined {
  const isLess = NAME.test(name) && name.endsWith(LESS_1);
  return isLess ? `${name.slice(0, -LESS_1.length)} >= 2` : undefined;
}

/** Return the size of a dimension that no name describes, if it is known. */
export function findUnnamed(dim: number | string | null, sizes: ReadonlySizes): number | undefined {
  if (typeof dim !== "string" || !dim.includes(UNKNOWN)) return undefined;
  return sizes.get(dim) ?? compute(parse(dim), sizes);
}

/** List what may be bound for a dimension: its text, and its atoms. */
export function listKeys(dim: string): string[] {
  return [dim, ...parse(dim).flatMap(({ atoms }) => atoms.map(({ text }) => text))];
}

/**
 * Check whether a shape is as declared; if it is, add the sizes that it binds to `sizes`.
 *
 * A declared `null` is any size.  What is declared as no number is from 1 to {@link LARGEST}; of a
 * model's output, a dimension that nothing bound before may be 0.
 */
export function fitsShape(
  shape: readonly number[],
  declared: readonly (number | string | null)[],
  sizes: Sizes,
  isOutput = false,
): boolean {
  if (shape.length !== declared.length) return false;
  const bound = new Map(sizes);
  const [names, sums]: [string, number][][] = [[], []];
  for (const [axis, dim] of declared.entries()) {
    const size = shape[axis]!;
    const least = isOutput && dim !== null ? 0 : 1;
    if (typeof dim === "number" ? size !== dim : size < least || size > LARGEST) return false;
    if (typeof dim === "string") (isName(dim) ? names : sums)!.push([dim, size]);
  }
  // Expressions need the names.
  if (![...names!, ...sums!].every(([dim, size]) => bind(dim, size, bound, isOutput))) return false;
  if (bound.size > sizes.size && !isConsistent(bound)) return false;
  for (const [key, size] of bound) sizes.set(key, size);
  return true;
}

function bind(dim: string, size: number, sizes: Sizes, isOutput: boolean): boolean {
  const own = sizes.get(dim);
  if (own !== undefined) return own === size;
  const terms = parse(dim);
  const open = new Map<string, Atom>();
  for (const atom of terms.flatMap(({ atoms }) => atoms)) {
    if (computeAtom(atom, sizes) === undefined) open.set(atom.text, atom);
  }
  const [atom] = open.values();
  if (!atom) return compute(terms, sizes) === size;
  const count = (term: Term) => term.atoms.filter(({ text }) => text === atom.text).length;
  if (open.size > 1 || terms.some((term) => count(term) > 1)) {
    sizes.set(dim, size);
    return true;
  }
  const solution = solve(terms, atom.text, size, sizes);
  if (solution === undefined) return false; // no whole number solves it
  sizes.set(atom.text, solution);
  const least = atom.sides || isOutput ? 0 : 1;
  return solution >= least && solution <= LARGEST;
}

/** Check whether a dimension is an atom that is not computed from others. */
function isName(dim: string): boolean {
  const [term, ...more] = parse(dim);
  const [atom] = term!.atoms;
  return !more.length && atom?.text === dim && !atom.sides;
}

/** Hold what was bound whole against what its atoms were bound to since. */
function isConsistent(sizes: Sizes): boolean {
  for (const [text, size] of sizes) {
    if (isName(text)) continue;
    const others = new Map(sizes);
    others.delete(text);
    if ((compute(parse(text), others) ?? size) !== size) return false;
  }
  return true;
}
