// When to ask again, as docs/protocol.md says.

import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

export const ATTEMPTS = 8; // in a row that get no further

const { root: rpc } = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`);

export class Damaged extends Error {}

// Seconds to wait before asking again; undefined where that is of no use.
export function pause(error, attempt) {
  const usual = Math.random() * Math.min(2, 0.1 * 2 ** attempt);
  if (error instanceof Damaged || error.code === grpc.status.UNAVAILABLE) return usual;
  if (error.code === grpc.status.DEADLINE_EXCEEDED && attempt === 0) return usual;
  if (error.code !== grpc.status.RESOURCE_EXHAUSTED) return undefined;
  for (const data of error.metadata.get("grpc-status-details-bin")) {
    for (const detail of rpc.lookupType("Status").decode(data).details) {
      if (!detail.typeUrl.endsWith("/google.rpc.RetryInfo")) continue;
      const { retryDelay } = rpc.lookupType("RetryInfo").decode(detail.value);
      const seconds = Number(retryDelay.seconds) + retryDelay.nanos / 1e9;
      return seconds * (1 + Math.random());
    }
  }
  return undefined;
}

// What a call gives that begins anew each time it is asked for again.
export async function retried(call) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await call();
    } catch (error) {
      const seconds = pause(error, attempt);
      if (seconds === undefined || attempt + 1 >= ATTEMPTS) throw error;
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    }
  }
}
