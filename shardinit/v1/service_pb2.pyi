from google.protobuf import struct_pb2 as _struct_pb2
from shardinit.v1 import program_pb2 as _program_pb2
from shardinit.v1 import spec_pb2 as _spec_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Severity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEVERITY_UNSPECIFIED: _ClassVar[Severity]
    SEVERITY_WARNING: _ClassVar[Severity]
    SEVERITY_NOTE: _ClassVar[Severity]

class CheckpointFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKPOINT_FORMAT_UNSPECIFIED: _ClassVar[CheckpointFormat]
    CHECKPOINT_FORMAT_SAFETENSORS: _ClassVar[CheckpointFormat]
    CHECKPOINT_FORMAT_ORBAX: _ClassVar[CheckpointFormat]
SEVERITY_UNSPECIFIED: Severity
SEVERITY_WARNING: Severity
SEVERITY_NOTE: Severity
CHECKPOINT_FORMAT_UNSPECIFIED: CheckpointFormat
CHECKPOINT_FORMAT_SAFETENSORS: CheckpointFormat
CHECKPOINT_FORMAT_ORBAX: CheckpointFormat

class GetVersionRequest(_message.Message):
    __slots__ = ("min", "max")
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    min: int
    max: int
    def __init__(self, min: _Optional[int] = ..., max: _Optional[int] = ...) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version", "server_version", "jax_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    server_version: str
    jax_version: str
    def __init__(self, version: _Optional[int] = ..., server_version: _Optional[str] = ..., jax_version: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "config_schema")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    name: str
    config_schema: _struct_pb2.Struct
    def __init__(self, name: _Optional[str] = ..., config_schema: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ("spec", "mesh", "rules", "opt_rules", "opt_memory_kind", "opt_state")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    OPT_RULES_FIELD_NUMBER: _ClassVar[int]
    OPT_MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    OPT_STATE_FIELD_NUMBER: _ClassVar[int]
    spec: _spec_pb2.ModelSpec
    mesh: _spec_pb2.MeshSpec
    rules: _spec_pb2.ShardingRules
    opt_rules: _spec_pb2.ShardingRules
    opt_memory_kind: str
    opt_state: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, spec: _Optional[_Union[_spec_pb2.ModelSpec, _Mapping]] = ..., mesh: _Optional[_Union[_spec_pb2.MeshSpec, _Mapping]] = ..., rules: _Optional[_Union[_spec_pb2.ShardingRules, _Mapping]] = ..., opt_rules: _Optional[_Union[_spec_pb2.ShardingRules, _Mapping]] = ..., opt_memory_kind: _Optional[str] = ..., opt_state: _Optional[_Iterable[str]] = ...) -> None: ...

class DescribeModelResponse(_message.Message):
    __slots__ = ("fingerprint", "total_bytes", "bytes_per_device", "parameter_count", "programs", "kinds", "leaves", "nodes", "findings", "host_bytes_per_device")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_DEVICE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_PER_DEVICE_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    total_bytes: int
    bytes_per_device: int
    parameter_count: int
    programs: int
    kinds: _containers.RepeatedCompositeFieldContainer[LeafKind]
    leaves: _containers.RepeatedCompositeFieldContainer[LeafInfo]
    nodes: _containers.RepeatedCompositeFieldContainer[_program_pb2.Node]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    host_bytes_per_device: int
    def __init__(self, fingerprint: _Optional[str] = ..., total_bytes: _Optional[int] = ..., bytes_per_device: _Optional[int] = ..., parameter_count: _Optional[int] = ..., programs: _Optional[int] = ..., kinds: _Optional[_Iterable[_Union[LeafKind, _Mapping]]] = ..., leaves: _Optional[_Iterable[_Union[LeafInfo, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[_program_pb2.Node, _Mapping]]] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., host_bytes_per_device: _Optional[int] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("kind", "severity", "leaves", "rules", "reason", "remedy")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    severity: Severity
    leaves: _containers.RepeatedScalarFieldContainer[int]
    rules: _containers.RepeatedScalarFieldContainer[str]
    reason: str
    remedy: str
    def __init__(self, kind: _Optional[str] = ..., severity: _Optional[_Union[Severity, str]] = ..., leaves: _Optional[_Iterable[int]] = ..., rules: _Optional[_Iterable[str]] = ..., reason: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class LeafKind(_message.Message):
    __slots__ = ("shape", "dtype", "dimensions", "bytes_per_device", "program", "whole", "memory_kind")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_DEVICE_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    dimensions: _containers.RepeatedCompositeFieldContainer[_spec_pb2.Dimension]
    bytes_per_device: int
    program: int
    whole: str
    memory_kind: str
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., dimensions: _Optional[_Iterable[_Union[_spec_pb2.Dimension, _Mapping]]] = ..., bytes_per_device: _Optional[int] = ..., program: _Optional[int] = ..., whole: _Optional[str] = ..., memory_kind: _Optional[str] = ...) -> None: ...

class LeafInfo(_message.Message):
    __slots__ = ("path", "kind")
    PATH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    path: str
    kind: int
    def __init__(self, path: _Optional[str] = ..., kind: _Optional[int] = ...) -> None: ...

class GetProgramRequest(_message.Message):
    __slots__ = ("spec", "jax_version", "known_sha256")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_SHA256_FIELD_NUMBER: _ClassVar[int]
    spec: _spec_pb2.ModelSpec
    jax_version: str
    known_sha256: bytes
    def __init__(self, spec: _Optional[_Union[_spec_pb2.ModelSpec, _Mapping]] = ..., jax_version: _Optional[str] = ..., known_sha256: _Optional[bytes] = ...) -> None: ...

class GetProgramResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ProgramHeader
    chunk: ProgramChunk
    def __init__(self, header: _Optional[_Union[ProgramHeader, _Mapping]] = ..., chunk: _Optional[_Union[ProgramChunk, _Mapping]] = ...) -> None: ...

class ProgramHeader(_message.Message):
    __slots__ = ("size", "sha256", "fingerprint", "jax_version")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    size: int
    sha256: bytes
    fingerprint: str
    jax_version: str
    def __init__(self, size: _Optional[int] = ..., sha256: _Optional[bytes] = ..., fingerprint: _Optional[str] = ..., jax_version: _Optional[str] = ...) -> None: ...

class ProgramChunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class StreamShardsRequest(_message.Message):
    __slots__ = ("spec", "key", "windows", "resume")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    spec: _spec_pb2.ModelSpec
    key: RootKey
    windows: _containers.RepeatedCompositeFieldContainer[Window]
    resume: ShardPosition
    def __init__(self, spec: _Optional[_Union[_spec_pb2.ModelSpec, _Mapping]] = ..., key: _Optional[_Union[RootKey, _Mapping]] = ..., windows: _Optional[_Iterable[_Union[Window, _Mapping]]] = ..., resume: _Optional[_Union[ShardPosition, _Mapping]] = ...) -> None: ...

class RootKey(_message.Message):
    __slots__ = ("seed", "data", "streams")
    SEED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    seed: int
    data: KeyData
    streams: KeyStreams
    def __init__(self, seed: _Optional[int] = ..., data: _Optional[_Union[KeyData, _Mapping]] = ..., streams: _Optional[_Union[KeyStreams, _Mapping]] = ...) -> None: ...

class KeyStreams(_message.Message):
    __slots__ = ("streams",)
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    streams: _containers.RepeatedCompositeFieldContainer[KeyStream]
    def __init__(self, streams: _Optional[_Iterable[_Union[KeyStream, _Mapping]]] = ...) -> None: ...

class KeyStream(_message.Message):
    __slots__ = ("name", "seed", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    seed: int
    data: KeyData
    def __init__(self, name: _Optional[str] = ..., seed: _Optional[int] = ..., data: _Optional[_Union[KeyData, _Mapping]] = ...) -> None: ...

class KeyData(_message.Message):
    __slots__ = ("impl", "words")
    IMPL_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    impl: str
    words: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, impl: _Optional[str] = ..., words: _Optional[_Iterable[int]] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("path", "start", "shape")
    PATH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    path: str
    start: _containers.RepeatedScalarFieldContainer[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, path: _Optional[str] = ..., start: _Optional[_Iterable[int]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ShardPosition(_message.Message):
    __slots__ = ("window", "offset")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    window: int
    offset: int
    def __init__(self, window: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class StreamShardsResponse(_message.Message):
    __slots__ = ("header", "chunk", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: ShardHeader
    chunk: ShardChunk
    end: ShardEnd
    def __init__(self, header: _Optional[_Union[ShardHeader, _Mapping]] = ..., chunk: _Optional[_Union[ShardChunk, _Mapping]] = ..., end: _Optional[_Union[ShardEnd, _Mapping]] = ...) -> None: ...

class ShardHeader(_message.Message):
    __slots__ = ("window", "shape", "dtype", "size", "offset")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    window: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    size: int
    offset: int
    def __init__(self, window: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class ShardChunk(_message.Message):
    __slots__ = ("offset", "crc32c", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32c: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ShardEnd(_message.Message):
    __slots__ = ("xxh3_128",)
    XXH3_128_FIELD_NUMBER: _ClassVar[int]
    xxh3_128: bytes
    def __init__(self, xxh3_128: _Optional[bytes] = ...) -> None: ...

class WriteCheckpointRequest(_message.Message):
    __slots__ = ("spec", "key", "uri", "format", "detach")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    spec: _spec_pb2.ModelSpec
    key: RootKey
    uri: str
    format: CheckpointFormat
    detach: bool
    def __init__(self, spec: _Optional[_Union[_spec_pb2.ModelSpec, _Mapping]] = ..., key: _Optional[_Union[RootKey, _Mapping]] = ..., uri: _Optional[str] = ..., format: _Optional[_Union[CheckpointFormat, str]] = ..., detach: bool = ...) -> None: ...

class WriteCheckpointResponse(_message.Message):
    __slots__ = ("progress", "receipt")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    progress: CheckpointProgress
    receipt: CheckpointReceipt
    def __init__(self, progress: _Optional[_Union[CheckpointProgress, _Mapping]] = ..., receipt: _Optional[_Union[CheckpointReceipt, _Mapping]] = ...) -> None: ...

class CheckpointProgress(_message.Message):
    __slots__ = ("bytes_done", "bytes_total")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class CheckpointReceipt(_message.Message):
    __slots__ = ("uri", "receipt_json")
    URI_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_JSON_FIELD_NUMBER: _ClassVar[int]
    uri: str
    receipt_json: str
    def __init__(self, uri: _Optional[str] = ..., receipt_json: _Optional[str] = ...) -> None: ...

class UploadProgramRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: ProgramChunk
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[_Union[ProgramChunk, _Mapping]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("size", "sha256")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    size: int
    sha256: bytes
    def __init__(self, size: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class UploadProgramResponse(_message.Message):
    __slots__ = ("sha256", "fingerprint")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    fingerprint: str
    def __init__(self, sha256: _Optional[bytes] = ..., fingerprint: _Optional[str] = ...) -> None: ...
