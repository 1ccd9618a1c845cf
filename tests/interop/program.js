// The init program of a model as docs/protocol.md says that it comes.

import { createHash } from "node:crypto";
import { inflateSync } from "node:zlib";

import protobuf from "protobufjs";

import { Damaged } from "./retry.js";

const MOST = 256 * 2 ** 20; // `program_bytes`
const CONTENT = 2 ** 30; // bytes of a content once decompressed, at most

const { root } = protobuf.parse(`
  syntax = "proto3";
  message InitProgram { bytes sha256 = 2; bytes content = 3; uint64 content_size = 5; }
`);

// The serialised program; null where the one with `known` is still the one.
export async function program(stream, known = Buffer.alloc(0)) {
  let header = null;
  let data = null;
  let offset = 0;
  for await (const message of stream) {
    if ((header === null) !== (message.part === "header")) throw new Damaged("order");
    if (header === null) {
      header = message.header;
      if (header.size > MOST || header.sha256.length !== 32) throw new Damaged("header");
      data = Buffer.alloc(header.size);
      continue;
    }
    const { offset: at, data: bytes } = message.chunk;
    if (at !== offset || !bytes.length || at + bytes.length > data.length) {
      throw new Damaged("place");
    }
    bytes.copy(data, offset);
    offset += bytes.length;
  }
  if (header !== null && !offset && header.sha256.equals(known)) return null;
  if (header === null || offset !== data.length) throw new Damaged("cut short");
  const { content, contentSize } = root.lookupType("InitProgram").decode(data);
  const size = Number(contentSize);
  if (size > CONTENT) throw new Damaged("size");
  const inflated = inflateSync(content, { maxOutputLength: size });
  if (inflated.length !== size) throw new Damaged("content");
  const digest = createHash("sha256").update(inflated).digest();
  if (!digest.equals(header.sha256)) throw new Damaged("digest");
  return { data, digest };
}
