"""The compiled extension: attention kernels for the CPU, chosen at run time for the machine they run on."""

from collections.abc import Callable
from typing import Any, TypeAlias

# (address, dtype code, sizes, strides in elements). Codes: see DTYPE_CODES.
Tensor: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]

__version__: str

UNBOUNDED: int
DTYPE_CODES: dict[str, int]

def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    dropout_seed: int,
    dropout_offset: int,
    window_left: int,
    window_right: int,
    num_threads: int,
    kv_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    block_table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> None: ...
def attention_insight(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    keys: Tensor,
    weights: Tensor,
    entropy: Tensor,
    key_mass: Tensor,
    edges: Tensor | None,
    distance_mass: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    num_threads: int,
    kv_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> None: ...
def update_caches(
    tensors: tuple[Tensor | None, ...], capacity: int, query_step: int, interleaved: bool, num_threads: int
) -> None:
    """Take those of CacheViews in csrc/bindings/cache_params.h, in that order."""

def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    grad_slopes: Tensor | None,
    grad_sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    dropout_seed: int,
    dropout_offset: int,
    window_left: int,
    window_right: int,
    num_threads: int,
    kv_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> None: ...
def bind_torch(
    tensor: type,
    parameter: type,
    strided: object,
    dtypes: tuple[object, ...],
    empty_like: Callable[..., Any],
    exchange: object,
) -> None: ...
def attention_cached(*arguments: Any) -> Any:
    """Take query, caches, scales, new rows, then the rest as `fastattn.kvcache` hands them on."""

def attention_plain_numpy(
    query: Any,
    key: Any,
    value: Any,
    kv_lengths: Any,
    causal: bool,
    scale: float | None,
    bshd: bool,
    num_threads: int,
) -> Any: ...
def attention_plain_torch(
    query: Any,
    key: Any,
    value: Any,
    kv_lengths: Any,
    causal: bool,
    scale: float | None,
    bshd: bool,
    return_lse: bool,
    num_threads: int,
) -> Any: ...
def attention_plain_backward(
    grad_out: Any,
    grad_lse: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    wanted: tuple[bool, ...],
    causal: bool,
    scale: float | None,
    bshd: bool,
    num_threads: int,
) -> Any: ...
def describe_path(dtype: int, seqlen_q: int) -> str: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def selected_isa() -> str: ...
def select_isa(name: str | None) -> None: ...
def cpu_features() -> dict[str, bool]: ...
def cpu_name() -> str: ...
def build_info() -> dict[str, str]: ...
def openmp_info() -> dict[str, str]: ...
def available_cpus() -> int: ...
def runs_alone() -> bool: ...
def scratch_info() -> dict[str, int]: ...
def measure_peak(kind: str, num_threads: int, seconds: float) -> float: ...
def read_once(address: int, bytes: int, num_threads: int) -> float: ...
