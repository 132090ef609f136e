/**
 * Checksums: a tensor file that carries a CRC-32 of all of itself, so that no flipped bit goes
 * unnoticed.
 *
 * The sum is in the header's metadata under `crc32` and covers every byte of the file,
 * with zeros in the sum's own place.  Nobody is kept from altering a file and its sum: a checksum
 * detects accidents, not attacks.  Where JavaScript is interpreted, on phones, a SHA-256 would take
 * some ten times as long.
 */

import { encodeTensors } from "./codecs.js";
import type { NdArrays } from "./tensors.js";

export const CHECKSUM = "crc32";

const BLANK = "0".repeat(8);
const MARK = new TextEncoder().encode(`"${CHECKSUM}":"`);

/** Write tensors and metadata as one file with its checksum. */
export function encodeWithChecksum(
  tensors: NdArrays,
  metadata: Readonly<Record<string, string>>,
): Uint8Array<ArrayBuffer> {
  const content = encodeTensors(tensors, { [CHECKSUM]: BLANK, ...metadata });
  content.set(new TextEncoder().encode(sumBytes(content)), findChecksum(content));
  return content;
}

/** Return whether a well-formed file is as it was written; `checksum` is what its metadata hold. */
export function hasValidChecksum(content: Uint8Array, checksum: string): boolean {
  const start = findChecksum(content);
  if (start < 0) return false;
  const blank = content.slice();
  blank.set(new TextEncoder().encode(BLANK), start);
  return sumBytes(blank) === checksum;
}

/** Find the position of the sum, which is the first entry of the header. */
function findChecksum(content: Uint8Array): number {
  for (let start = 0; start < 64; start++) {
    if (MARK.every((byte, index) => content[start + index] === byte)) return start + MARK.length;
  }
  return -1;
}

/** Compute the CRC-32 of bytes as IEEE 802.3 has it, in hex. */
function sumBytes(content: Uint8Array): string {
  const table = Int32Array.from({ length: 256 }, (_, byte) => {
    for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
    return byte;
  });
  let sum = -1;
  for (let index = 0; index < content.length; index++) {
    sum = table[(sum ^ content[index]!) & 0xff]! ^ (sum >>> 8);
  }
  return (~sum >>> 0).toString(16).padStart(8, "0");
}
