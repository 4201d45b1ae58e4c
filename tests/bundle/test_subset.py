"""A part of a bundle: what it holds, what it says of itself, what it can and cannot do."""

import filecmp
import shutil
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from kttools import cli
from kttools.bundle.archive import Packer
from kttools.bundle.inspect import inspect_path
from kttools.bundle.selection import Selection, choose, node_experts, parse_numbers, subset_manifest
from kttools.bundle.subset import Cut, Cutter
from kttools.bundle.verify import verify_bundle
from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError
from kttools_runtime.manifest import Subset, parse_manifest, read_manifest, self_sha256
from kttools_runtime.pack import map_pack
from tests.bundle.test_verify import flip


def cut(bundle: Path, target: Path, **options: str) -> Cut:
    given: dict[str, str | None] = {"layers": None, "experts": None, "node": None} | options
    return Cutter(bundle, target, **given).run()


def test_layers(nano_bundle: Path, tmp_path: Path) -> None:
    whole = read_manifest(nano_bundle)
    layers = sorted(whole.experts)
    made = cut(nano_bundle, tmp_path / "part", layers=f"0-{layers[0]}")
    part = read_manifest(tmp_path / "part")
    assert made.layers == tuple(part.experts) == (layers[0],)
    assert part.subset == Subset(whole.manifest_sha256)
    assert part.requires == ("partial",)
    assert part.fingerprint == whole.fingerprint
    assert part.expert_path(layers[0]).read_bytes() == whole.expert_path(layers[0]).read_bytes()
    assert set(whole.files) - set(part.files) == {whole.experts[layer].file for layer in layers[1:]}
    assert all(part.files[path] == whole.files[path] for path in part.files)
    result = verify_bundle(tmp_path / "part")
    assert (result.problems, result.extra) == ([], [])
    assert inspect_path(tmp_path / "part")["subset"]["of"] == whole.manifest_sha256


def test_a_part_is_not_loaded_but_streamed(
    nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = min(read_manifest(nano_bundle).experts)
    cut(nano_bundle, tmp_path / "part", layers=str(first))
    assert cli.main(["chat", "--quiet", str(tmp_path / "part"), "-p", "hi"]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "a part of a bundle of " in error
    models = [
        kt.load(path, expert_table="none", stream_layers=True) for path in (nano_bundle, tmp_path / "part")
    ]
    x = torch.randn(3, models[0].config.hidden_size, generator=torch.Generator().manual_seed(0))
    results = []
    for model in models:
        experts = model.layers[first].mlp
        results.append(experts(x.to(torch.bfloat16).float()))
    assert torch.equal(*results)
    with pytest.raises(InvalidInputError, match=f"without the experts of layer {first + 1}"):
        models[1].layers[first + 1]


def test_layers_from_an_archive_are_the_same(nano_bundle: Path, tmp_path: Path) -> None:
    Packer(nano_bundle, tmp_path / "a.ktz").run()
    cut(nano_bundle, tmp_path / "part", layers="2-3")
    unpack = ["bundle", "unpack", "--quiet", str(tmp_path / "a.ktz"), "--layers", "2-3", "-o"]
    assert cli.main([*unpack, str(tmp_path / "other")]) == 0
    assert cli.main([*unpack, str(tmp_path / "other")]) == 0
    names = [path.relative_to(tmp_path / "part") for path in (tmp_path / "part").rglob("*") if path.is_file()]
    same, _, _ = filecmp.cmpfiles(tmp_path / "part", tmp_path / "other", names, shallow=False)
    assert same == names
    assert len(names) == len([path for path in (tmp_path / "other").rglob("*") if path.is_file()])


@pytest.mark.parametrize("options", [{"experts": "1,3-4"}, {"node": "1/3"}])
def test_experts(sound_bundle: Path, tmp_path: Path, options: dict[str, str]) -> None:
    chosen = (1, 3, 4) if "experts" in options else (2, 3)
    made = cut(sound_bundle, tmp_path / "part", **options)
    whole, part = read_manifest(sound_bundle), read_manifest(tmp_path / "part")
    assert made.experts == part.pack_experts == len(chosen)
    assert part.requires == ("share",)
    assert part.subset == Subset(whole.manifest_sha256, chosen)
    for layer in whole.experts:
        (_, blobs), (_, shared) = (map_pack(manifest.expert_path(layer)) for manifest in (whole, part))
        assert [bytes(blob) for blob in shared] == [bytes(blobs[expert]) for expert in chosen]
    result = verify_bundle(tmp_path / "part")
    assert (result.problems, result.extra) == ([], [])
    for streamed in (False, True):
        with pytest.raises(InvalidInputError, match=f"with {len(chosen)} of 6 experts a layer"):
            kt.load(tmp_path / "part", expert_table="none", stream_layers=streamed)
    with pytest.raises(UsageError, match="holds a share of the experts already"):
        Cutter(tmp_path / "part", tmp_path / "x", None, "0", None)


def test_a_part_of_a_part(sound_bundle: Path, tmp_path: Path) -> None:
    """It still says which whole it is of."""
    whole = read_manifest(sound_bundle)
    cut(sound_bundle, tmp_path / "one", node="0/2")
    cut(tmp_path / "one", tmp_path / "two", layers="2")
    part = read_manifest(tmp_path / "two")
    assert part.requires == ("partial", "share")
    assert part.subset == Subset(whole.manifest_sha256, (0, 1, 2))
    cut(sound_bundle, tmp_path / "three", layers="2", node="0/2")
    assert filecmp.cmp(tmp_path / "two/bundle.json", tmp_path / "three/bundle.json", shallow=False)


def test_nodes_share_all_experts() -> None:
    for num_experts, nodes in ((256, 2), (6, 4), (7, 7), (5, 1)):
        shares = [node_experts(f"{node}/{nodes}", num_experts) for node in range(nodes)]
        assert [expert for share in shares for expert in share] == list(range(num_experts))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_numbers() -> None:
    assert parse_numbers("3-5, 9,4", "x") == (3, 4, 5, 9)
    for text in ("", "a", "5-3", "1-", "-1", "1,,2", "9999999", "1-2-3", "\u0663"):
        with pytest.raises(UsageError, match=r"^x: "):
            parse_numbers(text, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing would be left out"),
        ({"layers": "0-2"}, "nothing would be left out"),
        ({"experts": "0-5"}, "nothing would be left out"),
        ({"layers": "0"}, "no pack of such a layer; there are layers 1 to 2"),
        ({"layers": "3"}, "3 is beyond the 3 layers"),
        ({"experts": "6"}, "6 is beyond the 6 experts"),
        ({"node": "2/2"}, "I below N"),
        ({"node": "0/7"}, "N at most 6"),
        ({"node": "0/0"}, "I below N"),
        ({"node": "half"}, "I below N"),
        ({"node": "0/2", "experts": "1"}, "both given"),
    ],
)
def test_options_that_make_no_sense(
    sound_bundle: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cut(sound_bundle, tmp_path / "part", **options)
    assert not (tmp_path / "part").exists()


def test_a_damaged_bundle_is_not_cut(bundle: Path, tmp_path: Path) -> None:
    """Nothing under the final name; when it is mended, a rerun goes on with what was copied."""
    flip(bundle / "tokenizer/tokenizer.json", 3)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json: content changed"):
        cut(bundle, tmp_path / "part", layers="1")
    assert not (tmp_path / "part").exists()
    flip(bundle / "tokenizer/tokenizer.json", 3)
    left = tmp_path / ".part.unpack/experts/layer-00001.ktpack"
    flip(left, 9000)
    cut(bundle, tmp_path / "part", layers="1")
    assert verify_bundle(tmp_path / "part").problems == []
    pack = bundle / "experts/layer-00002.ktpack"
    flip(pack, pack.stat().st_size - 1)
    with pytest.raises(CorruptFileError, match="expert 5: content changed"):
        cut(bundle, tmp_path / "share", experts="0,5")
    assert not (tmp_path / "share").exists()
    with pytest.raises(UsageError, match="already there"):
        cut(bundle, tmp_path / "part", layers="1")
    pack.unlink()
    with pytest.raises(CorruptFileError, match="no such file"):
        cut(bundle, tmp_path / "share", experts="0,5")


LIES = {
    "no experts": ({"experts": []}, ["share"], "some of 6 expert ids"),
    "all experts": ({"experts": [0, 1, 2, 3, 4, 5]}, ["share"], "some of 6 expert ids"),
    "order": ({"experts": [1, 0]}, ["share"], "ascending"),
    "twice": ({"experts": [1, 1]}, ["share"], "ascending"),
    "beyond": ({"experts": [6]}, ["share"], "some of 6 expert ids"),
    "negative": ({"experts": [-1]}, ["share"], "some of 6 expert ids"),
    "true": ({"experts": [True]}, ["share"], "some of 6 expert ids"),
    "text": ({"experts": "0"}, ["share"], "some of 6 expert ids"),
    "share without experts": ({"experts": None}, ["share"], "expected a list where"),
    "experts without share": ({"experts": [0]}, [], "expected a list where"),
    "of": ({"of": "x"}, ["share"], "subset.of: a hash"),
    "another key": ({"node": 0}, ["share"], "must give of and experts"),
    "missing": (None, ["share"], "must say which experts"),
}


@pytest.mark.parametrize("name", LIES)
def test_manifests_that_lie(sound_bundle: Path, name: str) -> None:
    changes, requires, message = LIES[name]
    manifest = read_manifest(sound_bundle)
    data = subset_manifest(manifest, Selection(None, (0, 2)))
    assert parse_manifest(data, Path("b")).pack_experts == 2
    document = strict_json.parse(data, "x")
    document["subset"] = None if changes is None else document["subset"] | changes
    document["requires"] = requires
    document["manifest_sha256"] = self_sha256(document)
    with pytest.raises(CorruptFileError, match=message):
        parse_manifest(strict_json.canonical(document), Path("b"))


def test_all_of_it_is_no_selection(sound_bundle: Path) -> None:
    manifest = read_manifest(sound_bundle)
    assert choose(manifest, None, None, None) == Selection()
    assert choose(manifest, "0-2", "0-5", None) == Selection()


def test_a_signature_is_not_of_a_part(bundle: Path, tmp_path: Path) -> None:
    (bundle / "bundle.json.sig").write_text("signed")
    cut(bundle, tmp_path / "part", layers="1")
    assert not (tmp_path / "part/bundle.json.sig").exists()
    Packer(bundle, tmp_path / "a.ktz").run()
    arguments = ["bundle", "unpack", "--quiet", str(tmp_path / "a.ktz"), "-o"]
    assert cli.main([*arguments, str(tmp_path / "other"), "--layers", "1"]) == 0
    assert not (tmp_path / "other/bundle.json.sig").exists()
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole/bundle.json.sig").read_text() == "signed"
    shutil.rmtree(tmp_path / "whole")
