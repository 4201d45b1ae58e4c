"""A difference as text: a line per role and stored type, the worst tensors, what could not be compared."""

from kttools.quantize.report import by_role, worst

from .diff import Difference

LISTED = 8


def as_text(result: Difference, worst_count: int) -> str:
    different = sum(error.relative_rms > 0 for error in result.errors)
    lines = [
        f"{'role':<14} {'stored as':<16} {'tensors':>8}  {'mean rel. rms':>13}  {'worst':>9}  {'cosine':>9}"
    ]
    lines += [
        f"{r.role:<14} {r.format:<16.16} {r.matrices:>8}  {r.mean_relative_rms:>13.6f}  "
        f"{r.worst_relative_rms:>9.6f}  {r.mean_cosine:>9.6f}"
        for r in by_role(result.errors)
    ]
    listed = worst(result.errors, worst_count)
    if listed:
        lines.append("worst by relative rms:")
        lines += [f"  {e.relative_rms:.6f}  max {e.max_abs_error:.3g}  {e.format}  {e.name}" for e in listed]
    lines += [f"not compared: {line}" for line in result.missing[:LISTED]]
    if len(result.missing) > LISTED:
        lines.append(f"not compared: {len(result.missing) - LISTED} more")
    lines.append(f"{len(result.errors)} tensors compared, {different} differ")
    return "\n".join(lines)
