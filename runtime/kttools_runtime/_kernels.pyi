"""Types of the C++ extension (csrc/bindings.cpp). bf16 travels as uint16 bits; arrays are C-contiguous.

An array of another dtype, shape or layout raises ValueError, and so does every other bad value.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypedDict, final, overload

import numpy as np
import numpy.typing as npt

_F32: TypeAlias = npt.NDArray[np.float32]
_U8: TypeAlias = npt.NDArray[np.uint8]
_I8: TypeAlias = npt.NDArray[np.int8]
_I64: TypeAlias = npt.NDArray[np.int64]
_Float: TypeAlias = npt.NDArray[np.float32 | np.uint16]
"""float32, or uint16 that holds the bits of bf16."""

class _IsaRow(TypedDict):
    name: str
    supported: bool
    missing: list[str]

FORMATS: dict[str, int]
"""Names and ids of the pack formats that weights can be quantised to."""

BLOCK_FORMATS: dict[str, int]
"""Names and ids of the pack formats that hold ggml's blocks; q4_k_q6_k: q6_k for down."""

def cpu_features() -> dict[str, bool]:
    """Every feature a kernel table may ask for, and whether it can be used here."""

def isa_report() -> list[_IsaRow]:
    """Every kernel table of this build, best first, with the features this CPU lacks."""

def numa_nodes() -> list[list[int]]:
    """The CPUs of each memory node that this process may use; at least one node."""

def available_isas() -> list[str]:
    """Names of the kernel tables that run here, best first."""

def expert_bytes(format: str, hidden_size: int, moe_intermediate_size: int) -> int:
    """Length of one expert's blob, a multiple of 4096."""

def pack_expert(format: str, gate: _Float, up: _Float, down: _Float, out: _U8) -> None:
    """gate, up [I, H], down [H, I] into out [expert_bytes]. NaN and inf are refused, naming the place."""

def error_sums(source: _F32, stored: _F32) -> tuple[float, float, float, float]:
    """Of vectors: squares of source, stored and difference in float64, and the largest difference."""

def expert_errors(
    format: str, gate: _Float, up: _Float, down: _Float, blob: _U8
) -> tuple[tuple[float, float, float, float], ...]:
    """error_sums() of gate, up and down against what pack_expert() made of them; no block format."""

def unpack_expert(
    format: str, blob: _U8, hidden_size: int, moe_intermediate_size: int
) -> tuple[_F32, _F32, _F32]:
    """gate, up [I, H], down [H, I]: the weights that a blob stands for."""

def pack_ggml_expert(
    format: str, hidden_size: int, moe_intermediate_size: int, gate: _U8, up: _U8, down: _U8, out: _U8
) -> None:
    """Rows of ggml blocks (gate, up: I rows of H; down: H of I) into out [expert_bytes], bit for bit.

    A scale that is NaN or inf is refused, naming the place.
    """

def unpack_ggml_expert(
    format: str, hidden_size: int, moe_intermediate_size: int, blob: _U8
) -> tuple[_U8, _U8, _U8]:
    """The bytes of gate, up and down that pack_ggml_expert was given."""

GGML_TYPES: dict[str, tuple[int, int]]

def decode_ggml(type: str, data: _U8) -> _F32:
    """Whole blocks of one of GGML_TYPES (name: weights and bytes of a block). The GIL is released."""

GGML_CODEBOOKS: dict[str, tuple[int, int, int]]

def decode_codebook(type: str, data: _U8, grid: _I8) -> _F32:
    """decode_ggml for GGML_CODEBOOKS (name: bytes of a block of 256, rows and columns of its grid)."""

def decode_fp8(
    codes: _U8, scales: _F32, block_rows: int, block_cols: int, first_row: int, out: npt.NDArray[np.uint16]
) -> bool:
    """bf16 of e4m3 codes [N, K] times the scale of their block; False when a code is NaN."""

def quantize_int8(w: _Float) -> tuple[_I8, _F32]:
    """w [N, K] -> q [N, K], row_scale [N]."""

def quantize_int4(w: _Float, group_size: int) -> tuple[_U8, _U8, _U8, _F32]:
    """w [N, K] -> q [N, Kp / 2], group_scale and group_zero [N, Kp / group_size], row_scale [N]."""

def dequantize_int4(
    q: _U8, group_scale: _U8, group_zero: _U8, row_scale: _F32, in_features: int, group_size: int
) -> _F32:
    """[N, in_features]: row_scale * (group_scale * q - group_zero)."""

@overload
def measure_bandwidth(engine: Engine, bytes: int) -> float:
    """Bytes per second of reading so many fresh bytes with all threads; no cache must hold them."""

@overload
def measure_bandwidth(engine: Engine, memory: _U8) -> float:
    """The same of memory that is there."""

def measure_compute(engine: Engine, seconds: float, format: str = "int8") -> float:
    """Operations per second of the table's dot products with operands in L1; a multiply-add is two."""

class Engine:
    """Threads, a kernel table and scratch memory, shared by every layer of a model."""

    def __init__(
        self, threads: int, isa: str | None = None, numa: str = "off", simulated_nodes: int = 0
    ) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int:
        """Held now: what the largest call so far needed."""
    @property
    def isa(self) -> str: ...

@final
class ExpertLayer:
    """The routed experts of one MoE layer, over blobs that are used in place and kept alive."""

    def __init__(
        self,
        engine: Engine,
        hidden_size: int,
        moe_intermediate_size: int,
        formats: Sequence[str],
        blobs: Sequence[_U8],
    ) -> None: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def node_bytes(self) -> list[int]: ...
    def make_resident(self, expert: int) -> None: ...
    def set_biases(self, gate: _F32, up: _F32, down: _F32) -> None:
        """gate, up [E, I], down [E, H]: added to the matrices' outputs."""

    def set_gate(self, alpha: float, limit: float, up_offset: float) -> None:
        """g * sigmoid(alpha g) * (u + up_offset), g = min(gate, limit), u = up within +-limit."""

    def forward(self, x: _Float, expert_ids: _I64, expert_weights: _F32, out: _F32) -> None:
        """x [T, H], ids and weights [T, k] -> out [T, H], overwritten. The GIL is released."""

@final
class PackedLinear:
    """A dense matrix in the strips of the kernels."""

    @staticmethod
    def from_bf16(engine: Engine, w: npt.NDArray[np.uint16]) -> PackedLinear:
        """w [N, K]."""

    @staticmethod
    def from_int8(engine: Engine, q: _I8, row_scale: _F32) -> PackedLinear:
        """q [N, K], row_scale [N]."""

    @staticmethod
    def from_int4(
        engine: Engine,
        q: _U8,
        group_scale: _U8,
        group_zero: _U8,
        row_scale: _F32,
        in_features: int,
        group_size: int,
    ) -> PackedLinear:
        """As quantize_int4 returns them."""

    @staticmethod
    def from_blocks(engine: Engine, format: str, blocks: _U8, in_features: int) -> PackedLinear:
        """format: q4_k, q5_k, q6_k or q8_0; blocks [N, bytes of a row], as ggml stores them."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def forward(self, x: _Float, out: _Float) -> None:
        """x [T, K] -> out [T, N]. The GIL is released."""

_Norm: TypeAlias = tuple[_F32, float]
"""sqrt(n) weight [n], and n eps."""

MAX_STEP_ROWS: int
"""Tokens that a step takes at most."""

@final
class ExpertRule:
    """What an expert table keeps of a token's native choice; the fields of expert_policy.LayerPolicy."""

    def __init__(
        self,
        *,
        kind: str,
        order: str,
        num_experts: int,
        choices: int,
        k: int,
        k_min: int,
        k_max: int,
        threshold: float,
        sigma: float,
        renormalise: bool,
        alpha: _F32 | None = None,
        ratios: _F32 | None = None,
        norms: _F32 | None = None,
        protect: npt.NDArray[np.bool_] | None = None,
    ) -> None: ...
    @property
    def width(self) -> int:
        """Ids and weights of a token: as many as are kept, or all choices, with id -1 for the dropped."""

@final
class Router:
    """Scores, group limit, the best k and their weights; kind: sigmoid_bias_groups or softmax_groups."""

    def __init__(
        self,
        engine: Engine,
        kind: str,
        groups: int,
        top_groups: int,
        k: int,
        normalise: bool,
        scale: float,
        weight: _F32,
        bias: _F32 | None = None,
        logit_bias: _F32 | None = None,
    ) -> None: ...
    def forward(
        self,
        x: _F32,
        ids: _I64,
        weights: _F32,
        scores: _F32 | None = None,
        rule: ExpertRule | None = None,
    ) -> None:
        """x [T, H] -> ids and weights, best first, and what was compared, [T, k] each. The GIL is released.

        rule: keeps of them what it keeps, [T, rule.width], and there are no scores.
        """

@final
class DenseStep:
    """hidden += down(silu(gate) * up) of the normed hidden; gate_up: one matrix or two."""

    def __init__(
        self, engine: Engine, norm: _Norm, gate_up: Sequence[PackedLinear], down: PackedLinear
    ) -> None: ...
    def forward(self, hidden: _F32) -> None:
        """hidden [T, H], updated. The GIL is released."""

@final
class MoeStep:
    """hidden += routed and shared experts of the normed hidden."""

    def __init__(
        self,
        engine: Engine,
        norm: _Norm,
        router: Router,
        experts: ExpertLayer,
        shared_gate_up: Sequence[PackedLinear],
        shared_down: PackedLinear | None = None,
        shared_gate: _F32 | None = None,
    ) -> None: ...
    def forward(self, hidden: _F32, rule: ExpertRule | None = None) -> None:
        """hidden [T, H], updated; rule: what is kept of the router's choice. The GIL is released."""

    def route(
        self,
        hidden: _F32,
        x: _F32,
        ids: _I64,
        weights: _F32,
        scores: _F32 | None = None,
        rule: ExpertRule | None = None,
    ) -> None:
        """hidden -> x [T, H], the normed hidden, and its choice as Router.forward gives it."""

    def forward_routed(self, hidden: _F32, x: _F32, ids: _I64, weights: _F32) -> None:
        """forward() from where route() ends, with its choice or one [T, any k] made of it."""

@final
class LatentStep:
    """hidden += multi-head latent attention of the normed hidden."""

    @property
    def takes_many(self) -> bool:
        """Whether more than MAX_STEP_ROWS tokens may come at once."""

    def __init__(
        self,
        engine: Engine,
        rope: int,
        softmax_scale: float,
        norm: _Norm,
        inputs: Sequence[PackedLinear],
        q_norm: _Norm | None,
        q_b: PackedLinear | None,
        kv_norm: _Norm,
        up_key: npt.NDArray[np.uint16],
        up_value: npt.NDArray[np.uint16],
        out: PackedLinear,
    ) -> None:
        """up_key [heads, nope, latent] and up_value [heads, value, latent] are read in place."""

    def forward(self, hidden: _F32, rotations: _F32, cache: npt.NDArray[np.uint16], start: int) -> None:
        """hidden [T, H] and rows start... of cache [C, latent + rope] are updated. The GIL is released."""

@final
class GqaStep:
    """hidden += grouped-query attention of the normed hidden, for at most MAX_STEP_ROWS tokens."""

    @property
    def takes_many(self) -> bool:
        """No: many tokens go through torch's flash kernel."""

    def __init__(
        self,
        engine: Engine,
        *,
        heads: int,
        kv_heads: int,
        dim: int,
        rope: int,
        window: int | None = None,
        softmax_scale: float,
        norm: _Norm,
        inputs: Sequence[PackedLinear],
        out: PackedLinear,
        input_bias: _F32 | None = None,
        q_norm: _Norm | None = None,
        k_norm: _Norm | None = None,
        sinks: _F32 | None = None,
        out_bias: _F32 | None = None,
    ) -> None:
        """inputs: [q | k | v] in one or one each; q_norm and k_norm of every head; sinks [heads]."""

    def forward(self, hidden: _F32, rotations: _F32, cache: npt.NDArray[np.uint16], start: int) -> None:
        """hidden [T, H] and rows start... of cache [C, 2 kv_heads dim] are updated. The GIL is released."""

SUBMIT_CALL: int
SYNC_CALL: int
"""Addresses of the host functions void(void*) whose argument is an ExpertCall's address."""

def loaded_cudart() -> str:
    """File name of the CUDA runtime in this process; empty: none is loaded."""

def launch_host_function(stream: int, function: int, argument: int) -> None:
    """Enqueue on a CUDA stream. Raises RuntimeError where no CUDA runtime is loaded."""

@final
class ExpertQueue:
    """A thread that computes calls in the order of their submission."""

    def __init__(self, timeout_s: float) -> None: ...
    def wait_idle(self, seconds: float) -> bool: ...
    def take_error(self) -> str:
        """What went wrong first since the last time; empty: nothing."""

    def inject(self, delay_s: float = 0.0, error: str = "", skipped: int = 0) -> None:
        """For tests: the next call takes longer, or fails."""

    @property
    def stats(self) -> dict[str, float]:
        """calls, busy_s (computing), waited_s (streams held up)."""

@final
class ExpertCall:
    """The argument block of one layer over host buffers: x [R, H], ids and weights [R, k], out [R, H]."""

    def __init__(
        self, queue: ExpertQueue, layer: ExpertLayer, x: _Float, ids: _I64, weights: _F32, out: _F32
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    def set_rows(self, rows: int) -> None: ...
    @property
    def address(self) -> int: ...
    def submit(self) -> None: ...
    def sync(self) -> None:
        """Errors are the queue's (take_error)."""

@final
class SimEvent:
    """A point in a simulated stream."""

    def hold(self, seconds: float) -> bool:
        """Wait for the newest point; False: it was not reached in time."""

@final
class SimStream:
    """A thread that runs what is enqueued, in order."""

    def copy(self, to: npt.NDArray[np.generic], source: npt.NDArray[np.generic]) -> None: ...
    def host(self, function: int, argument: int) -> None: ...
    def compute(self, work: Callable[[], object]) -> None: ...
    def record(self, event: SimEvent) -> None: ...
    def wait(self, event: SimEvent) -> None: ...
    def synchronize(self, seconds: float) -> bool:
        """False: not finished after the time. Raises what a computation raised first."""
