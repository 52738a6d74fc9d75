from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("institution", "token_secret", "csr_der", "signing_key", "proof", "leaf", "approval")
    INSTITUTION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    APPROVAL_FIELD_NUMBER: _ClassVar[int]
    institution: str
    token_secret: bytes
    csr_der: bytes
    signing_key: bytes
    proof: bytes
    leaf: bytes
    approval: bytes
    def __init__(self, institution: _Optional[str] = ..., token_secret: _Optional[bytes] = ..., csr_der: _Optional[bytes] = ..., signing_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., leaf: _Optional[bytes] = ..., approval: _Optional[bytes] = ...) -> None: ...

class PersonEnrolRequest(_message.Message):
    __slots__ = ("request", "csr_der")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    csr_der: bytes
    def __init__(self, request: _Optional[bytes] = ..., csr_der: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr_der", "leaf")
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    csr_der: bytes
    leaf: bytes
    def __init__(self, csr_der: _Optional[bytes] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("federation", "certificate_der", "issuer_der", "not_after_ms", "log_vkey", "trust_root")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    ISSUER_DER_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    LOG_VKEY_FIELD_NUMBER: _ClassVar[int]
    TRUST_ROOT_FIELD_NUMBER: _ClassVar[int]
    federation: str
    certificate_der: bytes
    issuer_der: _containers.RepeatedScalarFieldContainer[bytes]
    not_after_ms: int
    log_vkey: str
    trust_root: bytes
    def __init__(self, federation: _Optional[str] = ..., certificate_der: _Optional[bytes] = ..., issuer_der: _Optional[_Iterable[bytes]] = ..., not_after_ms: _Optional[int] = ..., log_vkey: _Optional[str] = ..., trust_root: _Optional[bytes] = ...) -> None: ...
