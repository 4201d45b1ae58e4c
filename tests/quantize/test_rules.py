"""Recipe files: what a pattern matches, and which files are refused with which line."""

from pathlib import Path

import pytest

from kttools.families import Role
from kttools.quantize.recipe import Recipe, make_recipe
from kttools.quantize.rules import Rule, check_all_match, deciding, expert_name, linear_name, read_rules
from kttools_runtime.errors import InvalidInputError

NAMES = [
    *(expert_name(layer, expert) for layer in (3, 4, 13) for expert in (0, 1, 12)),
    *(f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 3) for name in ("o", "kv_b")),
    "layers.0.mlp.gate_proj",
    "layers.3.mlp.shared_experts.gate_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", ["lm_head"]),
        ("layers.3.experts.1", ["layers.3.experts.1"]),
        ("layers.3-4.experts.12", ["layers.3.experts.12", "layers.4.experts.12"]),
        ("layers.13.experts.0-1", ["layers.13.experts.0", "layers.13.experts.1"]),
        ("layers.1,13.experts.0,12", ["layers.13.experts.0", "layers.13.experts.12"]),
        ("layers.*.self_attn.kv_b_proj", ["layers.0.self_attn.kv_b_proj", "layers.3.self_attn.kv_b_proj"]),
        ("layers.*.mlp.*", ["layers.0.mlp.gate_proj"]),
        ("layers.*.mlp.**", ["layers.0.mlp.gate_proj", "layers.3.mlp.shared_experts.gate_proj"]),
        ("layers.0.self_attn.o*", ["layers.0.self_attn.o_proj"]),
        ("layers.3.experts", []),
        ("experts.0", []),
        ("*", ["lm_head"]),
        ("**", NAMES),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    rule = Rule(pattern, "int8")
    assert [name for name in NAMES if rule.matches(name)] == expected


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file(tmp_path: Path) -> None:
    text = "# all\n\nlayers.*.experts.* = int4 # most\r\n  lm_head=bf16\n"
    text += "model.layers.0.mlp.down_proj.weight = int8\n"
    assert read_rules(write(tmp_path, text)) == (
        Rule("layers.*.experts.*", "int4"),
        Rule("lm_head", "bf16"),
        Rule("layers.0.mlp.down_proj", "int8"),
    )
    (rule,) = read_rules(write(tmp_path, "model.layers.3.mlp.experts.7 = int8"))
    assert rule.matches(expert_name(3, 7))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("layers.3.experts.0", "expected PATTERN = FORMAT, got 'layers.3.experts.0'"),
        ("= int8", "expected PATTERN = FORMAT"),
        ("lm_head =", "expected PATTERN = FORMAT"),
        ("lm_head = q5_1", "unknown format 'q5_1': expected one of bf16, int8, int4, int4_g32"),
        ("lm_head = int8 = int4", "unknown format"),
        ("lm head = int8", "'lm head' is no part of a pattern"),
        ("layers..experts.0 = int8", "'' is no part of a pattern"),
        ("layers.[0-9]+.experts.0 = int8", "is no part of a pattern"),
        ("layers.***.x = int8", "is no part of a pattern"),
        ("layers.5-3.experts.0 = int8", "5-3 is no range"),
        ("layers.0-99999999999999999999.experts.0 = int8", "is no range of numbers up to 9999"),
        ("layers.3-.experts.0 = int8", "'3-' is no part of a pattern"),
    ],
)
def test_lines_that_are_no_rules(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, f"lm_head = int8\n\n{line}\n")
    with pytest.raises(InvalidInputError) as caught:
        read_rules(path)
    assert f"{path}:3: " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no rule"):
        read_rules(write(tmp_path, "# nothing\n"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="not UTF-8"):
        read_rules(tmp_path / "binary")
    with pytest.raises(InvalidInputError, match="missing"):
        read_rules(tmp_path / "missing")


def test_a_rule_that_matches_nothing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "lm_head = int8\nlayers.3.experts.99 = int8\n")
    with pytest.raises(InvalidInputError, match=r"recipe.txt:2: layers.3.experts.99 matches no expert"):
        check_all_match(read_rules(path), NAMES)


def test_the_last_match_decides() -> None:
    rules = tuple(
        Rule(p, f) for p, f in (("**", "int8"), ("layers.3.**", "int4"), ("layers.*.experts.1", "bf16"))
    )
    for name, expected in (
        ("lm_head", "int8"),
        ("layers.3.experts.0", "int4"),
        ("layers.3.experts.1", "bf16"),
        ("layers.4.experts.1", "bf16"),
    ):
        rule = deciding(rules, name)
        assert rule is not None
        assert rule.format == expected
    assert deciding(rules[2:], "lm_head") is None


def test_rules_come_before_formats_and_exceptions() -> None:
    rules = (Rule("layers.0.**", "int4_g32"), Rule("lm_head", "bf16"), Rule("layers.1.experts.2", "int4"))
    recipe = Recipe("int8", "int4", 128, rules)
    kv_b, small = "model.layers.0.self_attn.kv_b_proj.weight", (8, 4096)
    assert recipe.shard_format(kv_b, Role.ATTENTION, small) == "int4"
    assert recipe.shard_group_size(kv_b) == 32
    assert recipe.shard_format("lm_head.weight", Role.HEAD, (256, 256)) == "bf16"
    assert recipe.shard_format("model.layers.0.mlp.gate.weight", Role.ROUTER, (256, 256)) is None
    other = linear_name(kv_b).replace("0", "1")
    assert recipe.shard_format(f"model.{other}.weight", Role.ATTENTION, (256, 256)) == "int8"
    assert recipe.shard_group_size(f"model.{other}.weight") == 128
    assert recipe.expert_formats(1, 4) == ("int8", "int8", "int4_g64", "int8")
    assert recipe.to_dict()["rules"] == [
        "layers.0.** = int4_g32",
        "lm_head = bf16",
        "layers.1.experts.2 = int4",
    ]


def test_make_recipe_reads_the_file(tmp_path: Path) -> None:
    recipe = make_recipe("int8", "int4", 128, write(tmp_path, "lm_head = bf16\n"))
    assert recipe.rules == (Rule("lm_head", "bf16"),)
