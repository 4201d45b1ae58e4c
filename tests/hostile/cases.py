"""Hostile bundles: name -> (how it is made, what the one line says, the commands that refuse it)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.hostile.forge_bundle import (
    PACK,
    SHARD,
    Spoil,
    added,
    content,
    listed,
    manifest,
    pack_entry,
    pack_field,
    raw,
    rehash,
    shard,
    sparse,
)
from tests.runtime.test_tokenizer_limits import HOSTILE as TOKENIZERS

BOTH = ("verify", "chat")
VERIFY = ("verify",)
CHAT = ("chat",)
PLAIN = "is not a plain relative path"
TEMPLATE = "tokenizer/chat_template.jinja"
Case = tuple[Spoil, str, tuple[str, ...]]


def instead(path: str, make: Any) -> Spoil:
    """Something else under the name of a file."""

    def spoil(bundle: Path) -> None:
        (bundle / path).unlink()
        make(bundle / path)

    return spoil


def link_folder_out(bundle: Path) -> None:
    shutil.move(bundle / "experts", bundle.parent / "outside")
    (bundle / "experts").symlink_to(bundle.parent / "outside")


def swap_packs(bundle: Path) -> None:
    one, two = bundle / PACK, bundle / "experts/layer-00002.ktpack"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    rehash(bundle)


def one_byte(path: str) -> Spoil:
    def spoil(bundle: Path) -> None:
        data = bytearray((bundle / path).read_bytes())
        data[-1] ^= 1
        (bundle / path).write_bytes(data)

    return spoil


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of a shard's first tensor."""
    return next(entry for name, entry in header.items() if name != "__metadata__")


def both_ends(header: dict[str, Any], by: int) -> None:
    first(header)["data_offsets"] = [offset + by for offset in first(header)["data_offsets"]]


MANIFESTS: dict[str, Case] = {
    "empty": (raw(lambda data: b""), "not valid JSON", BOTH),
    "cut": (raw(lambda data: data[:-40]), "not valid JSON", BOTH),
    "a list": (raw(lambda data: b"[]\n"), "not a kttools-bundle manifest", BOTH),
    "not UTF-8": (raw(lambda data: b"\xff" + data), "not UTF-8 at byte 0", BOTH),
    "a byte order mark": (raw(lambda data: b"\xef\xbb\xbf" + data), "not valid JSON", BOTH),
    "duplicate key": (raw(lambda data: data.replace(b"{", b'{"tool":1,"tool":2,', 1)), "duplicate key", BOTH),
    "NaN": (raw(lambda data: data.replace(b'"version": 1', b'"version": NaN')), "NaN is not JSON", BOTH),
    "infinity": (raw(lambda data: data.replace(b'"version": 1', b'"version": 1e999')), "fit a float", BOTH),
    "huge number": (
        raw(lambda data: data.replace(b'"version": 1', b'"version": ' + b"9" * 5000)),
        "not valid JSON",
        BOTH,
    ),
    "deep nesting": (raw(lambda data: b'{"a":' + b"[" * 200_000), "nested too deeply", BOTH),
    "nested deeply and closed": (
        raw(lambda data: data[:-3] + b',"z":' + b"[" * 20_000 + b"]" * 20_000 + b"}\n"),
        "nested too deeply|not valid JSON",
        BOTH,
    ),
    "edited": (raw(lambda data: data.replace(b'"int8"', b'"bf16"', 1)), "does not match the content", BOTH),
    "not canonical": (raw(lambda data: data + b"\n"), "not in canonical form", BOTH),
    "absurd length": (sparse("bundle.json", 1 << 40), "larger than the 64000000 bytes", BOTH),
    "a pipe": (instead("bundle.json", os.mkfifo), "not a regular file", VERIFY),
    "a directory": (instead("bundle.json", os.mkdir), "not a regular file", VERIFY),
    "endless": (instead("bundle.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file", VERIFY),
    "other version": (manifest("version", to=2), "this program reads version 1", BOTH),
    "unknown feature": (manifest("requires", to=["teleport"]), "needs teleport", BOTH),
    "traversal": (listed("../../etc/passwd"), PLAIN, BOTH),
    "traversal inside": (listed("a/../../x"), PLAIN, BOTH),
    "absolute": (listed("/etc/passwd"), PLAIN, BOTH),
    "backslash": (listed("..\\..\\x"), PLAIN, BOTH),
    "drive": (listed("C:/x"), PLAIN, BOTH),
    "NUL": (listed("a\0b"), PLAIN, BOTH),
    "newline": (listed("a\nb"), PLAIN, BOTH),
    "hidden": (listed(".ssh/authorized_keys"), PLAIN, BOTH),
    "composed letter": (listed("caf\u00e9"), PLAIN, BOTH),
    "decomposed letter": (listed("cafe\u0301"), PLAIN, BOTH),
    "wide letter": (listed("\uff21"), PLAIN, BOTH),
    "right to left": (listed("a\u202egpj.exe"), PLAIN, BOTH),
    "a lone surrogate": (listed("\ud800"), PLAIN, BOTH),
    "other case": (listed("a/x", "A/x"), "differ only in case", BOTH),
    "a file as a folder": (listed("shards"), "as a file and as a folder", BOTH),
    "twice": (listed("x", "x"), "listed twice", BOTH),
    "itself": (listed("bundle.json"), PLAIN, BOTH),
    "a file that is not there": (listed("absent"), "listed in bundle.json but no such file", BOTH),
    "larger than it is": (
        manifest("files", 0, "bytes", to=2**62),
        "expected 4611686018427",
        BOTH,
    ),
    "smaller than it is": (manifest("files", 0, "bytes", to=1), "expected 1 bytes", BOTH),
    "negative size": (manifest("files", 0, "bytes", to=-1), "non-negative integer", BOTH),
    "size that wraps": (manifest("files", 0, "bytes", to=2**64), "non-negative integer", BOTH),
    "size as a float": (manifest("files", 0, "bytes", to=1e300), "non-negative integer", BOTH),
    "wrong hash": (
        manifest("files", 0, "xxh3_128", to="0" * 32),
        "content changed: expected xxh3_128",
        VERIFY,
    ),
    "extra key of a file": (manifest("files", 0, "mode", to="0777"), "files must be a list of path", BOTH),
    "terminal codes": (manifest("tool", "name", to="\x1b]0;x\x07"), "tool must give name and version", BOTH),
    "a layer left out": (manifest("experts", "2"), "experts must list the MoE layers", BOTH),
    "a layer too many": (manifest("experts", "9", to={}), "experts must list the MoE layers", BOTH),
    "one pack for two layers": (manifest("experts", "2", "file", to=PACK), "is the pack of layer", BOTH),
    "a pack that is a shard": (manifest("experts", "2", "file", to=SHARD), "not a pack", BOTH),
    "absurd experts": (manifest("model", "n_routed_experts", to=10**12), "n_routed_experts", BOTH),
    "absurd vocabulary": (manifest("model", "vocab_size", to=2**62), "vocab_size|shape", BOTH),
    "absurd layers": (manifest("model", "num_hidden_layers", to=10**9), "num_hidden_layers|moe_layers", BOTH),
    "unknown key of the model": (manifest("model", "backdoor", to=1), "backdoor", BOTH),
    "unknown linear": (manifest("linears", "model.x", to="int4"), "is no linear of this model", VERIFY),
    "linear of another format": (
        manifest("linears", "lm_head", to="int4"),
        "has no tensor|the manifest says int4",
        BOTH,
    ),
}

FILES: dict[str, Case] = {
    "a flipped bit": (one_byte(PACK), "content changed", VERIFY),
    "removed": (lambda bundle: (bundle / PACK).unlink(), "no such file", BOTH),
    "a pipe": (instead(PACK, os.mkfifo), "not a regular file", BOTH),
    "a directory": (instead(PACK, os.mkdir), "not a regular file", BOTH),
    "a link out": (instead(PACK, lambda p: p.symlink_to("/etc/passwd")), "leads out of the bundle", BOTH),
    "a link to a device": (instead(PACK, lambda p: p.symlink_to("/dev/zero")), "leads out", BOTH),
    "a link to itself": (instead(PACK, lambda p: p.symlink_to(p.name)), "symbolic link", BOTH),
    "a folder that leads out": (link_folder_out, "leads out of the bundle", BOTH),
    "swapped packs": (swap_packs, "layer", BOTH),
}

PACKS: dict[str, Case] = {
    "not a pack": (content(PACK, b"garbage!" * 1000), "not a pack", BOTH),
    "empty": (content(PACK, b""), "not a pack", BOTH),
    "cut": (content(PACK, lambda data: data[:-1]), "truncated", BOTH),
    "longer": (content(PACK, lambda data: data + b"\0"), "longer than it says", BOTH),
    "version": (pack_field("version", 2), "pack version 2", BOTH),
    "header_bytes": (pack_field("header_bytes", 1 << 31), "header of 2147483648 bytes", BOTH),
    "layout": (pack_field("layout", 7), "layout 7", BOTH),
    "no experts": (pack_field("num_experts", 0), "num_experts is 0", BOTH),
    "absurd experts": (pack_field("num_experts", 2**32 - 1), "num_experts is 4294967295", BOTH),
    "absurd hidden_size": (pack_field("hidden_size", 2**32 - 1), "hidden_size is 4294967295", BOTH),
    "other hidden_size": (pack_field("hidden_size", 25), "expected", BOTH),
    "absurd width": (pack_field("moe_intermediate_size", 2**31), "moe_intermediate_size is", BOTH),
    "other layer": (pack_field("layer", 2), "layer", BOTH),
    "file_bytes": (pack_field("file_bytes", 2**64 - 1), "file_bytes is 18446744073709551615", BOTH),
    "reserved": (pack_field("reserved_1", 1), "reserved", BOTH),
    "unknown format": (pack_entry(0, "format", lambda _: 99), "unknown format 99", BOTH),
    "overlap": (pack_entry(1, "offset", lambda at: at - 4096), "blobs touch, in order", BOTH),
    "hole": (pack_entry(1, "offset", lambda at: at + 4096), "blobs touch, in order", BOTH),
    "misaligned": (pack_entry(1, "offset", lambda at: at + 1), "blobs touch, in order", BOTH),
    "offset that wraps": (pack_entry(1, "offset", lambda _: 2**64 - 4096), "blobs touch", BOTH),
    "absurd blob": (pack_entry(0, "bytes", lambda _: 2**63), "expected", BOTH),
    "small blob": (pack_entry(0, "bytes", lambda count: count - 4096), "expected", BOTH),
}

SHARDS: dict[str, Case] = {
    "not a shard": (content(SHARD, b"\xff" * 64), "expected at most 100000000", BOTH),
    "header beyond the file": (content(SHARD, (1 << 20).to_bytes(8, "little") + b"{}"), "in a file of", BOTH),
    "cut": (content(SHARD, lambda data: data[:-1]), "truncated", BOTH),
    "moved": (shard(lambda h: both_ends(h, 2)), "overlaps the tensor|leaves a hole|truncated", BOTH),
    "shape that wraps": (shard(lambda h: first(h).update(shape=[2**62, 4, 2])), "overflows 63 bits", BOTH),
    "negative shape": (shard(lambda h: first(h).update(shape=[-1])), "non-negative integers", BOTH),
    "other dtype": (shard(lambda h: first(h).update(dtype="F64")), "bytes, data_offsets span", BOTH),
    "unknown dtype": (shard(lambda h: first(h).update(dtype="PICKLE")), "unknown dtype", BOTH),
    "foreign metadata": (shard(lambda h: h.update(__metadata__={"x": "y"})), "__metadata__", CHAT),
    "a tensor renamed": (
        shard(lambda h: {("x" if v is first(h) else k): v for k, v in h.items()}),
        "missing|holds|has no tensor|not in",
        BOTH,
    ),
    "hidden bytes": (shard(lambda h: None, lambda data: data + bytes(64)), "belong to no tensor", BOTH),
}

TEMPLATES = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "not allowed"),
    "subclasses": ("{{ [].__class__.__base__.__subclasses__() }}", "not allowed"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('id') }}", "not allowed"),
    "through a filter": ("{{ (''|attr('__class__')) }}", "not allowed"),
    "through format": ("{{ '{0.__class__}'.format(1) }}", "chat template"),
    "include": ("{% include '/etc/passwd' %}", "chat template"),
    "import": ("{% import 'os' as os %}", "chat template"),
    "endless loop": (
        "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}",
        "limit",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template"),
    "large product": ("{{ 'a' * 10**9 }}", "limit"),
    "large number": ("{{ 10 ** (10 ** 8) }}", "limit"),
    "doubling": (
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "limit",
    ),
    "wide padding": ("{{ 'a'.center(10**9) }}", "limit"),
    "does not compile": ("{% for %}", "does not compile"),
    "absurd length": ("x" * (2 << 20), "the limit is"),
}

TABLE = "expert-table.json"
OTHERS: dict[str, Case] = {
    **{f"template: {name}": (content(TEMPLATE, t), m, CHAT) for name, (t, m) in TEMPLATES.items()},
    **{
        f"tokenizer: {name}": (content("tokenizer/tokenizer.json", json.dumps(d)), m, CHAT)
        for name, (d, m) in TOKENIZERS.items()
    },
    "tokenizer: absurd length": (
        sparse("tokenizer/tokenizer.json", 1 << 30),
        "limit for this kind of file",
        CHAT,
    ),
    "tokenizer: deep nesting": (
        content("tokenizer/tokenizer.json", "[" * 200_000),
        "nested too deeply",
        CHAT,
    ),
    "table: no table": (added(TABLE, "{}"), "not an expert table", CHAT),
    "table: NaN": (added(TABLE, '{"format": NaN}'), "NaN is not JSON", CHAT),
    "table: deep nesting": (added(TABLE, "[" * 200_000), "nested too deeply", CHAT),
    "table: other version": (
        added(TABLE, '{"format": "kttools-expert-table", "version": 9}'),
        "table version 9",
        CHAT,
    ),
    "table: absurd size": (
        lambda bundle: (added(TABLE, "{}")(bundle), sparse(TABLE, 1 << 40)(bundle)),  # type: ignore[dict-item]
        "larger than the 64000000 bytes",
        CHAT,
    ),
}

CASES: dict[str, Case] = {
    **{f"manifest: {name}": case for name, case in MANIFESTS.items()},
    **{f"file: {name}": case for name, case in FILES.items()},
    **{f"pack: {name}": case for name, case in PACKS.items()},
    **{f"shard: {name}": case for name, case in SHARDS.items()},
    **OTHERS,
}
