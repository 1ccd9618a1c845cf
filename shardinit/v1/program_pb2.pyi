from shardinit.v1 import spec_pb2 as _spec_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_UNSPECIFIED: _ClassVar[Compression]
    COMPRESSION_ZLIB: _ClassVar[Compression]
COMPRESSION_UNSPECIFIED: Compression
COMPRESSION_ZLIB: Compression

class InitProgram(_message.Message):
    __slots__ = ("format", "sha256", "content", "compression", "content_size")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SIZE_FIELD_NUMBER: _ClassVar[int]
    format: int
    sha256: bytes
    content: bytes
    compression: Compression
    content_size: int
    def __init__(self, format: _Optional[int] = ..., sha256: _Optional[bytes] = ..., content: _Optional[bytes] = ..., compression: _Optional[_Union[Compression, str]] = ..., content_size: _Optional[int] = ...) -> None: ...

class InitProgramContent(_message.Message):
    __slots__ = ("jax_version", "key_impl", "typed_key", "x64", "fingerprint", "name", "nodes", "leaves", "key_nodes", "functions", "calling_convention", "key_streams", "same_key")
    JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    KEY_IMPL_FIELD_NUMBER: _ClassVar[int]
    TYPED_KEY_FIELD_NUMBER: _ClassVar[int]
    X64_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    KEY_NODES_FIELD_NUMBER: _ClassVar[int]
    FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    CALLING_CONVENTION_FIELD_NUMBER: _ClassVar[int]
    KEY_STREAMS_FIELD_NUMBER: _ClassVar[int]
    SAME_KEY_FIELD_NUMBER: _ClassVar[int]
    jax_version: str
    key_impl: str
    typed_key: bool
    x64: bool
    fingerprint: str
    name: str
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    leaves: _containers.RepeatedCompositeFieldContainer[Leaf]
    key_nodes: _containers.RepeatedCompositeFieldContainer[KeyNode]
    functions: _containers.RepeatedCompositeFieldContainer[Function]
    calling_convention: int
    key_streams: _containers.RepeatedScalarFieldContainer[str]
    same_key: _containers.RepeatedCompositeFieldContainer[SameKey]
    def __init__(self, jax_version: _Optional[str] = ..., key_impl: _Optional[str] = ..., typed_key: bool = ..., x64: bool = ..., fingerprint: _Optional[str] = ..., name: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., leaves: _Optional[_Iterable[_Union[Leaf, _Mapping]]] = ..., key_nodes: _Optional[_Iterable[_Union[KeyNode, _Mapping]]] = ..., functions: _Optional[_Iterable[_Union[Function, _Mapping]]] = ..., calling_convention: _Optional[int] = ..., key_streams: _Optional[_Iterable[str]] = ..., same_key: _Optional[_Iterable[_Union[SameKey, _Mapping]]] = ...) -> None: ...

class SameKey(_message.Message):
    __slots__ = ("leaves",)
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    leaves: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leaves: _Optional[_Iterable[int]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("kind", "keys", "children")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Node.Kind]
        KIND_DICT: _ClassVar[Node.Kind]
        KIND_LIST: _ClassVar[Node.Kind]
        KIND_TUPLE: _ClassVar[Node.Kind]
        KIND_NONE: _ClassVar[Node.Kind]
        KIND_LEAF: _ClassVar[Node.Kind]
    KIND_UNSPECIFIED: Node.Kind
    KIND_DICT: Node.Kind
    KIND_LIST: Node.Kind
    KIND_TUPLE: Node.Kind
    KIND_NONE: Node.Kind
    KIND_LEAF: Node.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    kind: Node.Kind
    keys: _containers.RepeatedCompositeFieldContainer[NodeKey]
    children: int
    def __init__(self, kind: _Optional[_Union[Node.Kind, str]] = ..., keys: _Optional[_Iterable[_Union[NodeKey, _Mapping]]] = ..., children: _Optional[int] = ...) -> None: ...

class NodeKey(_message.Message):
    __slots__ = ("text", "number")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    text: str
    number: int
    def __init__(self, text: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class Leaf(_message.Message):
    __slots__ = ("path", "shape", "dtype", "has_axes", "axes", "function", "host", "operands", "key_impl", "result", "weak_type", "axis_metadata", "stated", "optimizer")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HAS_AXES_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    OPERANDS_FIELD_NUMBER: _ClassVar[int]
    KEY_IMPL_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    WEAK_TYPE_FIELD_NUMBER: _ClassVar[int]
    AXIS_METADATA_FIELD_NUMBER: _ClassVar[int]
    STATED_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    path: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    has_axes: bool
    axes: _containers.RepeatedScalarFieldContainer[str]
    function: int
    host: Operand
    operands: _containers.RepeatedCompositeFieldContainer[Operand]
    key_impl: str
    result: int
    weak_type: bool
    axis_metadata: AxisMetadata
    stated: StatedSharding
    optimizer: bool
    def __init__(self, path: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., has_axes: bool = ..., axes: _Optional[_Iterable[str]] = ..., function: _Optional[int] = ..., host: _Optional[_Union[Operand, _Mapping]] = ..., operands: _Optional[_Iterable[_Union[Operand, _Mapping]]] = ..., key_impl: _Optional[str] = ..., result: _Optional[int] = ..., weak_type: bool = ..., axis_metadata: _Optional[_Union[AxisMetadata, _Mapping]] = ..., stated: _Optional[_Union[StatedSharding, _Mapping]] = ..., optimizer: bool = ...) -> None: ...

class StatedSharding(_message.Message):
    __slots__ = ("mesh", "dimensions", "memory_kind")
    MESH_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    mesh: _spec_pb2.MeshSpec
    dimensions: _containers.RepeatedCompositeFieldContainer[AxisGroup]
    memory_kind: str
    def __init__(self, mesh: _Optional[_Union[_spec_pb2.MeshSpec, _Mapping]] = ..., dimensions: _Optional[_Iterable[_Union[AxisGroup, _Mapping]]] = ..., memory_kind: _Optional[str] = ...) -> None: ...

class AxisMetadata(_message.Message):
    __slots__ = ("named", "passes", "rules", "groups")
    NAMED_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    named: int
    passes: bool
    rules: _containers.RepeatedCompositeFieldContainer[_spec_pb2.AxisRule]
    groups: _containers.RepeatedCompositeFieldContainer[AxisGroup]
    def __init__(self, named: _Optional[int] = ..., passes: bool = ..., rules: _Optional[_Iterable[_Union[_spec_pb2.AxisRule, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[AxisGroup, _Mapping]]] = ...) -> None: ...

class AxisGroup(_message.Message):
    __slots__ = ("dimension", "mesh_axes")
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    MESH_AXES_FIELD_NUMBER: _ClassVar[int]
    dimension: int
    mesh_axes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, dimension: _Optional[int] = ..., mesh_axes: _Optional[_Iterable[str]] = ...) -> None: ...

class Operand(_message.Message):
    __slots__ = ("key_node", "constant")
    KEY_NODE_FIELD_NUMBER: _ClassVar[int]
    CONSTANT_FIELD_NUMBER: _ClassVar[int]
    key_node: int
    constant: Constant
    def __init__(self, key_node: _Optional[int] = ..., constant: _Optional[_Union[Constant, _Mapping]] = ...) -> None: ...

class Constant(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class KeyNode(_message.Message):
    __slots__ = ("root", "fold_in", "split", "take", "words")
    class Root(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class FoldIn(_message.Message):
        __slots__ = ("parent", "data", "shape")
        PARENT_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        SHAPE_FIELD_NUMBER: _ClassVar[int]
        parent: int
        data: _containers.RepeatedScalarFieldContainer[int]
        shape: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, parent: _Optional[int] = ..., data: _Optional[_Iterable[int]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...
    class Split(_message.Message):
        __slots__ = ("parent", "shape")
        PARENT_FIELD_NUMBER: _ClassVar[int]
        SHAPE_FIELD_NUMBER: _ClassVar[int]
        parent: int
        shape: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, parent: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...
    class Take(_message.Message):
        __slots__ = ("parents", "list", "range", "key_impl")
        PARENTS_FIELD_NUMBER: _ClassVar[int]
        LIST_FIELD_NUMBER: _ClassVar[int]
        RANGE_FIELD_NUMBER: _ClassVar[int]
        KEY_IMPL_FIELD_NUMBER: _ClassVar[int]
        parents: _containers.RepeatedScalarFieldContainer[int]
        list: WordList
        range: WordRange
        key_impl: str
        def __init__(self, parents: _Optional[_Iterable[int]] = ..., list: _Optional[_Union[WordList, _Mapping]] = ..., range: _Optional[_Union[WordRange, _Mapping]] = ..., key_impl: _Optional[str] = ...) -> None: ...
    class Words(_message.Message):
        __slots__ = ("data", "key_impl")
        DATA_FIELD_NUMBER: _ClassVar[int]
        KEY_IMPL_FIELD_NUMBER: _ClassVar[int]
        data: bytes
        key_impl: str
        def __init__(self, data: _Optional[bytes] = ..., key_impl: _Optional[str] = ...) -> None: ...
    ROOT_FIELD_NUMBER: _ClassVar[int]
    FOLD_IN_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    root: KeyNode.Root
    fold_in: KeyNode.FoldIn
    split: KeyNode.Split
    take: KeyNode.Take
    words: KeyNode.Words
    def __init__(self, root: _Optional[_Union[KeyNode.Root, _Mapping]] = ..., fold_in: _Optional[_Union[KeyNode.FoldIn, _Mapping]] = ..., split: _Optional[_Union[KeyNode.Split, _Mapping]] = ..., take: _Optional[_Union[KeyNode.Take, _Mapping]] = ..., words: _Optional[_Union[KeyNode.Words, _Mapping]] = ...) -> None: ...

class WordList(_message.Message):
    __slots__ = ("words",)
    WORDS_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, words: _Optional[_Iterable[int]] = ...) -> None: ...

class WordRange(_message.Message):
    __slots__ = ("start", "count")
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    start: int
    count: int
    def __init__(self, start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Function(_message.Message):
    __slots__ = ("module", "windowed", "whole", "dtype", "rank", "digest", "platforms", "kind", "reason", "module_sha256")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Function.Kind]
        KIND_WINDOWED: _ClassVar[Function.Kind]
        KIND_REPLICATED: _ClassVar[Function.Kind]
        KIND_TABLE: _ClassVar[Function.Kind]
    KIND_UNSPECIFIED: Function.Kind
    KIND_WINDOWED: Function.Kind
    KIND_REPLICATED: Function.Kind
    KIND_TABLE: Function.Kind
    MODULE_FIELD_NUMBER: _ClassVar[int]
    WINDOWED_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLATFORMS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODULE_SHA256_FIELD_NUMBER: _ClassVar[int]
    module: bytes
    windowed: bool
    whole: str
    dtype: str
    rank: int
    digest: bytes
    platforms: _containers.RepeatedScalarFieldContainer[str]
    kind: Function.Kind
    reason: str
    module_sha256: bytes
    def __init__(self, module: _Optional[bytes] = ..., windowed: bool = ..., whole: _Optional[str] = ..., dtype: _Optional[str] = ..., rank: _Optional[int] = ..., digest: _Optional[bytes] = ..., platforms: _Optional[_Iterable[str]] = ..., kind: _Optional[_Union[Function.Kind, str]] = ..., reason: _Optional[str] = ..., module_sha256: _Optional[bytes] = ...) -> None: ...
