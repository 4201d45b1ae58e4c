"""The HTML page: one file, no script, nothing fetched."""

from collections.abc import Callable
from html import escape
from importlib.resources import files

from . import charts, heat
from .facts import Facts
from .svg import tag
from .verdict import POLICY_COLUMNS, Verdict, baseline_note, policy_rows, tiles, verdict

Chart = Callable[[Facts], str]
Card = tuple[str, Chart, str]  # title, chart, what the reader sees

# Those in one list stand side by side.
PARETO: Card = (
    "What fewer experts cost",
    charts.pareto,
    "Each dot is a policy at the number of experts it really used on the test text. Lower is better. "
    "Bars and bands are 95 % intervals, bootstrapped over documents; the ring is this table.",
)
CARDS: list[list[Card]] = [
    [
        (
            "Domain by domain",
            charts.domain_ratios,
            "The table's mean KL relative to keeping the same number of experts in every layer. Left of the "
            "dashed line it is closer to the full model; a bar that touches the line shows no difference.",
        ),
        (
            "Predicted against measured",
            charts.predictions,
            "Each dot is an allocation of experts to layers, priced from the profile and then really run.",
        ),
    ],
    [
        (
            "Experts kept per layer",
            charts.k_per_layer,
            "Of the experts the router chose, how many are computed.",
        ),
        (
            "How much each layer matters",
            charts.sensitivity,
            "KL at the output when this layer alone runs with fewer experts, with its standard error.",
        ),
    ],
    [
        (
            "Who does the work",
            lambda facts: heat.load_scale() + heat.load_map(facts),
            "Load of every expert in each domain. A row that does not fade from left to right uses other "
            "experts than the average domain does.",
        )
    ],
    [
        (
            "How alike the domains are",
            heat.similarity,
            "Jensen-Shannon divergence of expert load in bits, mean over layers: 0 the same, 1 disjoint.",
        ),
        (
            "Where domains part",
            heat.divergence_by_layer,
            "How differently the domains use the experts of a layer, mean over pairs of domains.",
        ),
    ],
    [
        (
            "Locality",
            charts.lru,
            "How often the experts of the next token are already among the n used last, per layer.",
        ),
        (
            "GPU hot set",
            charts.hot_set,
            "The share of selections served on the GPU if the n busiest experts of each layer lived there. "
            "Every domain counts the same.",
        ),
    ],
]


def render_page(facts: Facts) -> str:
    """The whole document."""
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    title = f"Expert profile of {facts.model_name}"
    body = [
        _header(facts),
        _verdict(verdict(facts)),
        _tiles(facts),
        _row([PARETO], facts),
        _policies(facts),
        *(_row(row, facts) for row in CARDS),
        _steps(facts),
        _hot_experts(facts),
        _sources(facts),
        _footer(facts),
    ]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
    ]
    main = tag("main", *body)
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>{main}</body></html>\n'


def _header(facts: Facts) -> str:
    router = facts.profile.header["router"]
    tokens = sum(int(d["tokens"]) for d in facts.profile.header["domains"].values())
    lead = (
        f"{len(facts.moe_layers)} MoE layers of {router['n_routed_experts']} experts, "
        f"{facts.k_native} a token. "
        f"Profiled on {tokens:,} tokens of {len(facts.domains)} domains: {', '.join(facts.domains)}."
    )
    names = (("auto", "system", True), ("light", "light", False), ("dark", "dark", False))
    inputs = [
        tag(
            "label",
            f'<input type="radio" name="theme" id="{i}"{" checked" if on else ""}>{label}',
        )
        for i, label, on in names
    ]
    left = tag(
        "div",
        tag("p", "kttools profile-experts", class_="eyebrow"),
        tag("h1", escape(facts.model_name)),
        tag("p", escape(lead), class_="lead"),
    )
    return tag("header", left, tag("div", *inputs, class_="theme"))


def _verdict(found: Verdict) -> str:
    paragraphs = [tag("p", escape(s)) for s in found.sentences]
    reasons = tag("ul", *(tag("li", escape(r)) for r in found.reasons)) if found.reasons else ""
    return tag(
        "section", tag("h2", escape(found.headline)), *paragraphs, reasons, class_=f"verdict {found.state}"
    )


def _tiles(facts: Facts) -> str:
    cells = [
        tag(
            "div",
            tag("b", escape(t.value)),
            tag("span", escape(t.name)),
            tag("small", escape(t.note)),
            class_="tile",
        )
        for t in tiles(facts)
    ]
    return tag("div", *cells, class_="tiles")


def _row(cards: list[Card], facts: Facts) -> str:
    sections = [_card(title, chart(facts), lead) for title, chart, lead in cards]
    shown = [s for s in sections if s]
    return tag("div", *shown, class_="pair") if len(cards) > 1 and shown else "".join(shown)


def _card(title: str, content: str, lead: str) -> str:
    if not content:
        return ""
    return tag("section", tag("h2", escape(title)), tag("p", escape(lead), class_="lead"), content)


def _policies(facts: Facts) -> str:
    rows = policy_rows(facts)
    if not rows:
        return ""
    head = tag("tr", *(tag("th", escape(c)) for c in POLICY_COLUMNS))
    body = [
        tag(
            "tr",
            *(tag("td", escape(cell)) for cell in row),
            class_="judged" if row[0].endswith("(this table)") else None,
        )
        for row in rows
    ]
    table = tag("div", tag("table", head, *body), class_="scroll")
    lead = f"All measured on the same text in the same run, best first. {baseline_note(facts)}"
    return _card("Every policy", table, lead)


def _steps(facts: Facts) -> str:
    """Every ingredient that was tried, with its gain."""
    if not facts.steps:
        return ""
    head = tag("tr", *(tag("th", c) for c in ("ingredient", "tried", "KL", "against", "gain", "kept")))
    rows = [
        tag(
            "tr",
            tag("td", escape(step["ingredient"])),
            tag("td", escape(step["tried"])),
            tag("td", f"{step['kl']:.5f}"),
            tag("td", f"{step['kl_against']:.5f}"),
            tag("td", f"{step['gain']:+.5f} +- {step['standard_error']:.5f}"),
            tag("td", "yes" if step["kept"] else "no"),
            class_="judged" if step["kept"] else None,
        )
        for step in facts.steps
    ]
    return _card(
        "What was tried",
        tag("div", tag("table", head, *rows), class_="scroll"),
        "Mean KL on the probe documents of the profile. A change is kept when its paired gain is above two "
        "standard errors; the evaluation text plays no part.",
    )


def _hot_experts(facts: Facts) -> str:
    if not facts.hot_experts:
        return ""
    head = tag("tr", tag("th", "layer"), tag("th", "experts, hottest first"))
    rows = [
        tag("tr", tag("td", str(layer)), tag("td", tag("code", escape(", ".join(map(str, ids))))))
        for layer, ids in sorted(facts.hot_experts.items())
    ]
    table = tag("table", head, *rows, class_="sources")
    return tag("section", tag("details", tag("summary", "Experts to place on the GPU, per layer"), table))


def _sources(facts: Facts) -> str:
    head = tag("tr", *(tag("th", c) for c in ("domain", "used for", "documents", "tokens", "source")))
    tested = (facts.evaluation or {}).get("data", {})
    rows = [_source(name, "profile", entry) for name, entry in facts.profile.header["domains"].items()] + [
        _source(name, "test", entry) for name, entry in tested.items()
    ]
    return _card(
        "Text",
        tag("div", tag("table", head, *rows, class_="sources"), class_="scroll"),
        "What was read, with the hash of every file.",
    )


def _source(name: str, use: str, entry: dict) -> str:
    origin = entry.get("provenance") or {}
    found = [f"{f['name']} sha256 {f['sha256'][:16]}" for f in origin.get("files", [])]
    if origin.get("dataset"):
        found.append(f"{origin['dataset']} at {origin.get('revision') or 'unknown revision'}")
    shown = found[:3] + ([f"and {len(found) - 3} more"] if len(found) > 3 else [])
    cells = (name, use, f"{entry.get('documents', 0):,}", f"{entry.get('tokens', 0):,}", "; ".join(shown))
    return tag("tr", *(tag("td", escape(cell)) for cell in cells))


def _footer(facts: Facts) -> str:
    header = facts.profile.header
    tool = header.get("tool", {})
    boot = (facts.evaluation or {}).get("bootstrap", {})
    lines = [
        f"{tool.get('name', 'kttools')} {tool.get('version', '')}; model fingerprint {header['fingerprint']}."
    ]
    if boot:
        lines.append(
            f"Intervals: {boot['replicates']:,} bootstrap replicates over {boot.get('unit', 'document')}s."
        )
    return tag("footer", *(tag("p", escape(line)) for line in lines))
