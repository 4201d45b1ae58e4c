"""The documents of inspect.py as text for a terminal."""

from collections import Counter
from typing import Any

MANY_ROWS = 20


def render(report: dict[str, Any]) -> str:
    """Aligned `name value` lines, the kind first; details of a long list are cut with a count."""
    rows = {
        "bundle": _bundle,
        "checkpoint": _checkpoint,
        "gguf": _gguf,
        "safetensors": _safetensors,
        "pack": _pack,
    }
    lines = [("kind", report["kind"]), ("path", report["path"]), *rows[report["kind"]](report)]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{printable(name):<{width}}{printable(value)}".rstrip() for name, value in lines)


def printable(text: str) -> str:
    """A stranger's text without what moves a terminal's cursor: control characters are shown as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(count: int) -> str:
    """Bytes in binary units: 1.50 GiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def amount(count: int) -> str:
    """Parameters in decimal units: 671.03 B."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(count)


Rows = list[tuple[str, str]]


def _bundle(report: dict[str, Any]) -> Rows:
    total = report["bytes"]["total"]
    bits = 8 * total / report["parameters"]["total"]
    extra = report["extra_files"]
    return [
        ("made by", f"{report['tool']['name']} {report['tool']['version']}"),
        *_model(report["model"]),
        *_parameters(report["parameters"]),
        ("bytes", f"{size(total)} in {len(report['files'])} files, {bits:.2f} bits per parameter"),
        *((f"  {name}", size(count)) for name, count in report["bytes"]["by_format"].items()),
        ("expert packs", _packs(report["experts"])),
        ("linears", ", ".join(f"{count} {name}" for name, count in report["linears"].items()) or "none"),
        ("license", _license(report["license"])),
        ("model card", report["model_card"] or "none"),
        *(("expert table", f"{name}  {path}") for path, name in report["expert_tables"].items()),
        ("fingerprint", report["fingerprint"] or "not recorded"),
        *((("requires", ", ".join(report["requires"])),) if report["requires"] else ()),
        ("signature", "there; kttools verify --signer checks it" if report["is_signed"] else "none"),
        ("recipe", ", ".join(f"{key} {value}" for key, value in sorted(report["recipe"].items()))),
        *((("not listed", ", ".join(extra)),) if extra else ()),
        *_cut(
            [
                ("source", f"{e['path']}  {size(e['bytes'])}  sha256 {e['sha256']}")
                for e in report["source"]["files"]
            ]
        ),
        ("manifest", f"sha256 {report['manifest_sha256']}"),
    ]


def _license(license: dict[str, Any]) -> str:
    said = [license[key] for key in ("id", "name", "link") if license[key]]
    texts = f"({', '.join(license['files'])})" if license["files"] else ""
    return " ".join([", ".join(said) or "not stated", texts]).strip()


def _packs(experts: dict[str, Any]) -> str:
    if not experts:
        return "none"
    counts: Counter[str] = Counter()
    for entry in experts.values():
        counts.update(entry.get("formats", ()))
    uniform = {entry["format"] for entry in experts.values() if "formats" not in entry}
    mixed = f"mixed ({', '.join(f'{n} {name}' for name, n in sorted(counts.items()))})"
    formats = [*sorted(uniform), *([mixed] if counts else [])]
    found = sorted({entry["bytes"] for entry in experts.values()})
    each = f"{size(found[-1])} each" if len(found) == 1 else f"{size(found[0])} to {size(found[-1])} each"
    return f"{len(experts)} layers, {', '.join(formats)}, {each}"


def _checkpoint(report: dict[str, Any]) -> Rows:
    rows: Rows = [("family", report["family"] or "not supported")]
    if report["family"]:
        rows += [*_model(report["model"]), *_parameters(report["parameters"])]
    if report.get("experts"):
        stored = ", ".join(report["experts"]["stored"])
        rows.append(("experts", f"{report['experts']['dtype']}, {stored}"))
    rows.append(("bytes", f"{size(report['bytes']['total'])} in {report['tensors']} tensors"))
    rows += [(f"  {name}", size(count)) for name, count in report["bytes"]["by_format"].items()]
    rows += _cut(
        [("file", f"{f['path']}  {size(f['bytes'])}  {f['tensors']} tensors") for f in report["files"]]
    )
    if report["family"]:
        rows.append(("tokenizer", ", ".join(report["tokenizer"]) or "none"))
    return rows + [("notice", notice) for notice in report["notices"]]


def _gguf(report: dict[str, Any]) -> Rows:
    # repr: a stranger's text must not reach the terminal as control characters.
    pairs = report["metadata"].items()
    metadata = [
        ("metadata", f"{key if key.isprintable() else repr(key)} = {value!r}") for key, value in pairs
    ]
    return [*_checkpoint(report), *_cut(metadata)]


def _safetensors(report: dict[str, Any]) -> Rows:
    tensors = report["tensors"]
    rows = [("bytes", f"{size(report['bytes']['total'])} in {len(tensors)} tensors")]
    rows += [(f"  {name}", size(count)) for name, count in report["bytes"]["by_format"].items()]
    rows += [("metadata", f"{key}: {value}") for key, value in sorted(report["metadata"].items())]
    rows += _cut([("tensor", f"{t['name']}  {t['dtype']} {t['shape']}  {size(t['bytes'])}") for t in tensors])
    return rows


def _pack(report: dict[str, Any]) -> Rows:
    formats = ", ".join(f"{count} {name}" for name, count in report["formats"].items())
    return [
        ("layer", str(report["layer"])),
        ("experts", f"{report['num_experts']} ({formats})"),
        ("hidden_size", str(report["hidden_size"])),
        ("moe_intermediate_size", str(report["moe_intermediate_size"])),
        ("parameters", amount(report["parameters"]["total"])),
        ("bytes", f"{size(report['bytes']['total'])}, {report['bits_per_weight']:.2f} bits per parameter"),
    ]


def _cut(rows: Rows) -> Rows:
    more = len(rows) - MANY_ROWS
    return rows if more <= 0 else [*rows[:MANY_ROWS], ("", f"and {more} more (--json lists all)")]


def _model(model: dict[str, Any]) -> Rows:
    moe = len(model["moe_layers"])
    scaling = model["rope_scaling"]
    context = f"{model['max_position_embeddings']} tokens"
    if scaling:
        context += f", {scaling.get('rope_type', 'yarn')} factor {scaling['factor']:g}"
    experts = (
        f"{model['n_routed_experts']} routed, {model['num_experts_per_tok']} per token, "
        f"{model['n_shared_experts']} shared, {model['topk_group']} of {model['n_group']} groups"
    )
    return [
        ("layers", f"{model['num_hidden_layers']} ({model['num_hidden_layers'] - moe} dense, {moe} MoE)"),
        ("hidden_size", f"{model['hidden_size']}, moe_intermediate_size {model['moe_intermediate_size']}"),
        ("attention", _attention(model)),
        ("router", f"{model['router']}: {experts}"),
        ("context", context),
        ("vocabulary", str(model["vocab_size"])),
    ]


def _attention(model: dict[str, Any]) -> str:
    heads = f"{model['attention']}, {model['num_attention_heads']} heads"
    if model["attention"] == "mla":
        return f"{heads}, latent {model['kv_lora_rank']}"
    head_dim = model["qk_nope_head_dim"] + model["qk_rope_head_dim"]
    window = f", window {model['sliding_window']}" if "sliding_window" in model else ""
    return f"{heads} of {head_dim} on {model['num_key_value_heads']} key heads{window}"


def _parameters(parameters: dict[str, Any]) -> Rows:
    total = parameters["total"]
    rows = [("parameters", f"{amount(total)}, {amount(parameters['active'])} active per token")]
    by_size = sorted(parameters["by_role"].items(), key=lambda item: -item[1])
    return rows + [(f"  {role}", f"{amount(count)} ({100 * count / total:.1f} %)") for role, count in by_size]
