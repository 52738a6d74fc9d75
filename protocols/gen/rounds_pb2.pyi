from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RoundRef(_message.Message):
    __slots__ = ("run", "number")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    run: str
    number: int
    def __init__(self, run: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class SyncRequest(_message.Message):
    __slots__ = ("seen", "wait_ms", "progress", "agent_version", "state", "capability")
    SEEN_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    seen: int
    wait_ms: int
    progress: _containers.RepeatedCompositeFieldContainer[Progress]
    agent_version: str
    state: str
    capability: str
    def __init__(self, seen: _Optional[int] = ..., wait_ms: _Optional[int] = ..., progress: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ..., agent_version: _Optional[str] = ..., state: _Optional[str] = ..., capability: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("round", "activity", "step", "max_step", "tokens", "bytes_done", "bytes_total", "at_ms")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    activity: str
    step: int
    max_step: int
    tokens: int
    bytes_done: int
    bytes_total: int
    at_ms: int
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., activity: _Optional[str] = ..., step: _Optional[int] = ..., max_step: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., at_ms: _Optional[int] = ...) -> None: ...

class SyncResponse(_message.Message):
    __slots__ = ("version", "now_ms", "runs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    version: int
    now_ms: int
    runs: _containers.RepeatedCompositeFieldContainer[RunView]
    def __init__(self, version: _Optional[int] = ..., now_ms: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[RunView, _Mapping]]] = ...) -> None: ...

class RunView(_message.Message):
    __slots__ = ("run", "plan_digest", "status", "current", "last_released")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    LAST_RELEASED_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan_digest: str
    status: str
    current: RoundView
    last_released: RoundView
    def __init__(self, run: _Optional[str] = ..., plan_digest: _Optional[str] = ..., status: _Optional[str] = ..., current: _Optional[_Union[RoundView, _Mapping]] = ..., last_released: _Optional[_Union[RoundView, _Mapping]] = ...) -> None: ...

class RoundView(_message.Message):
    __slots__ = ("round", "phase", "why", "start_snapshot", "next_snapshot", "index", "transcript")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    START_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    NEXT_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    phase: PhaseView
    why: str
    start_snapshot: bytes
    next_snapshot: bytes
    index: int
    transcript: str
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., phase: _Optional[_Union[PhaseView, _Mapping]] = ..., why: _Optional[str] = ..., start_snapshot: _Optional[bytes] = ..., next_snapshot: _Optional[bytes] = ..., index: _Optional[int] = ..., transcript: _Optional[str] = ...) -> None: ...

class PhaseView(_message.Message):
    __slots__ = ("name", "attempt", "closes_at_ms", "joined", "declined", "cohort", "ready", "left", "dealt", "agreed", "received", "survivors", "commits", "aborts", "revealed", "sum", "model_root", "code", "reason", "keyed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CLOSES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    DEALT_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    REVEALED_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROOT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KEYED_FIELD_NUMBER: _ClassVar[int]
    name: str
    attempt: int
    closes_at_ms: int
    joined: _containers.RepeatedScalarFieldContainer[str]
    declined: _containers.RepeatedScalarFieldContainer[str]
    cohort: _containers.RepeatedScalarFieldContainer[str]
    ready: _containers.RepeatedScalarFieldContainer[str]
    left: _containers.RepeatedScalarFieldContainer[str]
    dealt: _containers.RepeatedScalarFieldContainer[str]
    agreed: _containers.RepeatedScalarFieldContainer[str]
    received: _containers.RepeatedScalarFieldContainer[str]
    survivors: _containers.RepeatedScalarFieldContainer[str]
    commits: _containers.RepeatedScalarFieldContainer[str]
    aborts: _containers.RepeatedScalarFieldContainer[str]
    revealed: _containers.RepeatedScalarFieldContainer[str]
    sum: str
    model_root: str
    code: str
    reason: str
    keyed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., attempt: _Optional[int] = ..., closes_at_ms: _Optional[int] = ..., joined: _Optional[_Iterable[str]] = ..., declined: _Optional[_Iterable[str]] = ..., cohort: _Optional[_Iterable[str]] = ..., ready: _Optional[_Iterable[str]] = ..., left: _Optional[_Iterable[str]] = ..., dealt: _Optional[_Iterable[str]] = ..., agreed: _Optional[_Iterable[str]] = ..., received: _Optional[_Iterable[str]] = ..., survivors: _Optional[_Iterable[str]] = ..., commits: _Optional[_Iterable[str]] = ..., aborts: _Optional[_Iterable[str]] = ..., revealed: _Optional[_Iterable[str]] = ..., sum: _Optional[str] = ..., model_root: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., keyed: _Optional[_Iterable[str]] = ...) -> None: ...

class GetPlanRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class GetPlanResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    def __init__(self, plan: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("round", "plan_digest", "model_root", "leaf")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROOT_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    plan_digest: str
    model_root: str
    leaf: bytes
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., plan_digest: _Optional[str] = ..., model_root: _Optional[str] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class DeclineRequest(_message.Message):
    __slots__ = ("round", "rule", "reason", "leaf")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    rule: str
    reason: str
    leaf: bytes
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., rule: _Optional[str] = ..., reason: _Optional[str] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class ReadyRequest(_message.Message):
    __slots__ = ("round", "model_root")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROOT_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    model_root: str
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., model_root: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("round", "code", "reason")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    code: str
    reason: str
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ConfirmRequest(_message.Message):
    __slots__ = ("round", "model_root", "objection", "detail", "leaf")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROOT_FIELD_NUMBER: _ClassVar[int]
    OBJECTION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    round: RoundRef
    model_root: str
    objection: str
    detail: str
    leaf: bytes
    def __init__(self, round: _Optional[_Union[RoundRef, _Mapping]] = ..., model_root: _Optional[str] = ..., objection: _Optional[str] = ..., detail: _Optional[str] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class RoundReply(_message.Message):
    __slots__ = ("phase", "why")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    phase: PhaseView
    why: str
    def __init__(self, phase: _Optional[_Union[PhaseView, _Mapping]] = ..., why: _Optional[str] = ...) -> None: ...
