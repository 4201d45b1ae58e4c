"""The body of the router's Triton kernel; imported by fused_router.py where Triton is installed."""

# mypy: ignore-errors
import triton.language as tl


def route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    scale,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    EPS: tl.constexpr,
):
    """One program: one token. Experts lie as [GROUPS, SIZE], both rounded up to powers of two."""
    token = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    expert = group[:, None] * GROUP_SIZE + member[None, :]
    is_expert = (group[:, None] < NUM_GROUPS) & (member[None, :] < GROUP_SIZE)
    at = logits_ptr + token * NUM_GROUPS * GROUP_SIZE + expert
    logits = tl.load(at, mask=is_expert, other=float("-inf"))
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
        choice = scores + tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
        choice = tl.where(is_expert, choice, float("-inf"))
    else:
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
        choice = tl.where(is_expert, scores, float("-inf"))
    if KEPT_GROUPS < NUM_GROUPS:
        best = tl.max(choice, axis=1)
        if IS_SIGMOID:
            first = tl.min(tl.where(choice == best[:, None], member[None, :], SIZE), axis=1)
            best += tl.max(tl.where(member[None, :] == first[:, None], float("-inf"), choice), axis=1)
            best = tl.where(group < NUM_GROUPS, best, float("-inf"))
        is_kept = group < 0
        for _ in range(KEPT_GROUPS):
            taken = tl.min(tl.where(best == tl.max(best, axis=0), group, GROUPS), axis=0)
            is_kept = is_kept | (group == taken)
            best = tl.where(group == taken, float("-inf"), best)
        choice = tl.where(is_kept[:, None], choice, float("-inf"))
    place = tl.arange(0, PLACES)
    ids = tl.zeros((PLACES,), tl.int32)
    weights = tl.zeros((PLACES,), tl.float32)
    last = NUM_GROUPS * GROUP_SIZE - 1
    for turn in range(K):
        top = tl.max(tl.max(choice, axis=1), axis=0)
        found = tl.min(tl.min(tl.where(choice == top, expert, last), axis=1), axis=0)
        is_found = expert == found
        weight = tl.sum(tl.sum(tl.where(is_found & is_expert, scores, 0.0), axis=1), axis=0)
        ids = tl.where(place == turn, found, ids)
        weights = tl.where(place == turn, weight, weights)
        choice = tl.where(is_found, float("-inf"), choice)
    if IS_NORMALISED:
        weights = weights / (tl.sum(weights, axis=0) + EPS)
    tl.store(ids_ptr + token * K + place, ids.to(tl.int64), mask=place < K)
    tl.store(weights_ptr + token * K + place, weights * scale, mask=place < K)
