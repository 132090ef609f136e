/**
 * The messages of ONNX as far as a bundle's graphs have them, for `protobufs` to read.
 *
 * What is in no table, or has a refusal, is refused: fields that came later, and all that lets
 * a graph bring code, structure or data of its own.  Fields that the gate treats alike bear one
 * name.  (Source: github.com/onnx/onnx, onnx/onnx-ml.proto, IR version 10.)
 */

import { BYTES, FIXED32, FIXED64, NUMBER, field, makeTable } from "./protobufs.js";
import type { Field } from "./protobufs.js";

const NO_FUNCTIONS = "it has functions of its own, which bundles never have";

function several(name: string, number: number): Field {
  return field(name, number, BYTES, { repeated: true });
}

/** Numbers of a repeated field are written one by one, or all together as bytes. */
function numbers(wire: number, name: string, number: number): Field[] {
  return [field(name, number, wire, { repeated: true }), several(name, number)];
}

function refused(name: string, number: number, refusal: string): Field {
  return field(name, number, BYTES, { refusal });
}

function refusedKind(name: string, number: number, kind: string): Field {
  return refused(name, number, `it has ${kind}, which bundles never have`);
}

export const MODEL = makeTable(
  "model",
  field("ir_version", 1, NUMBER),
  field("producer", 2),
  field("producer", 3),
  field("domain", 4),
  field("version", 5, NUMBER),
  field("text", 6),
  field("graph", 7),
  several("opset", 8),
  several("metadata", 14),
  refusedKind("training_info", 20, "training info"),
  refused("functions", 25, NO_FUNCTIONS),
);
export const OPSET = makeTable("opset", field("domain", 1), field("version", 2, NUMBER));
export const PAIR = makeTable("pair of texts", field("key", 1), field("value", 2));
export const GRAPH = makeTable(
  "graph",
  several("node", 1),
  field("name", 2),
  several("initializer", 5),
  field("text", 10),
  several("input", 11),
  several("output", 12),
  several("value", 13),
  refusedKind("sparse_initializer", 15, "a sparse tensor"),
  several("metadata", 16),
);
export const NODE = makeTable(
  "node",
  several("argument", 1),
  several("result", 2),
  field("name", 3),
  field("operator", 4),
  several("attribute", 5),
  field("text", 6),
  field("domain", 7),
  refused("overload", 8, NO_FUNCTIONS),
  several("metadata", 9),
);
export const ATTRIBUTE = makeTable(
  "attribute",
  field("name", 1),
  field("floats", 2, FIXED32),
  field("integers", 3, NUMBER),
  field("string", 4),
  field("tensor", 5),
  field("graph", 6),
  ...numbers(FIXED32, "floats", 7),
  ...numbers(NUMBER, "integers", 8),
  several("string", 9),
  several("tensor", 10),
  several("graph", 11),
  field("text", 13),
  field("type", 14),
  several("type", 15),
  field("kind", 20, NUMBER),
  refused("reference", 21, NO_FUNCTIONS),
  refusedKind("sparse_tensor", 22, "a sparse tensor"),
  refusedKind("sparse_tensors", 23, "a sparse tensor"),
);
export const TENSOR = makeTable(
  "tensor",
  ...numbers(NUMBER, "dims", 1),
  field("dtype", 2, NUMBER),
  refusedKind("segment", 3, "a tensor in segments"),
  ...numbers(FIXED32, "float_data", 4),
  ...numbers(NUMBER, "int32_data", 5),
  several("string_data", 6),
  ...numbers(NUMBER, "int64_data", 7),
  field("name", 8),
  field("raw_data", 9),
  ...numbers(FIXED64, "double_data", 10),
  ...numbers(NUMBER, "uint64_data", 11),
  field("text", 12),
  several("external_data", 13),
  field("location", 14, NUMBER),
  several("metadata", 16),
);
export const VALUE = makeTable(
  "value",
  field("name", 1),
  field("type", 2),
  field("text", 3),
  several("metadata", 4),
);
export const TYPE = makeTable(
  "type",
  field("tensor", 1),
  field("nested", 4),
  refusedKind("map", 5, "a map"),
  field("denotation", 6),
  refusedKind("opaque", 7, "an opaque type"),
  refusedKind("sparse_tensor", 8, "a sparse tensor"),
  field("nested", 9),
);
export const TENSOR_TYPE = makeTable(
  "tensor type",
  field("dtype", 1, NUMBER),
  field("shape", 2),
);
export const NESTED_TYPE = makeTable("type", field("type", 1));
export const SHAPE = makeTable("shape", several("dimension", 1));
export const DIMENSION = makeTable(
  "dimension",
  field("size", 1, NUMBER),
  field("symbol", 2),
  field("denotation", 3),
);

export const STRINGS = 8;

const WIDTHS: readonly (readonly [bits: number, field: string, dtypes: readonly number[]])[] = [
  [32, "float_data", [1]],
  [8, "int32_data", [2, 3, 9, 17, 18, 19, 20]],
  [16, "int32_data", [4, 5, 10, 16]],
  [4, "int32_data", [21, 22]],
  [32, "int32_data", [6]],
  [64, "int64_data", [7]],
  [0, "string_data", [STRINGS]],
  [64, "double_data", [11]],
  [32, "uint64_data", [12]],
  [64, "uint64_data", [13]],
  [64, "float_data", [14]],
  [128, "double_data", [15]],
];
/** Element type -> bits of an element, and the field that holds its values where no bytes do. */
export const TYPES: ReadonlyMap<number, { bits: number; field: string }> = new Map(
  WIDTHS.flatMap(([bits, held, dtypes]) =>
    dtypes.map((dtype) => [dtype, { bits, field: held }] as const),
  ),
);
/** Each of their elements is two values. */
export const COMPLEX: readonly number[] = [14, 15];
