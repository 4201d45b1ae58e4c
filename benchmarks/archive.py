"""What packing a bundle gains and costs, and unpacking beside plain zstd on the same data.

    python benchmarks/archive.py BUNDLE [BUNDLE ...] --work DIR [--repeat 3] [-t 2] [--level 1] [--json]

Every bundle is packed once: size and speed, and the ratio of each kind of file in it (from the archive's own
index). With the largest of them: its tar is compressed by `zstd -LEVEL -T<t>`, and then, interleaved, in
processes of their own, `kttools bundle unpack` (which hashes every file with SHA-256 and flushes it) and
`zstd -d -T<t>` of that file, alone and followed by a flush of its output; a ratio is that of one repetition.
Then one layer alone, and whether every file came back as it was. DIR needs the largest bundle's size three
times; what is made there is removed. Prints a Markdown table, or one JSON document (--json).
"""

import argparse
import filecmp
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kttools.bench.report import machine
from kttools.bundle.archive import Archive
from kttools.bundle.manifest import collect_files
from kttools_runtime.manifest import Manifest

KTTOOLS = (sys.executable, "-m", "kttools", "--quiet")


def run(command: Sequence[str | Path], stdin: Any = None) -> dict[str, float]:
    """Wall and CPU seconds and peak RSS (MiB) of a command that must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdin=stdin, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} exited with {process.returncode}")
    wall = time.perf_counter() - started
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "rss_mib": used.ru_maxrss / 1024}


def kind_of(name: str, manifest: Manifest) -> str:
    """Experts by format, shards by the format most of their linears have, the rest together."""
    for pack in manifest.experts.values():
        if pack.file == name:
            return f"experts {pack.format}"
    if name.endswith(".safetensors"):
        found = list(manifest.linears.values())
        return f"shards {max(set(found), key=found.count)}" if found else "shards"
    return "other files"


def ratios(archive: Path) -> list[dict[str, Any]]:
    """Bytes before and after for each kind of file."""
    sums: dict[str, list[int]] = {}
    with Archive([archive]) as opened:
        for index, member in enumerate(opened.members):
            frames = opened.layout.frames_of(index)
            packed = sum(opened.packed_bytes(number) for number in frames)
            total = sums.setdefault(kind_of(member.name, opened.manifest), [0, 0])
            total[0] += member.bytes
            total[1] += packed
    return [
        {"kind": kind, "bytes": before, "packed_bytes": after, "ratio": after / before}
        for kind, (before, after) in sorted(sums.items())
    ]


def pack(bundle: Path, work: Path, threads: int, level: int) -> dict[str, Any]:
    archive = work / f"{bundle.name}.ktz"
    options = ("--threads", str(threads), "--level", str(level), "--force")
    used = run([*KTTOOLS, "bundle", "pack", bundle, "-o", archive, *options])
    with Archive([archive]) as opened:
        total = sum(member.bytes for member in opened.members)
    speed = total / used["wall"] / 1e6
    sizes = {"bytes": total, "packed_bytes": archive.stat().st_size}
    return {"bundle": bundle.name, **sizes, "mb_per_second": speed, **used, "kinds": ratios(archive)}


def plain(bundle: Path, work: Path, threads: int, level: int) -> Path:
    """The tar of the bundle, compressed by the zstd program."""
    target = work / "plain.tar.zst"
    with subprocess.Popen(["tar", "cf", "-", "-C", bundle, "."], stdout=subprocess.PIPE) as tar:
        run(["zstd", "-q", "-f", f"-{level}", f"-T{threads}", "-", "-o", target], stdin=tar.stdout)
    return target


def compare(bundle: Path, work: Path, threads: int, repeat: int, level: int) -> dict[str, Any]:
    """Interleaved: ours, zstd's, ours, ..."""
    archive, compressed = work / f"{bundle.name}.ktz", plain(bundle, work, threads, level)
    out, tar = work / "out", work / "plain.tar"
    rounds = []
    for number in range(repeat):
        ours = run([*KTTOOLS, "bundle", "unpack", archive, "-o", out, "--threads", str(threads)])
        same = number or is_same(bundle, out)
        shutil.rmtree(out)
        os.sync()
        theirs = run(["zstd", "-q", "-d", f"-T{threads}", compressed, "-o", tar])
        flushed = run(["sync", tar])["wall"] + theirs["wall"]
        tar.unlink()
        os.sync()
        if not same:
            raise SystemExit(f"{out}: not what was packed")
        rounds.append({"unpack": ours, "zstd": theirs, "zstd_and_flush_wall": flushed})
    total = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {
        "bundle": bundle.name,
        "bytes": total,
        "unpack_mb_per_second": total / statistics.median(r["unpack"]["wall"] for r in rounds) / 1e6,
        "zstd_mb_per_second": total / statistics.median(r["zstd"]["wall"] for r in rounds) / 1e6,
        "speed_over_zstd": statistics.median(r["zstd"]["wall"] / r["unpack"]["wall"] for r in rounds),
        "speed_over_zstd_and_flush": statistics.median(
            r["zstd_and_flush_wall"] / r["unpack"]["wall"] for r in rounds
        ),
        "unpack_rss_mib": max(r["unpack"]["rss_mib"] for r in rounds),
        "is_identical": True,
        "one_file": one_file(archive, out, threads),
        "rounds": rounds,
    }


def one_file(archive: Path, out: Path, threads: int) -> dict[str, Any]:
    """The last pack alone."""
    with Archive([archive]) as opened:
        layers = opened.manifest.experts
        member = next(m for m in opened.members if m.name == layers[max(layers)].file)
    options = ("--only", member.name, "--threads", str(threads))
    used = run([*KTTOOLS, "bundle", "unpack", archive, "-o", out, *options])
    shutil.rmtree(out)
    return {"file": member.name, "bytes": member.bytes, **used}


def is_same(bundle: Path, out: Path) -> bool:
    names = ["bundle.json", *collect_files(bundle)]
    same, _, _ = filecmp.cmpfiles(bundle, out, names, shallow=False)
    return len(same) == len(names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    made = [pack(bundle, options.work, options.threads, options.level) for bundle in options.bundles]
    largest = max(range(len(made)), key=lambda index: made[index]["bytes"])
    for index, bundle in enumerate(options.bundles):
        if index != largest:
            (options.work / f"{bundle.name}.ktz").unlink()
    arguments = (options.work, options.threads, options.repeat, options.level)
    compared = compare(options.bundles[largest], *arguments)
    for name in (f"{options.bundles[largest].name}.ktz", "plain.tar.zst"):
        (options.work / name).unlink()
    version = subprocess.run(["zstd", "--version"], capture_output=True, text=True).stdout.strip()
    document = {
        **machine(),
        "python": platform.python_version(),
        "zstd": version.strip("* "),
        "threads": options.threads,
        "level": options.level,
        "packed": made,
        "compared": compared,
    }
    print(json.dumps(document, indent=1) if options.json else text(document))


def text(document: dict[str, Any]) -> str:
    lines = ["| bundle | kind | MB | packed MB | ratio | pack MB/s |", "|--|--|--|--|--|--|"]
    for made in document["packed"]:
        rows = [*made["kinds"], {"kind": "all", **made, "ratio": made["packed_bytes"] / made["bytes"]}]
        for row in rows:
            speed = f"{row['mb_per_second']:.0f}" if "mb_per_second" in row else ""
            sizes = f"{row['bytes'] / 1e6:.1f} | {row['packed_bytes'] / 1e6:.1f} | {row['ratio']:.3f}"
            lines.append(f"| {made['bundle']} | {row['kind']} | {sizes} | {speed} |")
    found = document["compared"]
    lines += [
        "",
        f"{found['bundle']}, {document['threads']} threads: unpack {found['unpack_mb_per_second']:.0f} MB/s, "
        f"{found['speed_over_zstd']:.2f} of plain zstd's {found['zstd_mb_per_second']:.0f} MB/s, "
        f"{found['speed_over_zstd_and_flush']:.2f} of zstd and a flush; "
        f"peak RSS {found['unpack_rss_mib']:.0f} MiB; identical",
        f"{found['one_file']['file']} alone: {found['one_file']['wall']:.1f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
