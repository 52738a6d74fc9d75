from protocols.gen import rounds_pb2 as _rounds_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Resources(_message.Message):
    __slots__ = ("gpu_ms", "cpu_ms", "energy_mwh", "source")
    GPU_MS_FIELD_NUMBER: _ClassVar[int]
    CPU_MS_FIELD_NUMBER: _ClassVar[int]
    ENERGY_MWH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    gpu_ms: int
    cpu_ms: int
    energy_mwh: int
    source: str
    def __init__(self, gpu_ms: _Optional[int] = ..., cpu_ms: _Optional[int] = ..., energy_mwh: _Optional[int] = ..., source: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("round", "used")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    round: _rounds_pb2.RoundRef
    used: Resources
    def __init__(self, round: _Optional[_Union[_rounds_pb2.RoundRef, _Mapping]] = ..., used: _Optional[_Union[Resources, _Mapping]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeResources(_message.Message):
    __slots__ = ("node", "used")
    NODE_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    node: str
    used: Resources
    def __init__(self, node: _Optional[str] = ..., used: _Optional[_Union[Resources, _Mapping]] = ...) -> None: ...

class Prices(_message.Message):
    __slots__ = ("currency", "gpu_hour", "kwh")
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    GPU_HOUR_FIELD_NUMBER: _ClassVar[int]
    KWH_FIELD_NUMBER: _ClassVar[int]
    currency: str
    gpu_hour: float
    kwh: float
    def __init__(self, currency: _Optional[str] = ..., gpu_hour: _Optional[float] = ..., kwh: _Optional[float] = ...) -> None: ...
