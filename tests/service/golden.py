"""Wire messages as the first release wrote them, one of each kind.

``golden.json`` holds their bytes. They are never written again: a message that no
longer parses, or parses to something else, breaks clients that are out there. A new
message or field gets a new entry:

    python tests/service/golden.py   # adds the entries that are missing
"""

import base64
import json
from pathlib import Path

from google.protobuf import json_format

from shardinit.v1 import program_pb2, service_pb2, spec_pb2

FILE = Path(__file__).with_name("golden.json")


def spec():
    named = spec_pb2.NamedModel(model="decoder")
    named.config.update({"hidden_size": 64, "deep": {"list": [1, "a", None, True]}})
    return spec_pb2.ModelSpec(named=named)


def rules():
    axis = spec_pb2.AxisRule(logical="embed", mesh_axes=["data", "model"])
    return spec_pb2.ShardingRules(axis_rules=spec_pb2.AxisRules(rules=[axis]))


def path_rules():
    entry = spec_pb2.Dimension(mesh_axes=["model"])
    rule = spec_pb2.PathRule(
        pattern="kernel$", dimensions=[entry, spec_pb2.Dimension()]
    )
    return spec_pb2.ShardingRules(path_rules=spec_pb2.PathRules(rules=[rule]))


def messages():
    """Every message by a name, its fields set."""
    s, p = service_pb2, program_pb2
    axes = [spec_pb2.MeshAxis(name="data", size=2), spec_pb2.MeshAxis(name="m", size=4)]
    key = s.RootKey(data=s.KeyData(impl="threefry2x32", words=[0, 2**32 - 1]))
    window = s.Window(path="a/b~1c", start=[0, 2**40], shape=[3, 4])
    digest = bytes(range(32))
    leaf = p.Leaf(
        path="w",
        shape=[2, 3],
        dtype="bfloat16",
        has_axes=True,
        axes=["embed", ""],
        function=1,
        operands=[p.Operand(key_node=2)],
        result=1,
    )
    constant = p.Constant(dtype="float32", shape=[1], data=b"\0\0\x80?")
    host = p.Leaf(path="c", host=p.Operand(constant=constant), key_impl="rbg")
    nodes = [
        p.Node(kind=p.Node.KIND_DICT, children=1, keys=[p.NodeKey(text="w")]),
        p.Node(kind=p.Node.KIND_LIST, children=1),
        p.Node(kind=p.Node.KIND_LEAF),
    ]
    take = p.KeyNode.Take(parents=[0], list=p.WordList(words=[3, 1]))
    strip = p.KeyNode.Take(range=p.WordRange(start=1, count=2), key_impl="rbg")
    key_nodes = [
        p.KeyNode(root=p.KeyNode.Root()),
        p.KeyNode(fold_in=p.KeyNode.FoldIn(parent=0, data=[5], shape=[])),
        p.KeyNode(split=p.KeyNode.Split(parent=1, shape=[4])),
        p.KeyNode(take=take),
        p.KeyNode(take=strip),
        p.KeyNode(words=p.KeyNode.Words(data=b"12345678", key_impl="x")),
    ]
    function = p.Function(
        module=b"module",
        windowed=True,
        whole="",
        dtype="float32",
        rank=2,
        digest=digest,
        platforms=["cpu", "tpu"],
    )
    content = p.InitProgramContent(
        jax_version="0.10.2",
        key_impl="threefry2x32",
        typed_key=True,
        x64=True,
        fingerprint="ab" * 32,
        name="model",
        calling_convention=9,
        nodes=nodes,
        leaves=[leaf, host],
        key_nodes=key_nodes,
        functions=[function],
    )
    kind = s.LeafKind(
        shape=[2, 3],
        dtype="bfloat16",
        dimensions=[spec_pb2.Dimension(mesh_axes=["data"])],
        bytes_per_device=6,
        program=-1,
        whole="qr",
    )
    described = s.DescribeModelResponse(
        fingerprint="ab",
        total_bytes=12,
        bytes_per_device=6,
        parameter_count=6,
        programs=1,
        kinds=[kind],
        leaves=[s.LeafInfo(path="w", kind=0)],
        nodes=nodes,
    )
    with_findings = s.DescribeModelResponse(
        leaves=described.leaves,
        kinds=described.kinds,
        findings=[
            s.Finding(
                kind="replicated",
                severity=s.SEVERITY_WARNING,
                leaves=[0],
                rules=["('mlp', 'data')"],
                reason="why",
                remedy="what to write",
            )
        ],
    )
    info = s.ModelInfo(name="decoder")
    info.config_schema.update({"required": ["a"]})
    part = s.ProgramChunk(offset=7, data=b"chunk")
    return {
        "spec": spec(),
        "spec-digest": spec_pb2.ModelSpec(program_sha256=digest),
        "mesh": spec_pb2.MeshSpec(axes=axes),
        "rules-axis": rules(),
        "rules-path": path_rules(),
        "rules-fsdp": spec_pb2.ShardingRules(
            fsdp=spec_pb2.FsdpRule(mesh_axes=["data"], min_bytes=65536)
        ),
        "program": p.InitProgram(
            format=1,
            sha256=digest,
            content=b"content",
            compression=p.COMPRESSION_ZLIB,
            content_size=7,
        ),
        "program-content": content,
        "spec-drawn": spec_pb2.ModelSpec(
            named=spec().named, draw_dtype="float32", key_streams=["dropout", "params"]
        ),
        "version-request": s.GetVersionRequest(min=1, max=3),
        "version": s.GetVersionResponse(
            version=1, server_version="0.1.0", jax_version="0.10.2"
        ),
        "models-request": s.ListModelsRequest(),
        "models": s.ListModelsResponse(models=[info]),
        "describe-request": s.DescribeModelRequest(
            spec=spec(), mesh=spec_pb2.MeshSpec(axes=axes), rules=rules()
        ),
        "describe-optimizer": s.DescribeModelRequest(
            spec=spec(),
            mesh=spec_pb2.MeshSpec(axes=axes),
            opt_rules=path_rules(),
            opt_memory_kind="pinned_host",
            opt_state=["opt/**"],
        ),
        "describe": described,
        "describe-findings": with_findings,
        "program-request": s.GetProgramRequest(
            spec=spec(), jax_version="0.10.2", known_sha256=digest
        ),
        "program-header": s.GetProgramResponse(
            header=s.ProgramHeader(
                size=9, sha256=digest, fingerprint="ab", jax_version="0.10.2"
            )
        ),
        "program-chunk": s.GetProgramResponse(chunk=part),
        "stream-request": s.StreamShardsRequest(
            spec=spec(),
            key=key,
            windows=[window],
            resume=s.ShardPosition(window=1, offset=2**40),
        ),
        "stream-header": s.StreamShardsResponse(
            header=s.ShardHeader(
                window=1, shape=[3, 4], dtype="float32", size=48, offset=4
            )
        ),
        "stream-chunk": s.StreamShardsResponse(
            chunk=s.ShardChunk(offset=4, crc32c=2**32 - 1, data=b"data")
        ),
        "stream-end": s.StreamShardsResponse(end=s.ShardEnd(xxh3_128=digest[:16])),
        "write-request": s.WriteCheckpointRequest(
            spec=spec(),
            key=s.RootKey(seed=-1),
            uri="file:///a",
            format=s.CHECKPOINT_FORMAT_ORBAX,
            detach=True,
        ),
        "write-streams": s.WriteCheckpointRequest(
            spec=spec(),
            key=s.RootKey(
                streams=s.KeyStreams(
                    streams=[
                        s.KeyStream(name="dropout", seed=-1),
                        s.KeyStream(name="params", data=key.data),
                    ]
                )
            ),
        ),
        "write-progress": s.WriteCheckpointResponse(
            progress=s.CheckpointProgress(bytes_done=1, bytes_total=2)
        ),
        "write-receipt": s.WriteCheckpointResponse(
            receipt=s.CheckpointReceipt(uri="/a", receipt_json="{}")
        ),
        "upload-header": s.UploadProgramRequest(
            header=s.UploadHeader(size=9, sha256=digest)
        ),
        "upload-chunk": s.UploadProgramRequest(chunk=part),
        "upload": s.UploadProgramResponse(sha256=digest, fingerprint="ab"),
    }


def entry(message):
    data = message.SerializeToString(deterministic=True)
    return {
        "type": message.DESCRIPTOR.full_name,
        "bytes": base64.b64encode(data).decode(),
        "means": json_format.MessageToDict(message),
    }


if __name__ == "__main__":
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    new = {name: entry(message) for name, message in messages().items()}
    FILE.write_text(json.dumps({**new, **known}, indent=1) + "\n")
