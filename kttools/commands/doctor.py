"""kttools doctor: what this machine can run, and what slows it."""

import json
from typing import Any

import click

from kttools.options import json_option

EPILOG = """\b
Example:
  kttools doctor --json > machine.json
"""


@click.command(epilog=EPILOG, short_help="Show what this machine can run, and what slows it.")
@json_option
def command(as_json: bool) -> None:
    """Show CPU features, kernel tables, NUMA, memory, GPU and versions; each warning has its remedy."""
    from kttools.doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=1))
        return
    for name, facts in report.sections.items():
        click.echo(f"{name}:")
        for line in _lines(facts):
            click.echo(f"  {line}")
    for warning in report.warnings:
        click.echo(f"warning: {warning.what}\n  remedy: {warning.remedy}")
    if not report.warnings:
        click.echo("no warnings")


def _lines(facts: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{key}:")
            lines.extend(f"  {_row(row)}" for row in value)
        else:
            lines.append(f"{key.removesuffix('_bytes')}: {_shown(key, value)}")
    return lines


def _row(row: dict[str, Any]) -> str:
    if "supported" in row:
        reason = "runs here" if row["supported"] else f"no: lacks {', '.join(row['missing'])}"
        return f"{row['name']}: {reason}"
    return ", ".join(f"{key.removesuffix('_bytes')} {_shown(key, value)}" for key, value in row.items())


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "no limit" if key in NO_LIMIT else "none"
    if key.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB" if value >= 1 << 30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


NO_LIMIT = {"cgroup_cpus", "cgroup_limit_bytes", "memlock_limit_bytes"}
