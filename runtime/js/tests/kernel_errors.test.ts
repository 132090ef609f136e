/** Errors of ONNX Runtime as sentences, as `tests/test_kernel_errors.py` holds Python to. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { describeKernelError } from "../src/kernel_errors.js";

const RUNNING = "Non-zero status code returned while running";
const TOLD = [
  [
    `[ONNXRuntimeError] : 1 : FAIL : ${RUNNING} Concat node. Name:'c' Status Message: ` +
      "concat.cc:154 PrepareForCompute Non concat axis dimensions must match",
    "node 'c' (Concat) fails: Non concat axis dimensions must match",
  ],
  [
    `${RUNNING} Add node. Name:'' Status Message: /src/ops.h:540 void onnxruntime::Init(int, int) ` +
      "axis == 1 was false. Attempting to broadcast 3 by 5\n",
    "a node (Add) fails: Attempting to broadcast 3 by 5",
  ],
  [
    `${RUNNING} If node. Name:'i' Status Message: ${RUNNING} Loop node. Name:'l' Status Message: ` +
      "/src/loop.cc:12 static void (anonymous namespace)::Read(const int&, f<void(int)>) const it ends",
    "node 'i' (If) fails: node 'l' (Loop) fails: it ends",
  ],
  [
    "Got invalid dimensions for input: b for the following indices\n index: 0 Got: 3 Expected: 2\n " +
      "Please fix either the inputs/outputs or the model.",
    "input 'b' has other sizes than the graph declares: axis 0 is 3, not 2",
  ],
  ["the session is closed", "the session is closed"],
] as const;

test("an error names the node and the reason alone", () => {
  for (const [text, told] of TOLD) assert.equal(describeKernelError(text), told);
});
