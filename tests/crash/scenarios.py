"""The writers under test, each as a folder to prepare, a run, and what must hold of the folder at any moment.

A folder holds inputs (made once, shared), the target, and nothing else. `finished` lists units of work that a
killed run had finished, with marks that a rerun must leave as they are.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kttools.bundle import repair
from kttools.bundle.archive.pack import Packer
from kttools.bundle.archive.reader import Archive
from kttools.bundle.archive.unpack import Unpacker
from kttools.bundle.byte_source import DirectorySource
from kttools.bundle.hub.client import Hub
from kttools.bundle.hub.pull import STATE_NAME as PULL_STATE
from kttools.bundle.hub.pull import Puller
from kttools.bundle.signing import sign_manifest
from kttools.bundle.subset import Cutter
from kttools.bundle.verify import verify_bundle
from kttools.eval.reference_file import Answer, write_reference
from kttools.eval.windows import Window
from kttools.families import open_model
from kttools.gguf_out.plan import make_plan as make_gguf_plan
from kttools.gguf_out.writer import write as write_gguf
from kttools.profiling.install import install_table
from kttools.profiling.tables import table_document, write_table
from kttools.quantize.plan import make_plan
from kttools.quantize.recipe import Recipe
from kttools.quantize.target import STATE_NAME
from kttools.quantize.writer import Quantizer
from kttools_runtime.expert_policy import LayerPolicy
from kttools_runtime.manifest import read_manifest
from tests.forge import config, hub_tensors, save_model

REPO_ID = "org/crash"
FINGERPRINT = "f" * 64
SIZES: dict[str, Any] = {"num_hidden_layers": 6, "vocab_size": 300}
Contents = dict[str, str]


def contents(folder: Path) -> Contents:
    """SHA-256 of every file by relative path, hidden ones too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def visible(found: Contents) -> Contents:
    """Without what has a temporary name or lies in a state folder."""
    return {p: h for p, h in found.items() if not any(part.startswith(".") for part in Path(p).parts)}


@dataclass(frozen=True, slots=True)
class Scenario:
    """prepare(folder, inputs): a fresh target; inputs is a folder shared by all runs. run(folder): the work.

    finished(folder): units that are finished, with marks. is_resumable: an error may leave hidden files.
    """

    name: str
    run: Callable[[Path], Any]
    prepare: Callable[[Path, Path], None]
    finished: Callable[[Path], dict[str, Any]] = lambda folder: {}
    is_resumable: bool = False


def make_inputs(inputs: Path) -> None:
    """A checkpoint, its bundle, an archive of that, a table."""
    values = config(**SIZES)
    save_model(inputs / "plain", values, hub_tensors(values))
    source = save_model(inputs / "checkpoint", values, hub_tensors(values))
    (source / "tokenizer.json").write_text('{"made": "up"}' + " " * 20_000)
    (source / "tokenizer_config.json").write_text("{}")
    Quantizer(make_plan(open_model(source), Recipe("int8", "int4", 32), 1), inputs / "bundle").run()
    Packer(inputs / "bundle", inputs / "archive.ktz", threads=2).run()
    model = read_manifest(inputs / "bundle").model
    for name, sigma in (("old", 1.0), ("new", 2.0)):
        policies = {
            layer: LayerPolicy(kind="adaptive", sigma=sigma, threshold=0.1, k_max=2, alpha=torch.ones(2))
            for layer in model.moe_layers
        }
        empty: dict[str, Any] = {"k_mean_expected": {}, "placement": {}, "provenance": {}}
        document = table_document(name, FINGERPRINT, model, policies, k_mean_target=1.5, **empty)
        write_table(inputs / f"{name}.expert-table.json", document, model)


def _nothing(folder: Path, inputs: Path) -> None:
    folder.mkdir()
    (folder / "inputs").symlink_to(inputs)


def _quantize(folder: Path) -> int:
    source = open_model(folder / "inputs" / "checkpoint")
    plan = make_plan(source, Recipe("int8", "int4", 32), 2)
    return Quantizer(plan, folder / "b").run().kept_files


def _quantized(folder: Path) -> dict[str, Any]:
    """Packs and shards with their record, by inode and time: a rerun must keep the very file."""
    found = {}
    for record in (folder / "b" / STATE_NAME).glob("*.json"):
        path = folder / "b" / record.name.removesuffix(".json").replace("--", "/")
        if path.suffix in (".ktpack", ".safetensors") and path.is_file():
            found[path.relative_to(folder).as_posix()] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def _unpack(folder: Path) -> int:
    with Archive([folder / "inputs" / "archive.ktz"]) as archive:
        names = [member.name for member in archive.members]
        return Unpacker(archive, folder / "b", names, threads=2).run().decoded_frames


def _unpacked(folder: Path) -> dict[str, Any]:
    """Staged files whose content is right already."""
    staged, right = folder / ".b.unpack", contents(folder / "inputs" / "bundle")
    return {path: found for path, found in contents(staged).items() if right.get(path) == found}


def _pull(folder: Path) -> None:
    puller = Puller(Hub(REPO_ID), folder / "b")
    puller.run(puller.plan())


def _pulled(folder: Path) -> dict[str, Any]:
    """Contents that are verified: staged under their hash, or named."""
    staged = {path.name: True for path in (folder / "b" / PULL_STATE).glob("*") if len(path.name) == 64}
    return staged | dict.fromkeys(visible(contents(folder / "b")).values(), True)


def _pack(folder: Path) -> None:
    Packer(folder / "inputs" / "bundle", folder / "a.ktz", threads=2, split_bytes=200_000).run()


def _convert(folder: Path) -> None:
    source = open_model(folder / "inputs" / "plain")
    write_gguf(make_gguf_plan(source, folder / "m.gguf", "bf16", 400_000))


def _old_bundle(folder: Path, inputs: Path) -> None:
    _nothing(folder, inputs)
    shutil.copytree(inputs / "bundle", folder / "b")


def _broken_bundle(folder: Path, inputs: Path) -> None:
    _old_bundle(folder, inputs)
    for name in ("experts/layer-00002.ktpack", "experts/layer-00003.ktpack"):
        with (folder / "b" / name).open("r+b") as file:
            file.seek(5000)
            file.write(b"flipped")
    (folder / "b" / "experts/layer-00004.ktpack").unlink()


def _repair(folder: Path) -> None:
    broken = verify_bundle(folder / "b", threads=1).broken
    source = repair.BlockSupplier(DirectorySource(folder / "inputs" / "bundle"))
    repair.repair_files(folder / "b", broken, source)


def _with_table(folder: Path, inputs: Path) -> None:
    _old_bundle(folder, inputs)
    install_table(folder / "b", inputs / "old.expert-table.json", FINGERPRINT)


def _install(folder: Path) -> None:
    install_table(folder / "b", folder / "inputs" / "new.expert-table.json", FINGERPRINT)


def _reference(folder: Path) -> None:
    tokens = 400
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.rand(tokens - 1, 50, generator=generator).sub(10).sort(descending=True).values
    ids = torch.arange(50).repeat(tokens - 1, 1)
    answer = Answer(ids, log_probs, log_probs[:, 0].clone())
    window = Window("d", "1", tuple(range(tokens)))
    write_reference(folder / "r.safetensors", "m", 1000, [window], [answer])


def _subset(folder: Path) -> None:
    Cutter(folder / "inputs" / "bundle", folder / "part", "2-3", None, None).run(lambda _: None)


def _sign(folder: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    sign_manifest(folder / "b", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("quantize", _quantize, _nothing, _quantized, is_resumable=True),
        Scenario("unpack", _unpack, _nothing, _unpacked, is_resumable=True),
        Scenario("pull", _pull, _nothing, _pulled, is_resumable=True),
        Scenario("pack", _pack, _nothing),
        Scenario("convert", _convert, _nothing),
        Scenario("repair", _repair, _broken_bundle, is_resumable=True),
        Scenario("install", _install, _with_table),
        Scenario("reference", _reference, _nothing),
        Scenario("subset", _subset, _nothing, is_resumable=True),
        Scenario("sign", _sign, _old_bundle),
    )
}
