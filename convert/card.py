"""The model card of a converted checkpoint: README.md with the metadata that the Hub reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from rehead.checkpoints.markdown import code, code_block, front_matter, plain
from rehead.models.serving import facts_of, sentences
from rehead.version import __version__

if TYPE_CHECKING:
    from rehead.convert.planning import Plan

# Metadata of the source that stays true of the result.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def model_card(plan: Plan, layers: dict[int, dict[str, Any]], command: str, details: dict[str, Any]) -> str:
    """Markdown with YAML front matter: ``base_model``, tags, the inherited licence, the command and what it did."""
    source, table = plan.model.source, plan.as_json()
    inherited = front_matter(source.model_card() or "")
    kinds = (
        []
        if plan.kv == plan.model.num_heads
        else ["multi-head-latent-attention"]
        if "latent" in table
        else ["multi-query-attention" if plan.kv == 1 else "grouped-query-attention"]
    )
    metadata: dict[str, Any] = {key: inherited[key] for key in _INHERITED if key in inherited}
    metadata.setdefault("library_name", "transformers")
    hub_id = source.revision is not None
    if hub_id:
        metadata["base_model"] = source.id
        metadata["base_model_relation"] = "finetune"
    elif "base_model" in inherited:
        metadata["base_model"] = inherited["base_model"]
    old_tags = inherited.get("tags") or []
    metadata["tags"] = list(dict.fromkeys([*(old_tags if isinstance(old_tags, list) else []), "rehead", *kinds]))
    name = source.id.rstrip("/").rsplit("/", 1)[-1]
    kv, cache, size = table["num_key_value_heads"], table["kv_bytes_per_token"], table["parameters"]
    options = table["options"]
    pooled = kv["before"] != kv["after"]
    extras = [f"method {code(options['method'])}", f"{options['grouping']} groups"] if pooled else []
    extras += ["least-squares refit"] if options["refit"] else []
    extras += [f"layer-wise fit of {options['fit']} steps"] if options["fit"] else []
    rows = []
    if latent := table.get("latent"):
        extras = ["latent attention", *(extra for extra in extras if not extra.startswith(("method ", "contiguous")))]
        numbers = latent["numbers_per_token"]
        rows += [
            f"| class | {table['model_type']} | {latent['host']} |",
            f"| cached numbers per token and layer | {numbers['before']} | {latent['rank']} and a rotated key of "
            f"{latent['rope_dims']} |",
        ]
    for name, facts in table.get("variants", {}).items():
        told = ", ".join(f"{key} {plain(str(value))}" for key, value in facts["options"].items())
        rows.append(f"| {name} | | {told} |")
    if "host" in table:
        rows.append(f"| class | {table['host']['before']} | {table['host']['after']} |")
    if "block" in table:
        rows.append(f"| blocks | {table['block']['before']} | {table['block']['after']} |")
    if "reinvest" in table:
        spent = table["reinvest"]
        rows.append(f"| {spent['key']} | {spent['before']:,} | {spent['after']:,} |")
    heads = f"{kv['after']} KV head{'s' if kv['after'] != 1 else ''}"
    title = f"with {heads}"
    if "latent" in table:
        title = "with latent attention"
    elif not pooled and "block" in table:
        title = f"with {options['block']} blocks"
    elif not pooled and "variants" in table:
        title = f"with {' and '.join(table['variants'])}"
    elif not pooled and "host" in table:
        title = f"as {table['host']['after']}"
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000).strip(),
        "---",
        "",
        f"# {plain(name)} {title}",
        "",
        f"Converted from {code(source.id if hub_id else name)}"
        + (f" at {code(source.revision)}" if source.revision else "")
        + f" by Rehead {__version__}{': ' if extras else ''}{', '.join(extras)}.",
        "",
        "| | before | after |",
        "| --- | --- | --- |",
        f"| KV heads | {kv['before']} | {kv['after']} |",
        f"| KV cache, bytes per token | {cache['before']:,} | {cache['after']:,} |",
        *(
            f"| KV cache at {int(context):,} tokens, bytes | {size:,} | {table['cache_bytes']['after'][context]:,} |"
            for context, size in table["cache_bytes"]["before"].items()
            if table["windows"]
        ),
        f"| parameters | {size['before']:,} | {size['after']:,} |",
        *rows,
        "",
    ]
    if not table["exact"]:
        changes = ["One latent for all heads"] if "latent" in table else ["Sharing KV heads"] if pooled else []
        changes += ["another form of its blocks"] if "block" in table else []
        changes += [f"the variant {name}" for name in table.get("variants", ())]
        what = " and ".join(changes)
        lines += [
            f"{what[0].upper()}{what[1:]} change{'s' if len(changes) == 1 else ''} what the model computes. Uptrain it "
            "briefly and evaluate it against the original before you rely on it.",
            "",
        ]
    if note := table.get("host", {}).get("note"):
        lines += [f"{note[0].upper()}{note[1:]}.", ""]
    if plan.raw_config.get("auto_map"):
        lines += [
            "Transformers has no class for this model: load it by an Auto class, after `import rehead` or trusting the "
            "modelling file beside the weights."
            + (
                " Its serial class would take the weights and compute something else."
                if "parallel_layers" in plan.raw_config
                else ""
            ),
            "",
        ]
    if details.get("text"):
        lines += [f"Calibrated on {details['tokens']:,} tokens of: {', '.join(map(code, details['text']))}.", ""]
    errors = [entry for entry in layers.values() if "value_error" in entry]
    if errors and not table["exact"]:
        worst = max(errors, key=lambda e: e["key_error"] + e["value_error"])
        layer = next(i for i, entry in layers.items() if entry is worst)
        lines += [
            f"Relative error of the pooled projections: keys {_mean(errors, 'key_error'):.3f}, values "
            f"{_mean(errors, 'value_error'):.3f} on average; largest in layer {layer}. Per layer: `rehead.json`.",
            "",
        ]
    if drafts := table["drafts"]:
        lines += [
            f"Draft layers that transformers does not load keep the original's heads: {', '.join(map(code, drafts))}. "
            "An engine that drafts with them reads them wrongly.",
            "",
        ]
    if left := table["code_left_out"]:
        lines += [
            f"Code stays behind: {', '.join(map(code, left))}. A tokenizer that needs it loads from the original.",
            "",
        ]
    engines = sentences(plan.raw_config.get("model_type", ""), facts_of(plan.raw_config))
    lines += ["Engines, each run on a small model of this kind:", "", *(f"- {plain(line)}" for line in engines), ""]
    lines += [*code_block(command), ""]
    return "\n".join(lines)


def _mean(entries: list[dict[str, Any]], key: str) -> float:
    return sum(float(entry[key]) for entry in entries) / len(entries)
