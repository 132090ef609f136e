/**
 * The gate before ONNX Runtime: a stage's graph is read here first, and refused if it may harm.
 *
 * Graphs come from others, and ONNX Runtime is a large parser of untrusted bytes: nothing reaches
 * it but what `splitonnx cut` writes, known operators of known domains, tensors that hold what they
 * declare, no data outside, no functions, and sizes and nesting within bounds.  The rules are those
 * of the Python side.  How much memory running a graph takes is not known here.
 */

import { ForbiddenGraph } from "../errors.js";
import {
  MAX_ATTRIBUTES,
  MAX_DEPTH,
  MAX_ELEMENTS,
  MAX_FIELDS,
  MAX_NAMES,
  MAX_NAME_BYTES,
  MAX_NODES,
  MAX_RANK,
  MAX_TEXT_BYTES,
  MAX_TYPE_DEPTH,
} from "../graph_limits.js";
import * as operators from "../operators.js";
import { Malformed, Reader } from "./protobufs.js";
import type { Found, Place } from "./protobufs.js";
import * as schemas from "./schemas.js";

const FLATBUFFER = "ORTM"; // at byte 4 of ONNX Runtime's own format

/**
 * Check the bytes of a stage's graph; `stage` is its name for the error.
 *
 * @throws ForbiddenGraph: the graph is not one that `splitonnx cut` writes.
 */
export function checkGraph(stage: string, content: Uint8Array): void {
  const gate = new Gate(stage, content);
  if (isOrtFormat(content)) {
    gate.refuse("it is in ONNX Runtime's own format, which is run for who trusts its maker only");
  }
  try {
    gate.checkModel([0, content.length]);
  } catch (error) {
    if (!(error instanceof Malformed)) throw error;
    gate.refuse(error.message);
  }
}

/** Check whether ONNX Runtime would read these bytes as its own format; no ONNX graph has them. */
export function isOrtFormat(content: Uint8Array): boolean {
  return String.fromCharCode(...content.subarray(4, 8)) === FLATBUFFER;
}

/** The check of one graph: its reader, what is being looked at, what is still to be. */
class Gate {
  readonly #stage: string;
  readonly #reader: Reader;
  readonly #imported = new Set<string>(); // domains
  readonly #pending: (readonly [Place, number])[] = []; // bodies, and how deeply they are nested
  #subject = "the graph";
  #count = 0; // nodes and bodies so far
  #given = 0; // names

  constructor(stage: string, content: Uint8Array) {
    this.#stage = stage;
    this.#reader = new Reader(content, MAX_FIELDS);
  }

  refuse(reason: string): never {
    throw new ForbiddenGraph(this.#stage, this.#subject, reason);
  }

  checkModel(place: Place): void {
    let version = 0;
    for (const found of this.#reader.read(place, schemas.MODEL)) {
      if (found.name === "ir_version") version = found.value!;
      else if (found.name === "graph") this.#pending.push([found.place, 0]);
      else if (found.name === "opset") this.#checkOpset(found.place);
      else if (found.name !== "version") this.#checkOther(found);
    }
    if (!(version >= 1 && version <= operators.HIGHEST_IR_VERSION)) {
      this.refuse(`its IR version ${version} is none of 1 to ${operators.HIGHEST_IR_VERSION}`);
    }
    if (!this.#imported.has("")) this.refuse("it imports no opset of the standard operators");
    if (!this.#pending.length) this.refuse("it is empty");
    // No recursion: what nests deep must not end the process.
    for (let body = this.#pending.pop(); body; body = this.#pending.pop()) {
      this.#checkGraph(...body);
    }
  }

  #checkOpset(place: Place): void {
    let [domain, version] = ["", 0];
    for (const found of this.#reader.read(place, schemas.OPSET)) {
      if (found.name === "version") version = found.value!;
      else domain = this.#readName(found.place);
    }
    const own = domain === operators.TRAINING_DOMAIN;
    if (!own && !operators.STANDARD_DOMAINS.includes(domain)) {
      this.refuse(`it imports operators of the domain '${domain.slice(0, 80)}'`);
    }
    const highest = own ? operators.HIGHEST_TRAINING_OPSET : operators.HIGHEST_OPSET;
    if (!(version >= 1 && version <= highest)) {
      this.refuse(`its opset ${version} of '${domain}' is none of 1 to ${highest}`);
    }
    for (const name of own ? [domain] : operators.STANDARD_DOMAINS) this.#imported.add(name);
  }

  #checkGraph(place: Place, depth: number): void {
    const [results, tensors] = [new Set<string>(), new Set<string>()];
    const values = new Map(["input", "output", "value"].map((kind) => [kind, new Set<string>()]));
    for (const found of this.#reader.read(place, schemas.GRAPH)) {
      this.#subject = "the graph";
      const declared = values.get(found.name);
      if (found.name === "node") this.#checkNode(found.place, depth, results);
      else if (found.name === "initializer") this.#give(this.#checkTensor(found.place), tensors);
      else if (declared) this.#give(this.#checkValue(found.place), declared);
      else this.#checkOther(found);
    }
  }

  /** Note a name that may be given once; a graph with an output twice ends a process. */
  #give(name: string, given: Set<string>): void {
    if (given.has(name)) this.refuse(`the name '${name}' is given twice`);
    if (!name) return; // an optional result that is left out has none
    given.add(name);
    if (++this.#given > MAX_NAMES) this.refuse(`the graph defines more than ${MAX_NAMES} names`);
  }

  #countUp(): void {
    if (++this.#count > MAX_NODES) this.refuse(`the graph has more than ${MAX_NODES} nodes`);
  }

  #checkNode(place: Place, depth: number, results: Set<string>): void {
    this.#countUp();
    this.#subject = `node number ${this.#count}`;
    let [operator, domain] = ["", ""];
    let inputs = 0;
    const attributes: Place[] = [];
    for (const found of this.#reader.read(place, schemas.NODE)) {
      if (found.name === "argument") {
        this.#readName(found.place);
        inputs++;
      } else if (found.name === "result") this.#give(this.#readName(found.place), results);
      else if (found.name === "name") this.#subject = `node '${this.#readName(found.place)}'`;
      else if (found.name === "operator") operator = this.#readName(found.place);
      else if (found.name === "domain") domain = this.#readName(found.place);
      else if (found.name === "attribute") attributes.push(found.place);
      else this.#checkOther(found);
      if (attributes.length > MAX_ATTRIBUTES) {
        this.refuse(`it has more than ${MAX_ATTRIBUTES} attributes`);
      }
    }
    this.#checkOperator(operator, domain);
    for (const attribute of attributes) this.#checkAttribute(attribute, operator, depth);
    if (operator === "Scan") this.#checkScan(attributes, inputs);
  }

  /** Check the number of sequences: if there are fewer inputs, ONNX Runtime may crash. */
  #checkScan(attributes: readonly Place[], inputs: number): void {
    for (const attribute of attributes) {
      let label = "";
      for (const found of this.#reader.read(attribute, schemas.ATTRIBUTE)) {
        if (found.name === "name") label = this.#readName(found.place);
        else if (found.name === "integers" && label === "num_scan_inputs") {
          for (const count of this.#listNumbers(found)) {
            if (count >= 1 && count <= inputs) continue;
            this.refuse(`it reads ${count} sequences, but has ${inputs} inputs`);
          }
        }
      }
    }
  }

  #checkOperator(operator: string, domain: string): void {
    const [name, home] = [operator.slice(0, 80), domain.slice(0, 80)];
    if (!this.#imported.has(domain)) this.refuse(`its domain '${home}' is not imported`);
    if (operators.TRAINING_OPERATORS.has(operator)) return;
    if (domain === operators.TRAINING_DOMAIN || !operators.STANDARD_OPERATORS.has(operator)) {
      this.refuse(`'${name}' of the domain '${home}' is not an operator of a bundle`);
    }
  }

  #checkAttribute(place: Place, operator: string, depth: number): void {
    let label: string | undefined;
    for (const found of this.#reader.read(place, schemas.ATTRIBUTE)) {
      if (found.name === "name") label = this.#readName(found.place);
      else if (label === undefined) {
        // Serializers keep the order, and all that follows depends on it.
        this.refuse("the name of an attribute does not come first");
      } else this.#checkContent(found, label, operator, depth);
    }
  }

  #checkContent(found: Found, label: string, operator: string, depth: number): void {
    if (found.name === "integers") this.#checkIntegers(label, found);
    else if (found.name === "string") this.#checkString(found.place, operator);
    else if (found.name === "tensor") this.#checkTensor(found.place);
    else if (found.name === "type") this.#readType(found.place, 0);
    else if (found.name === "floats") countFixed(found.place, 4);
    else if (found.name === "graph") {
      this.#countUp();
      if (depth >= MAX_DEPTH) this.refuse(`bodies nest over ${MAX_DEPTH} deep`);
      this.#pending.push([found.place, depth + 1]);
    } else if (found.name !== "kind") this.#checkOther(found);
  }

  #checkString(place: Place, operator: string): void {
    this.#checkText(place);
    if (operator !== "Einsum") return;
    const text = String.fromCharCode(...this.#reader.content.subarray(...place).slice(0, 4096));
    if (place[1] - place[0] > 4096 || !operators.EQUATION.test(text)) {
      this.refuse("it has no equation of letters");
    }
  }

  #checkIntegers(label: string, found: Found): void {
    for (const value of this.#listNumbers(found)) {
      if (operators.WINDOWS.includes(label) && value < 1) this.refuse(`it has ${label} below 1`);
      if (operators.AXES.includes(label) && Math.abs(value) > MAX_RANK) {
        this.refuse(`its ${label} names a dimension that no tensor has`);
      }
      if (operators.KINDS.includes(label) && value && !schemas.TYPES.has(value)) {
        this.refuse(`its ${label} names an unknown element type`);
      }
      if (label === "batch_dims" && value < 0) this.refuse(`it has ${value} batch dimensions`);
    }
  }

  /** Check a tensor and return its name. */
  #checkTensor(place: Place): string {
    let label = "";
    const dims: number[] = [];
    let [dtype, outside] = [0, false];
    let raw: number | undefined;
    const counts = new Map<string, number>();
    for (const found of this.#reader.read(place, schemas.TENSOR)) {
      if (found.name === "dims") this.#extend(dims, found);
      else if (found.name === "dtype") dtype = found.value!;
      else if (found.name === "raw_data") raw = found.place[1] - found.place[0];
      else if (found.name === "name") {
        label = this.#readName(found.place);
        this.#subject = `tensor '${label}'`;
      } else if (found.name === "location") outside ||= found.value !== 0;
      else if (found.name === "external_data") outside = true;
      else if (found.name.endsWith("_data")) {
        counts.set(found.name, (counts.get(found.name) ?? 0) + this.#countValues(found));
      } else this.#checkOther(found);
    }
    if (outside) this.refuse("its data are outside the graph");
    this.#checkSize(dims, dtype, raw, counts);
    return label;
  }

  #countValues(found: Found): number {
    if (found.name === "float_data") return countFixed(found.place, 4);
    if (found.name === "double_data") return countFixed(found.place, 8);
    if (found.name === "string_data") this.#checkText(found.place);
    if (found.value !== null || found.name === "string_data") return 1;
    return this.#reader.countNumbers(found.place);
  }

  #extend(dims: number[], found: Found): void {
    for (const value of this.#listNumbers(found)) {
      dims.push(value);
      if (dims.length > MAX_RANK) this.refuse(`it has more than ${MAX_RANK} dimensions`);
    }
  }

  /** Hold what a tensor claims against the bytes, or the typed values, that it has. */
  #checkSize(
    dims: readonly number[],
    dtype: number,
    raw: number | undefined,
    counts: ReadonlyMap<string, number>,
  ): void {
    const type = schemas.TYPES.get(dtype) ?? this.refuse(`its element type ${dtype} is not known`);
    const most = dims.reduce((product, dim) => product * Math.max(dim, 1), 1);
    if (most > MAX_ELEMENTS || dims.some((dim) => dim < 0)) this.refuse(`its shape is [${dims}]`);
    const elements = dims.includes(0) ? 0 : most;
    const held = [...counts.values()].reduce((sum, count) => sum + count, 0);
    if (raw !== undefined) {
      const size = Math.ceil((elements * type.bits) / 8);
      if (held || raw !== size || dtype === schemas.STRINGS) {
        this.refuse(`it claims ${size} bytes, but holds ${raw}`);
      }
      return;
    }
    let claimed = schemas.COMPLEX.includes(dtype) ? elements * 2 : elements;
    if (type.bits === 4) claimed = Math.ceil(elements / 2);
    if ((counts.get(type.field) ?? 0) !== claimed || held !== claimed) {
      this.refuse(`it claims ${claimed} values, but holds ${held}`);
    }
  }

  /** Check what is declared of a value, and return its name. */
  #checkValue(place: Place): string {
    let label = "";
    for (const found of this.#reader.read(place, schemas.VALUE)) {
      if (found.name === "name") {
        label = this.#readName(found.place);
        this.#subject = `value '${label}'`;
      } else if (found.name === "type") this.#readType(found.place, 0);
      else this.#checkOther(found);
    }
    return label;
  }

  #readType(place: Place, depth: number): void {
    if (depth > MAX_TYPE_DEPTH) this.refuse(`its type nests over ${MAX_TYPE_DEPTH} deep`);
    for (const found of this.#reader.read(place, schemas.TYPE)) {
      if (found.name === "tensor") this.#checkTensorType(found.place);
      else if (found.name === "nested") {
        for (const inner of this.#reader.read(found.place, schemas.NESTED_TYPE)) {
          this.#readType(inner.place, depth + 1);
        }
      } else this.#checkOther(found);
    }
  }

  #checkTensorType(place: Place): void {
    for (const found of this.#reader.read(place, schemas.TENSOR_TYPE)) {
      if (found.name === "shape") this.#checkShape(found.place);
      else if (!schemas.TYPES.has(found.value!)) {
        this.refuse(`its element type ${found.value} is not known`);
      }
    }
  }

  #checkShape(place: Place): void {
    let rank = 0;
    for (const dimension of this.#reader.read(place, schemas.SHAPE)) {
      if (++rank > MAX_RANK) this.refuse(`it has more than ${MAX_RANK} dimensions`);
      for (const found of this.#reader.read(dimension.place, schemas.DIMENSION)) {
        if (found.value === null) this.#readName(found.place);
        else if (found.value < 0 || found.value > MAX_ELEMENTS) {
          this.refuse(`it has a dimension of ${found.value}`);
        }
      }
    }
  }

  /** Check what nothing depends on: comments, producers, pairs of texts. */
  #checkOther(found: Found): void {
    if (found.name === "text") this.#checkText(found.place);
    else if (found.name === "metadata") {
      for (const text of this.#reader.read(found.place, schemas.PAIR)) this.#checkText(text.place);
    } else if (found.value === null) this.#readName(found.place);
  }

  #checkText([start, stop]: Place): void {
    if (stop - start > MAX_TEXT_BYTES) this.refuse(`it has a text of ${stop - start} bytes`);
  }

  #readName(place: Place): string {
    return this.#reader.readText(place, MAX_NAME_BYTES);
  }

  /** Yield one number, or those of a packed list. */
  #listNumbers(found: Found): Iterable<number> {
    return found.value === null ? this.#reader.readNumbers(found.place) : [found.value];
  }
}

function countFixed([start, stop]: Place, width: number): number {
  if ((stop - start) % width) throw new Malformed("a list of numbers is cut short");
  return (stop - start) / width;
}
