"""Policies that are given by their parameters alone, as `evaluate --policies` spells them.

flat:K                   the first K of the router's order, renormalised: what --experts K runs
flat-alpha:K:A           the same, the kept weights times A instead of renormalised
ser:KMIN:T               ik_llama.cpp's -ser: ranks from KMIN on need T times the best biased score
top-p:P                  the fewest experts with a share P of the weight, renormalised
"""

import math
from dataclasses import dataclass

import torch

from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UsageError
from kttools_runtime.expert_policy import LayerPolicy

from .knapsack import share_evenly
from .layerwise import Policies

# The parameters of each kind, in order.
KINDS = {"flat": ("K",), "flat-alpha": ("K", "A"), "ser": ("KMIN", "T"), "top-p": ("P",)}
RANGES = {"K": (1, 1e6), "A": (1e-6, 1e6), "KMIN": (1, 1e6), "T": (0, 1), "P": (0, 1)}
EXAMPLE = "for example flat:6, flat-alpha:6:1.1, ser:5:0.79 or top-p:0.8"


@dataclass(frozen=True, slots=True)
class PlainPolicy:
    """One policy as it was written. numbers: its parameters in the order of KINDS."""

    text: str
    kind: str
    numbers: tuple[float, ...]

    @property
    def is_flat(self) -> bool:
        """Whether others are compared with it."""
        return self.kind == "flat"

    @property
    def label(self) -> str:
        shown = [f"{number:g}" for number in self.numbers]
        forms = {
            "flat": "flat top-{}, renormalised",
            "flat-alpha": "flat top-{}, times {}",
            "ser": "-ser {},{}",
            "top-p": "top-p {}, renormalised",
        }
        return forms[self.kind].format(*shown)

    def policies(self, config: ModelConfig) -> Policies:
        """The rule in every MoE layer. Raises UsageError for more experts than the model chooses."""
        native, layers = config.num_experts_per_tok, list(config.moe_layers)
        if self.kind != "top-p" and not 1 <= self.numbers[0] <= native:
            raise UsageError(f"policy {self.text!r}: expected 1 to {native} experts, the model's own")
        if self.kind == "flat":
            return flat_rule(layers, self.numbers[0])
        if self.kind == "flat-alpha":
            return flat_rule(layers, self.numbers[0], torch.full((native,), self.numbers[1]))
        if self.kind == "ser":
            k_min, threshold = int(self.numbers[0]), self.numbers[1]
            return counted_rule(layers, native, "ser", "choice", threshold, k_min, False)
        return counted_rule(layers, native, "top_p", "weight", self.numbers[0], 1, True)


def parse_plain(text: str) -> PlainPolicy:
    """One policy from its string. Raises UsageError naming what is wrong."""
    kind, *values = text.strip().split(":")
    if kind not in KINDS:
        raise UsageError(f"policy {text!r}: unknown kind, expected one of {', '.join(KINDS)}; {EXAMPLE}")
    names = KINDS[kind]
    if len(values) != len(names):
        hint = (
            "; scales fitted to each layer need a profile, and are given as a table" if "A" in names else ""
        )
        raise UsageError(f"policy {text!r}: expected {':'.join((kind, *names))}{hint}")
    numbers = tuple(_number(text, name, value) for name, value in zip(names, values, strict=True))
    return PlainPolicy(text.strip(), kind, numbers)


def flat_rule(layers: list[int], mean: float, alpha: torch.Tensor | None = None) -> Policies:
    """The first k of the router's order, renormalised, or times alpha [K] (index k - 1) where given.

    A mean that is no whole number is spread evenly over the layers.
    """
    ks = share_evenly(mean, len(layers))
    return {
        i: LayerPolicy(kind="uniform", k=k, order="choice", renormalize=alpha is None, alpha=alpha)
        for i, k in zip(layers, ks, strict=True)
    }


def counted_rule(
    layers: list[int], native: int, kind: str, order: str, threshold: float, k_min: int, renormalize: bool
) -> Policies:
    """A rule that counts (ser, top_p) with one threshold, k_min to `native` experts, in every layer."""
    policy = LayerPolicy(
        kind=kind, order=order, threshold=threshold, k_min=k_min, k_max=native, renormalize=renormalize
    )
    return dict.fromkeys(layers, policy)


def _number(text: str, name: str, value: str) -> float:
    """A parameter in its range."""
    low, high = RANGES[name]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high or (name == "KMIN" and not number.is_integer()):
        what = "whole number" if name == "KMIN" else "number"
        raise UsageError(f"policy {text!r}: {name}: expected a {what} from {low:g} to {high:g}")
    return number
