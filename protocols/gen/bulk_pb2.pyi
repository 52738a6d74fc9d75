from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class BeginUploadRequest(_message.Message):
    __slots__ = ("header", "signature", "unit_hashes")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    UNIT_HASHES_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    signature: bytes
    unit_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, header: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., unit_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class UploadState(_message.Message):
    __slots__ = ("upload_id", "durable", "total", "complete", "streams", "ahead")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    upload_id: bytes
    durable: int
    total: int
    complete: bool
    streams: int
    ahead: int
    def __init__(self, upload_id: _Optional[bytes] = ..., durable: _Optional[int] = ..., total: _Optional[int] = ..., complete: _Optional[bool] = ..., streams: _Optional[int] = ..., ahead: _Optional[int] = ...) -> None: ...

class FinishUploadRequest(_message.Message):
    __slots__ = ("upload_id", "leaf")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    upload_id: bytes
    leaf: bytes
    def __init__(self, upload_id: _Optional[bytes] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    def __init__(self, receipt: _Optional[bytes] = ...) -> None: ...

class DescribeBlobRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class BlobInfo(_message.Message):
    __slots__ = ("digest", "size", "unit_hashes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    UNIT_HASHES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    unit_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ..., unit_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...
