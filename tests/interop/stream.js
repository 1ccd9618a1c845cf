// Windows of a model as docs/protocol.md says that they come: every chunk and window is
// checked, and a stream that breaks is gone on with from where it was.

import grpc from "@grpc/grpc-js";
import { createXXHash128 } from "hash-wasm";
import protobuf from "protobufjs";

const ATTEMPTS = 8; // in a row that get no further

const { root: rpc } = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`);

class Damaged extends Error {}

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = (byte >>> 1) ^ (byte & 1 ? 0x82f63b78 : 0);
  return byte >>> 0;
});

export function crc32c(data) {
  let crc = 0xffffffff;
  for (const byte of data) crc = (crc >>> 8) ^ TABLE[(crc ^ byte) & 0xff];
  return (crc ^ 0xffffffff) >>> 0;
}

// Where a stream is: the window that comes next, and what has come of it.
class Place {
  window = 0;
  offset = 0;
  data = null;

  constructor(hasher) {
    this.hasher = hasher;
  }

  anew() {
    this.offset = 0;
    this.data = null;
    this.hasher.init();
  }

  header({ window, offset, size }) {
    if (window !== this.window || offset !== this.offset) throw new Damaged("header");
    if (this.data === null) this.data = Buffer.alloc(size);
    if (this.data.length !== size) throw new Damaged("size");
  }

  chunk({ offset, data, crc32c: expected }) {
    const fits = this.data !== null && offset + data.length <= this.data.length;
    if (!fits || offset !== this.offset || !data.length) throw new Damaged("place");
    if (crc32c(data) !== expected) throw new Damaged("chunk");
    data.copy(this.data, offset);
    this.hasher.update(data);
    this.offset += data.length;
  }

  end({ xxh3_128 }) {
    if (this.offset !== this.data?.length) throw new Damaged("end");
    const data = this.data;
    const same = this.hasher.digest() === xxh3_128.toString("hex");
    this.anew(); // where the halves are of different software: the window anew
    if (!same) throw new Damaged("window");
    this.window += 1;
    return data;
  }
}

// Seconds to wait before asking again; undefined where that is of no use.
function pause(error, attempt) {
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

// Yields the bytes of each window of a StreamShardsRequest, from any of the services.
export async function* windows(services, request, told = () => {}) {
  const place = new Place(await createXXHash128());
  place.anew();
  let attempt = 0;
  for (let turn = 0; place.window < request.windows.length; turn++) {
    const resume = { window: place.window, offset: place.offset };
    told(resume);
    const service = services[turn % services.length];
    const stream = service.StreamShards({ ...request, resume });
    try {
      for await (const message of stream) {
        if (place.window >= request.windows.length) throw new Damaged("too much");
        const window = place[message.part](message[message.part]);
        if (message.part !== "header") attempt = 0; // it got further
        if (window !== undefined) yield window;
      }
      if (place.window < request.windows.length) throw new Damaged("cut short");
    } catch (error) {
      const seconds = pause(error, attempt);
      attempt += 1;
      if (seconds === undefined || attempt > ATTEMPTS) throw error;
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    } finally {
      stream.cancel();
    }
  }
}
