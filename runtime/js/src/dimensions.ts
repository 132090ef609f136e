/**
 * Sizes of tensors against what is declared of them: numbers, names, and sums of products of names.
 *
 * A name, an *atom*, stands for one size throughout a task; `2*N + 1` is computed from it.  What
 * cannot be computed yet is bound as a whole, by its text.  This module knows no tensor.
 */

/** Sizes by atom, or by the text of an expression. */
export type Bindings = Map<string, number>;

/** The largest size of a dimension that is no number. */
export const LARGEST = 2 ** 31 - 1;

interface Term {
  readonly factor: number;
  readonly atoms: readonly string[];
}

const FACTOR = "[\\p{L}\\p{N}_.]+";
const PRODUCT = `${FACTOR}(?: ?[*] ?${FACTOR})*`;
const SUM = new RegExp(`^${PRODUCT}(?: [+] ${PRODUCT})*$`, "u");

const parsed = new Map<string, readonly Term[]>();

/** Read a sum of products; what is none is one atom, name and all. */
function parse(text: string): readonly Term[] {
  const known = parsed.get(text);
  if (known) return known;
  const terms = SUM.test(text)
    ? text.split(" + ").map(parseProduct)
    : [{ factor: 1, atoms: [text] }];
  if (parsed.size < 10_000) parsed.set(text, terms); // a bundle has far fewer
  return terms;
}

function parseProduct(text: string): Term {
  const factors = text.split("*").map((factor) => factor.trim());
  const isNumber = (factor: string) => /^[0-9]+$/.test(factor);
  return {
    factor: factors.filter(isNumber).reduce((product, factor) => product * Number(factor), 1),
    atoms: factors.filter((factor) => !isNumber(factor)),
  };
}

function isAtom(terms: readonly Term[]): boolean {
  return terms.length === 1 && terms[0]!.factor === 1 && terms[0]!.atoms.length === 1;
}

/** List the keys under which a dimension may be bound: its text, and its atoms. */
export function listKeys(dim: string): string[] {
  return [dim, ...parse(dim).flatMap((term) => term.atoms)];
}

/**
 * Say whether a shape is as declared, where `bindings` hold; they are extended where it is.
 *
 * A declared `null` is any size.  What is no declared number is from 1 to {@link LARGEST}.
 */
export function fitsShape(
  shape: readonly number[],
  declared: readonly (number | string | null)[],
  bindings: Bindings,
): boolean {
  if (shape.length !== declared.length) return false;
  const bound = new Map(bindings);
  const sums: [text: string, terms: readonly Term[], size: number][] = [];
  for (const [axis, dim] of declared.entries()) {
    const size = shape[axis]!;
    if (typeof dim === "number") {
      if (dim !== size) return false;
      continue;
    }
    if (size < 1 || size > LARGEST) return false;
    if (dim === null) continue;
    const terms = parse(dim);
    if (!isAtom(terms)) sums.push([dim, terms, size]);
    else if (!bind(terms[0]!.atoms[0]!, size, bound)) return false;
  }
  for (const sum of sums) if (!solve(...sum, bound)) return false;
  // What was bound last may tell the size of what came before.
  for (const [, terms, size] of sums) if ((compute(terms, bound) ?? size) !== size) return false;
  for (const [key, size] of bound) bindings.set(key, size);
  return true;
}

function bind(key: string, size: number, bound: Bindings): boolean {
  if ((bound.get(key) ?? size) !== size) return false;
  bound.set(key, size);
  return true;
}

/** Compute a sum, if all of its atoms are bound; sums over 2^53 are none that a size equals. */
function compute(terms: readonly Term[], bound: Bindings): number | undefined {
  let sum = 0;
  for (const { factor, atoms } of terms) {
    let product = factor;
    for (const atom of atoms) {
      const size = bound.get(atom);
      if (size === undefined) return undefined;
      product *= size;
    }
    sum += product;
  }
  return sum;
}

/** Hold a size against a sum: its text, its value, or the one atom that it leaves open. */
function solve(text: string, terms: readonly Term[], size: number, bound: Bindings): boolean {
  if ((bound.get(text) ?? size) !== size) return false;
  const isOpen = (atom: string) => !bound.has(atom);
  const open = new Set(terms.flatMap(({ atoms }) => atoms.filter(isOpen)));
  if (!open.size) return compute(terms, bound) === size;
  const [atom] = open as unknown as Iterable<string>;
  const isLinear = terms.every(({ atoms }) => atoms.filter(isOpen).length <= 1);
  if (open.size > 1 || !isLinear) return bind(text, size, bound);
  const [without, of] = [terms.filter((term) => !term.atoms.some(isOpen)), [] as Term[]];
  for (const { factor, atoms } of terms.filter((term) => term.atoms.some(isOpen))) {
    of.push({ factor, atoms: atoms.filter((one) => one !== atom) });
  }
  const found = (size - compute(without, bound)!) / compute(of, bound)!;
  return Number.isInteger(found) && found >= 1 && found <= LARGEST && bind(atom!, found, bound);
}
