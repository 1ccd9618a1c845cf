// Windows of a model as docs/protocol.md says that they come: every chunk and window is
// checked, and a stream that breaks is gone on with from where it was.

import { createXXHash128 } from "hash-wasm";

import { ATTEMPTS, Damaged, pause } from "./retry.js";

const TYPES = {
  1: "bool int8 uint8 float8_e4m3fn float8_e4m3b11fnuz float8_e5m2 float8_e4m3fnuz",
  2: "int16 uint16 float16 bfloat16",
  4: "int32 uint32 float32",
  8: "int64 uint64 float64 complex64",
  16: "complex128",
};
const BYTES = { float8_e5m2fnuz: 1 };
for (const [size, names] of Object.entries(TYPES)) {
  for (const name of names.split(" ")) BYTES[name] = Number(size);
}

const WORDS = { "key<fry>": 2, "key<rbg>": 4, "key<urbg>": 4 };

// How all of a leaf comes that DescribeModel told of: keys come as their words.
export function whole({ shape, dtype }) {
  const words = WORDS[dtype];
  return words ? { shape: [...shape, words], dtype: "uint32" } : { shape, dtype };
}

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

  // Holds a window against what is expected before anything is allocated for it.
  header({ window, offset, size, shape, dtype }, expected) {
    if (window !== this.window || offset !== this.offset) throw new Damaged("header");
    const elements = expected.shape.reduce((product, n) => product * n, 1);
    const right = String(shape) === String(expected.shape) && dtype === expected.dtype;
    if (!right || size !== elements * BYTES[dtype]) throw new Damaged("shape");
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

// Yields the bytes of each window of a StreamShardsRequest, from any of the services,
// each a function from a request to its stream; `expected` has the shape and the dtype of each.
export async function* windows(services, request, expected, told = () => {}) {
  const place = new Place(await createXXHash128());
  place.anew();
  let attempt = 0;
  for (let turn = 0; place.window < request.windows.length; turn++) {
    const resume = { window: place.window, offset: place.offset };
    told(resume);
    const stream = services[turn % services.length]({ ...request, resume });
    try {
      for await (const message of stream) {
        if (place.window >= request.windows.length) throw new Damaged("too much");
        const part = message[message.part];
        const window = place[message.part](part, expected[place.window]);
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
