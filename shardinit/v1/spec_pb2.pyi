from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelSpec(_message.Message):
    __slots__ = ("named", "program_sha256", "draw_dtype", "key_streams")
    NAMED_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_SHA256_FIELD_NUMBER: _ClassVar[int]
    DRAW_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KEY_STREAMS_FIELD_NUMBER: _ClassVar[int]
    named: NamedModel
    program_sha256: bytes
    draw_dtype: str
    key_streams: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, named: _Optional[_Union[NamedModel, _Mapping]] = ..., program_sha256: _Optional[bytes] = ..., draw_dtype: _Optional[str] = ..., key_streams: _Optional[_Iterable[str]] = ...) -> None: ...

class NamedModel(_message.Message):
    __slots__ = ("model", "config")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    model: str
    config: _struct_pb2.Struct
    def __init__(self, model: _Optional[str] = ..., config: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class MeshSpec(_message.Message):
    __slots__ = ("axes",)
    AXES_FIELD_NUMBER: _ClassVar[int]
    axes: _containers.RepeatedCompositeFieldContainer[MeshAxis]
    def __init__(self, axes: _Optional[_Iterable[_Union[MeshAxis, _Mapping]]] = ...) -> None: ...

class MeshAxis(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class ShardingRules(_message.Message):
    __slots__ = ("axis_rules", "path_rules", "fsdp")
    AXIS_RULES_FIELD_NUMBER: _ClassVar[int]
    PATH_RULES_FIELD_NUMBER: _ClassVar[int]
    FSDP_FIELD_NUMBER: _ClassVar[int]
    axis_rules: AxisRules
    path_rules: PathRules
    fsdp: FsdpRule
    def __init__(self, axis_rules: _Optional[_Union[AxisRules, _Mapping]] = ..., path_rules: _Optional[_Union[PathRules, _Mapping]] = ..., fsdp: _Optional[_Union[FsdpRule, _Mapping]] = ...) -> None: ...

class AxisRules(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[AxisRule]
    def __init__(self, rules: _Optional[_Iterable[_Union[AxisRule, _Mapping]]] = ...) -> None: ...

class AxisRule(_message.Message):
    __slots__ = ("logical", "mesh_axes", "memory_kind")
    LOGICAL_FIELD_NUMBER: _ClassVar[int]
    MESH_AXES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    logical: str
    mesh_axes: _containers.RepeatedScalarFieldContainer[str]
    memory_kind: str
    def __init__(self, logical: _Optional[str] = ..., mesh_axes: _Optional[_Iterable[str]] = ..., memory_kind: _Optional[str] = ...) -> None: ...

class PathRules(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[PathRule]
    def __init__(self, rules: _Optional[_Iterable[_Union[PathRule, _Mapping]]] = ...) -> None: ...

class PathRule(_message.Message):
    __slots__ = ("pattern", "dimensions", "memory_kind")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    dimensions: _containers.RepeatedCompositeFieldContainer[Dimension]
    memory_kind: str
    def __init__(self, pattern: _Optional[str] = ..., dimensions: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., memory_kind: _Optional[str] = ...) -> None: ...

class Dimension(_message.Message):
    __slots__ = ("mesh_axes",)
    MESH_AXES_FIELD_NUMBER: _ClassVar[int]
    mesh_axes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, mesh_axes: _Optional[_Iterable[str]] = ...) -> None: ...

class FsdpRule(_message.Message):
    __slots__ = ("mesh_axes", "min_bytes")
    MESH_AXES_FIELD_NUMBER: _ClassVar[int]
    MIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    mesh_axes: _containers.RepeatedScalarFieldContainer[str]
    min_bytes: int
    def __init__(self, mesh_axes: _Optional[_Iterable[str]] = ..., min_bytes: _Optional[int] = ...) -> None: ...
