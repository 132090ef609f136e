/**
 * What a stage's graph may hold at most.
 *
 * Written by `python -m tests.support.typescript_tables`; a test checks that it is fresh.
 */

/** Dimensions of a tensor. */
export const MAX_RANK = 32;
/** Bytes of a comment, or of one text in an attribute or tensor. */
export const MAX_TEXT_BYTES = 1048576;
/**
 * Fields of a graph, over all its messages; a training step of ResNet-18 in standard operators has
 * 26,000. It bounds the time that the gate takes, to some ten seconds.
 */
export const MAX_FIELDS = 16777216;
/** Nodes and bodies of a graph. */
export const MAX_NODES = 1048576;
/** Names that a graph defines; they are kept while it is checked. */
export const MAX_NAMES = 2097152;
/** Bodies of If, Loop and Scan inside one another; Protocol Buffers' own parsers end there. */
export const MAX_DEPTH = 32;
/** Sequences and optionals inside one another. */
export const MAX_TYPE_DEPTH = 8;
/** Attributes of a node; ONNX's own operators have at most a dozen. */
export const MAX_ATTRIBUTES = 256;
/**
 * Elements of a tensor, zero dimensions left out: an empty one may claim more than fits an integer
 * elsewhere.
 */
export const MAX_ELEMENTS = 1099511627776;
/** Bytes of a name: four for each character of a model's longest. */
export const MAX_NAME_BYTES = 16384;
