/** The errors of ONNX Runtime as sentences about nodes, without its codes and source lines. */

const CODE = /\[ONNXRuntimeError\] : \d+ : \w+ : /g;
const FAILED =
  /Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: /;
const LINE = /^(\S+\.(?:cc|cpp|cu|h|hpp):\d+) /;
const CONDITION = /^.*? was false\. (?=\S)/;
const SIGNATURE =
  /^[^(]*(?:\([^()]*\)::[^(]*)*\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? /;
const FUNCTION = /^[\w:]+ (?=\S)/;
const SIZES = new RegExp(
  "Got invalid dimensions for input: (.+?) for the following indices" +
    "((?: index: \\d+ Got: \\d+ Expected: \\d+)+)",
);
const SIZE = /index: (\d+) Got: (\d+) Expected: (\d+)/g;

/**
 * Return what ONNX Runtime says in an error, in one line that begins with the node.
 *
 * Its error codes, and the files, functions and conditions of its source, are left out.
 */
export function describeKernelError(text: string): string {
  const line = text.trim().split(/\s+/).join(" ").replace(CODE, "");
  const failed = FAILED.exec(line);
  if (failed) {
    const [found, kind, name] = failed;
    const node = name ? `node '${name}' (${kind})` : `a node (${kind})`;
    const reason = describeKernelError(line.slice(failed.index + found.length));
    return `${node} fails: ${reason || "no reason given"}`;
  }
  const sizes = SIZES.exec(line);
  if (sizes) {
    const found = [...sizes[2]!.matchAll(SIZE)].map(
      ([, axis, got, due]) => `axis ${axis} is ${got}, not ${due}`,
    );
    return `input '${sizes[1]}' has other sizes than the graph declares: ${found.join(", ")}`;
  }
  return leaveOutSource(line);
}

function leaveOutSource(line: string): string {
  const place = LINE.exec(line);
  if (!place) return line;
  const rest = line.slice(place[0].length);
  for (const known of [CONDITION, place[1]!.startsWith("/") ? SIGNATURE : FUNCTION]) {
    const found = known.exec(rest);
    if (found) return rest.slice(found[0].length);
  }
  return rest;
}
