"""Tables in the making, compared on the probe documents: what gains significantly is kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .layerwise import Policies, Window
from .measure import Measured
from .profile_file import Profile
from .sensitivity import Sensitivity

# A change is kept when its paired gain on the probe documents is this many standard errors from nothing.
SIGNIFICANT = 2.0
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A table in the making, and what it measured on the probe documents. predicted: its priced KL."""

    name: str
    policies: Policies
    measured: Measured
    predicted: float | None = None


@dataclass(slots=True)
class Trials:
    """Every comparison that was made, in order, as the table's provenance tells it."""

    say: Say
    candidates: list[Candidate] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def enter(self, candidate: Candidate) -> Candidate:
        """Notes a candidate that is compared with nothing yet."""
        self.candidates.append(candidate)
        measured = candidate.measured
        self.say(f"{candidate.name}: KL {measured.kl_mean:.6f} at {measured.k_mean():.3f} experts")
        return candidate

    def better(self, ingredient: str, best: Candidate, other: Candidate, is_served: bool = True) -> Candidate:
        """`other` where its paired gain over `best` is significant, else `best`.

        is_served False: tables cannot say `other`; it is measured and never kept.
        """
        gain, error = paired_gain(best.measured, other.measured)
        is_kept = is_served and gain > SIGNIFICANT * error
        self.candidates.append(other)
        self.steps.append(
            {
                "ingredient": ingredient,
                "tried": other.name,
                "against": best.name,
                "kl": other.measured.kl_mean,
                "kl_against": best.measured.kl_mean,
                "k_mean": other.measured.k_mean(),
                "gain": gain,
                "standard_error": error,
                "kept": is_kept,
            }
        )
        self.say(
            f"{ingredient}: {other.name}: KL {other.measured.kl_mean:.6f} against "
            f"{best.measured.kl_mean:.6f}, gain {gain:.6f} +- {error:.6f}: "
            f"{'kept' if is_kept else 'not kept'}"
        )
        return other if is_kept else best


@dataclass(frozen=True, slots=True)
class Allocation:
    """Both kinds, and everything that the tables' provenance tells."""

    static: Candidate
    adaptive: Candidate
    trials: Trials
    sensitivity: dict[int, Sensitivity]
    k0: int
    chosen: dict[str, str]

    @property
    def best(self) -> Candidate:
        return self.static if self.best_kind == "static" else self.adaptive

    @property
    def best_kind(self) -> str:
        """The kind that measured better on the probe documents."""
        is_static = self.static.measured.kl_mean < self.adaptive.measured.kl_mean
        return "static" if is_static else "adaptive"


def paired_gain(old: Measured, new: Measured) -> tuple[float, float]:
    """Mean KL of old minus new per token, and its standard error over documents."""
    before, tokens = old.kl_vector()
    after, _ = new.kl_vector()
    difference = before - after
    mean = difference.sum() / tokens.sum()
    spread = (difference - mean * tokens).square().sum().sqrt() / tokens.sum()
    return float(mean), float(spread)


def provenance(allocation: Allocation, profile: Profile, probes: list[Window]) -> dict[str, Any]:
    """What a table says about how it was made."""
    layers = {
        str(i): {
            "d": s.d,
            "standard_error": s.standard_error,
            "noise": s.noise,
            "epsilon": s.epsilon,
            "s": s.s,
        }
        for i, s in allocation.sensitivity.items()
    }
    taken = {id(allocation.static.measured), id(allocation.adaptive.measured)}
    candidates = []
    for candidate in allocation.trials.candidates:
        first = next(iter(candidate.policies.values()))
        candidates.append(
            {
                "name": candidate.name,
                "kind": first.kind,
                "order": first.order,
                "k_mean": candidate.measured.k_mean(),
                "kl": candidate.measured.kl_mean,
                "chosen": id(candidate.measured) in taken,
            }
        )
    predicted = [
        {"name": c.name, "kl_predicted": c.predicted, "kl_measured": c.measured.kl_mean}
        for c in allocation.trials.candidates
        if c.predicted is not None
    ]
    return {
        "profile_sha256": profile.header["sidecar"]["sha256"],
        "domains": sorted(profile.stats),
        "probes": {
            "documents": len({(w.domain, w.document) for w in probes}),
            "tokens": sum(len(w.token_ids) for w in probes),
        },
        "sensitivity": {"k0": allocation.k0, "layers": layers},
        "ingredients": allocation.chosen,
        "steps": allocation.trials.steps,
        "candidates": candidates,
        "predicted": predicted,
    }
