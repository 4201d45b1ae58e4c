"""Whether llama.cpp and we agree: its files read by us, our files run by it, on one model.

python benchmarks/llama_cpp.py MODEL --bin BUILD/bin --converter convert_hf_to_gguf.py -o DIR

Converts MODEL (a Hugging Face directory) with llama.cpp's converter, quantises with llama-quantize, and
compares log-probabilities: llama-perplexity --save-all-logits against a bundle made of the same file. Each
file twice: in float32 from its decoded weights, and as a user runs it, its blocks kept (`--cpu-format q4_k`)
in bfloat16. Then writes the model with `kttools convert` and compares llama-cli's greedy answers with those
of its own conversion. Exit status 1 when a mean KL is above --bar or an answer differs.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

import kttools_runtime as kt

WINDOW_TOKENS = 512
PROMPTS = ("What is a mixture of experts?", "Define driveller.", "Write a function that adds two numbers.")
# llama.cpp's AMX build stops at an assertion with these two in other types.
KEPT = ("--tensor-type", "attn_k_b=bf16", "--tensor-type", "attn_v_b=bf16")
# Bundle formats of experts and linears, and the dtype they run in.
RUNS = (("bf16", "bf16", "float32"), ("q4_k", "bf16", "bfloat16"))

Rows = npt.NDArray[np.float64]


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr.decode()[-400:]}")
    return done.stdout.decode(errors="replace")


def kttools(*arguments: object) -> None:
    run(sys.executable, "-m", "kttools", *arguments, "--quiet", "--force")


def quantize(file: Path, bundle: Path, experts: str, linears: str) -> bool:
    """False when the file's blocks cannot be kept, as with rows that K-quants do not fill."""
    command = [sys.executable, "-m", "kttools", "quantize", file, "-o", bundle, "--quiet", "--force"]
    command += ["--cpu-format", experts, "--gpu-format", linears]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode and "keeps the blocks" not in done.stderr:
        raise SystemExit(f"kttools quantize ended with {done.returncode}: {done.stderr[-400:]}")
    return done.returncode == 0


@dataclass(frozen=True)
class Peer:
    """llama.cpp's programs."""

    directory: Path
    threads: int

    def convert(self, model: Path, file: Path, script: Path, python: Path) -> None:
        path = {**os.environ, "PYTHONPATH": str(script.parent / "gguf-py")}
        run(python, script, "--outtype", "bf16", "--outfile", file, model, env=path)

    def quantize(self, file: Path, target: Path, kind: str) -> None:
        run(self.directory / "llama-quantize", *KEPT, file, target, kind, self.threads)

    def logits(self, file: Path, text: Path, target: Path, windows: int) -> None:
        options = ["-c", WINDOW_TOKENS, "--chunks", windows, "-t", self.threads, "--save-all-logits", target]
        run(self.directory / "llama-perplexity", "-m", file, "-f", text, *options)

    def answer(self, file: Path, prompt: str, tokens: int) -> str:
        """What llama-cli says at temperature 0, without its banner and its speeds."""
        options = ["-n", tokens, "--temp", 0, "-st", "--simple-io", "--no-warmup", "-t", self.threads]
        out = run(self.directory / "llama-cli", "-m", file, "-p", prompt, *options)
        found = re.search(rf"^> {re.escape(prompt)}\n(.*?)\n*^\[ Prompt:", out, re.DOTALL | re.MULTILINE)
        if found is None:
            raise SystemExit(f"llama-cli's output has no answer: {out[-400:]!r}")
        return found[1]


class SavedLogits:
    """llama-perplexity's file: magic, sizes, tokens, then per window the rows of its second half.

    A row is 16-bit steps of log-probability above a minimum: float32 step, float32 minimum, uint16 [vocab].
    """

    def __init__(self, file: Path) -> None:
        self._data = np.memmap(file, np.uint8, "r")
        if bytes(self._data[:8]) != b"_logits_":
            raise SystemExit(f"{file} is not a file of --save-all-logits")
        self.window, self.vocab, self.count = struct.unpack("<3i", bytes(self._data[8:20]))
        end = 20 + 4 * self.window * self.count
        self.tokens = self._data[20:end].view("<i4").reshape(self.count, self.window)
        self.first = self.window // 2
        self._rows = self._data[end:].view("<u2").reshape(self.count, -1, 2 * ((self.vocab + 1) // 2) + 4)

    def log_p(self, index: int) -> Rows:
        """[predicted tokens, vocab] of one window, normalised."""
        raw = self._rows[index]
        head = np.ascontiguousarray(raw[:, :4]).view("<f4").astype(np.float64)
        rows = head[:, 1:2] + head[:, :1] * raw[:, 4 : 4 + self.vocab]
        return rows - np.log(np.exp(rows).sum(1, keepdims=True))


@dataclass(frozen=True)
class Agreement:
    """Over the predicted tokens: mean nats with the standard error, equal first choices, perplexities."""

    tokens: int
    kl: float
    kl_error: float
    top1: float
    ours: float
    theirs: float


def first_token(file: Path) -> int | None:
    """The id that llama-perplexity puts in the place of each window's first token; None: it leaves it."""
    fields = GGUFReader(file).fields
    adds = fields.get("tokenizer.ggml.add_bos_token")
    bos = fields.get("tokenizer.ggml.bos_token_id")
    return int(bos.contents()) if adds is not None and adds.contents() and bos is not None else None


def agreement(saved: SavedLogits, bos: int | None, bundle: Path, dtype: str, threads: int) -> Agreement:
    model = kt.load(bundle, dtype=dtype, threads=threads)
    kl, same, losses = [], [], ([], [])
    for index in range(saved.count):
        tokens = saved.tokens[index].tolist()
        if bos is not None:
            tokens[0] = bos
        logits = model.logits(tokens)[saved.first : -1, : saved.vocab].double()
        log_q, log_p = logits.log_softmax(-1).numpy(), saved.log_p(index)
        following = tokens[saved.first + 1 :]
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(1))
        same.append(log_p.argmax(1) == log_q.argmax(1))
        for loss, rows in zip(losses, (log_q, log_p), strict=True):
            loss.append(-rows[np.arange(len(following)), following])
    nats = np.concatenate(kl)
    ours, theirs = (float(np.exp(np.concatenate(loss).mean())) for loss in losses)
    error = float(nats.std() / len(nats) ** 0.5)
    return Agreement(len(nats), float(nats.mean()), error, float(np.concatenate(same).mean()), ours, theirs)


def write_text(sources: Path, target: Path) -> None:
    """The documents of the .jsonl files (key `text`), some of each in turn."""
    files = [file.read_text(encoding="utf-8").splitlines() for file in sorted(sources.glob("*.jsonl"))]
    if not files:
        raise SystemExit(f"no .jsonl in {sources}")
    most = max(map(len, files))
    lines = [lines[i] for i in range(most) for lines in files if i < len(lines)]
    target.write_text("\n\n".join(json.loads(line)["text"] for line in lines), encoding="utf-8")


def compare_logits(peer: Peer, files: dict[str, Path], options: argparse.Namespace) -> float:
    """Prints a row for every file and way to run it; the largest mean KL."""
    work, worst = options.output, 0.0
    print("| file | experts, linears, run in | mean KL | top-1 | perplexity, ours | llama.cpp | tokens |")
    print("|--|--|--|--|--|--|--|")
    for kind, file in files.items():
        peer.logits(file, work / "text.txt", work / "logits", options.windows)
        saved, bos = SavedLogits(work / "logits"), first_token(file)
        for experts, linears, dtype in RUNS:
            if experts == "q4_k" and kind == "BF16":
                continue  # nothing to keep
            bundle = work / f"{kind}-{experts}"
            if not quantize(file, bundle, experts, linears):
                print(
                    f"| {kind} | {experts}, {linears}, {dtype} | refused: blocks of another kind ||||",
                    flush=True,
                )
                continue
            got = agreement(saved, bos, bundle, dtype, options.threads)
            worst = max(worst, got.kl)
            columns = [kind, f"{experts}, {linears}, {dtype}", f"{got.kl:.5f} +- {got.kl_error:.5f}"]
            columns += [f"{got.top1:.2%}", f"{got.ours:.3f}", f"{got.theirs:.3f}", str(got.tokens)]
            print("| " + " | ".join(columns) + " |", flush=True)
    return worst


def compare_answers(peer: Peer, theirs: Path, ours: Path, tokens: int) -> int:
    """How many greedy answers differ."""
    different = 0
    for prompt in PROMPTS:
        answers = [peer.answer(file, prompt, tokens) for file in (theirs, ours)]
        different += answers[0] != answers[1]
        print(f"{'same' if answers[0] == answers[1] else 'DIFFERENT'}: {prompt!r} -> {answers[1]!r}")
    return different


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--bin", type=Path, required=True, help="the directory of llama.cpp's programs")
    parser.add_argument("--converter", type=Path, required=True, help="its convert_hf_to_gguf.py")
    parser.add_argument("--converter-python", type=Path, default=Path(sys.executable), help="runs it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory for files, which stay")
    parser.add_argument("--text", type=Path, default=Path("samples/text"), help="directory of .jsonl files")
    parser.add_argument("--types", default="Q8_0,Q4_K_M")
    parser.add_argument("--windows", type=int, default=12, help=f"of {WINDOW_TOKENS} tokens")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--bar", type=float, default=5e-3, help="largest mean KL")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    work = options.output
    work.mkdir(parents=True, exist_ok=True)
    peer = Peer(options.bin, options.threads)
    files = {"BF16": work / "theirs-bf16.gguf"}
    peer.convert(options.model, files["BF16"], options.converter, options.converter_python)
    for kind in options.types.split(","):
        files[kind] = work / f"theirs-{kind}.gguf"
        peer.quantize(files["BF16"], files[kind], kind)
    write_text(options.text, work / "text.txt")
    worst = compare_logits(peer, files, options)
    ours = work / "ours-bf16.gguf"
    kttools("convert", options.model, "-o", ours, "--type", "bf16")
    print()
    different = compare_answers(peer, files["BF16"], ours, options.tokens)
    print(f"\nlargest mean KL {worst:.5f} (bar {options.bar}), {different} of {len(PROMPTS)} answers differ")
    if not worst <= options.bar or different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
