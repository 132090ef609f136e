/** How messages get from a client to its server and back: one narrow interface. */

/** A client's connection; counts the bytes of whole messages. */
export interface Transport {
  readonly bytesSent: number;
  readonly bytesReceived: number;

  /** Send one message; it must not be changed afterwards.
   *
   * @throws ConnectionLost: it cannot be sent.
   */
  send(content: Uint8Array<ArrayBuffer>): void;

  /** Wait for the next message.
   *
   * @throws ConnectionLost: none will come, or none came in time.
   */
  receive(): Promise<Uint8Array>;

  /** End the connection; may be called twice. */
  close(): void;
}
