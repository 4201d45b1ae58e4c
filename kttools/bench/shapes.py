"""What is measured: the size of one MoE layer."""

from dataclasses import dataclass

from kttools_runtime.errors import UsageError

PRESETS = {"v3": (7168, 2048), "qwen3": (2048, 768)}  # DeepSeek-V3, Qwen3-30B-A3B


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The routed experts of one layer. Raises UsageError for sizes that make no layer."""

    name: str
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.moe_intermediate_size, self.num_experts, self.top_k) < 1:
            raise UsageError(f"shape {self.name}: every size must be positive")
        if self.top_k > self.num_experts:
            raise UsageError(f"top-k {self.top_k} of {self.num_experts} experts: ids must be distinct")

    @property
    def weights_per_expert(self) -> int:
        """gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def operations(self, num_tokens: int) -> float:
        """Of one call; a multiply-add is two."""
        return 2.0 * num_tokens * self.top_k * self.weights_per_expert


def parse_shape(text: str, num_experts: int, top_k: int) -> LayerShape:
    """A preset's name or HIDDENxINTERMEDIATE. Raises UsageError."""
    sizes = PRESETS.get(text.lower())
    if sizes is None:
        hidden, _, intermediate = text.lower().partition("x")
        if not (hidden.isdecimal() and intermediate.isdecimal()):
            valid = ", ".join(PRESETS)
            raise UsageError(f"unknown shape {text!r}: expected {valid} or HIDDENxINTERMEDIATE (7168x2048)")
        sizes = int(hidden), int(intermediate)
    return LayerShape(text.lower(), sizes[0], sizes[1], num_experts, top_k)
