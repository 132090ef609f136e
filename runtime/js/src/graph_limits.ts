/**
 * What a stage's graph may hold at most.
 *
 * Written by `python -m tests.support.typescript_tables`; a test checks that it is fresh.
 */

/** The number of dimensions of a tensor. */
export const MAX_RANK = 32;
/** The size in bytes of a comment, or of one text in an attribute or tensor. */
export const MAX_TEXT_BYTES = 1048576;
/**
 * The number of fields in all messages of a graph together. A training step of ResNet-18 in
 * standard operators has 26,000. With this limit, the gate takes at most about ten seconds.
 */
export const MAX_FIELDS = 16777216;
/** The number of nodes in a graph, plus the number of graphs inside nodes. */
export const MAX_NODES = 1048576;
/** The number of names that a graph defines. The gate keeps them in memory. */
export const MAX_NAMES = 2097152;
/** The nesting depth of If, Loop and Scan; Protocol Buffers' own parsers have the same limit. */
export const MAX_DEPTH = 32;
/** The nesting depth of sequence and optional types. */
export const MAX_TYPE_DEPTH = 8;
/** The number of attributes of a node. ONNX's own operators have at most a dozen. */
export const MAX_ATTRIBUTES = 256;
/**
 * The number of elements of a tensor, not counting dimensions of size 0. Without this limit, an
 * empty tensor could declare sizes that overflow an integer elsewhere.
 */
export const MAX_ELEMENTS = 1099511627776;
/** The length of a name in bytes: four for each character of the longest name in a model. */
export const MAX_NAME_BYTES = 16384;
