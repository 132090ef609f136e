/** How a websocket ends: the close codes that both sides know. */

/** The close code of a connection that is done. */
export const NORMAL = 1000;
/** The close code of a server that wants a token, or another one. */
export const POLICY = 1008;
/** The close code for a message over the limit of its receiver. */
export const TOO_BIG = 1009;
