"""The model card of a converted checkpoint: README.md with the metadata that the Hub reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import yaml

from rehead.checkpoints.markdown import code, code_block, front_matter, plain, without_folders
from rehead.models.families.spec import changing_rope, steady_length
from rehead.models.serving import ENGINE_NAMES, SAME, deciding_runs, sentences
from rehead.version import __version__

if TYPE_CHECKING:
    from rehead.convert.planning import Plan
    from rehead.convert.verdict import Verdict

# Metadata of the source that stays true of the result.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def model_card(
    plan: Plan,
    layers: dict[int, dict[str, Any]],
    command: str,
    details: dict[str, Any],
    verdict: Verdict | None = None,
) -> str:
    """Markdown with YAML front matter: ``base_model``, tags, the inherited licence, the command and what it did."""
    source, table = plan.model.source, plan.as_json()
    name = source.id.rstrip("/").rsplit("/", 1)[-1]
    how = _how(table)
    paragraphs = [
        f"# {plain(name)} {_title(table)}",
        f"Converted from {code(name if source.revision is None else source.id)}"
        + (f" at {code(source.revision)}" if source.revision else "")
        + f" by Rehead {__version__}{': ' if how else ''}{', '.join(how)}.",
        "\n".join(["| | before | after |", "| --- | --- | --- |", *_rows(table)]),
        *([f"Beside its source: {plain(str(verdict))}: **{verdict.word}**."] if verdict and verdict.word else []),
        *_notes(plan, table, layers, details),
        "Engines, each run on a small model of this kind:",
        "\n".join(f"- {plain(line)}" for line in sentences(plan.raw_config)),
        *_for_engines(plan),
        "\n".join(code_block(without_folders(command))),
    ]
    metadata = yaml.safe_dump(_metadata(plan, table), sort_keys=False, allow_unicode=True, width=10_000).strip()
    return "\n\n".join([f"---\n{metadata}\n---", *paragraphs]) + "\n"


def _metadata(plan: Plan, table: dict[str, Any]) -> dict[str, Any]:
    """What the Hub reads."""
    source = plan.model.source
    inherited = front_matter(source.model_card() or "")
    metadata: dict[str, Any] = {key: inherited[key] for key in _INHERITED if key in inherited}
    metadata.setdefault("library_name", "transformers")
    if source.revision is not None:
        metadata["base_model"] = source.id
        metadata["base_model_relation"] = "finetune"
    elif "base_model" in inherited:
        metadata["base_model"] = inherited["base_model"]
    if plan.kv == plan.model.num_heads:
        kinds = []
    elif "latent" in table:
        kinds = ["multi-head-latent-attention"]
    else:
        kinds = ["multi-query-attention" if plan.kv == 1 else "grouped-query-attention"]
    old_tags = inherited.get("tags") or []
    metadata["tags"] = list(dict.fromkeys([*(old_tags if isinstance(old_tags, list) else []), "rehead", *kinds]))
    return metadata


def _pooled(table: dict[str, Any]) -> bool:
    return table["num_key_value_heads"]["before"] != table["num_key_value_heads"]["after"]


def _how(table: dict[str, Any]) -> list[str]:
    """How layers were changed, a few words each."""
    options = table["options"]
    how = ["latent attention"] if "latent" in table else []
    if _pooled(table):
        how += [] if "latent" in table else [f"method {code(options['method'])}"]
        how += [] if "latent" in table and options["grouping"] == "contiguous" else [f"{options['grouping']} groups"]
    how += ["least-squares refit"] if options["refit"] else []
    how += [f"layer-wise fit of {options['fit']} steps"] if options["fit"] else []
    return how


def _title(table: dict[str, Any]) -> str:
    """What the model has or is now."""
    if "latent" in table:
        return "with latent attention"
    if not _pooled(table):
        if "block" in table:
            return f"with {table['options']['block']} blocks"
        if "variants" in table:
            return f"with {' and '.join(table['variants'])}"
        if change := table.get("host") or table.get("layout"):
            return f"as {change['after']}"
    after = table["num_key_value_heads"]["after"]
    return f"with {after} KV head{'s' if after != 1 else ''}"


def _rows(table: dict[str, Any]) -> list[str]:
    """The figures before and after, as rows of a table."""
    kv, cache, size = table["num_key_value_heads"], table["kv_bytes_per_token"], table["parameters"]
    rows = [
        f"| KV heads | {kv['before']} | {kv['after']} |",
        f"| KV cache, bytes per token | {cache['before']:,} | {cache['after']:,} |",
    ]
    if table["windows"]:
        before, after = table["cache_bytes"]["before"], table["cache_bytes"]["after"]
        rows += [f"| KV cache at {int(n):,} tokens, bytes | {before[n]:,} | {after[n]:,} |" for n in before]
    rows.append(f"| parameters | {size['before']:,} | {size['after']:,} |")
    if latent := table.get("latent"):
        width = f"{latent['rank']} and a rotated key of {latent['rope_dims']}"
        rows += [
            f"| class | {table['model_type']} | {latent['host']} |",
            f"| cached numbers per token and layer | {latent['numbers_per_token']['before']} | {width} |",
        ]
    for name, facts in table.get("variants", {}).items():
        told = ", ".join(f"{key} {plain(str(value))}" for key, value in facts["options"].items())
        rows.append(f"| {name} | | {told} |")
    for change in (table[name] for name in ("layout", "host") if name in table):
        rows.append(f"| class | {change['before']} | {change['after']} |")
    if "block" in table:
        rows.append(f"| blocks | {table['block']['before']} | {table['block']['after']} |")
    if spent := table.get("reinvest"):
        rows.append(f"| {spent['key']} | {spent['before']:,} | {spent['after']:,} |")
    return rows


def _notes(
    plan: Plan, table: dict[str, Any], layers: dict[int, dict[str, Any]], details: dict[str, Any]
) -> Iterator[str]:
    """What a user of the model has to know, a paragraph each."""
    if not table["exact"]:
        changes = ["One latent for all heads"] if "latent" in table else ["Sharing KV heads"] if _pooled(table) else []
        changes += ["another form of its blocks"] if "block" in table else []
        changes += [f"the variant {name}" for name in table.get("variants", ())]
        what = " and ".join(changes)
        yield (
            f"{what[0].upper()}{what[1:]} change{'s' if len(changes) == 1 else ''} what the model computes. Uptrain it "
            "briefly and evaluate it against the original before you rely on it."
        )
    if "latent" in table:
        yield (
            "Latents are stored at a scale so small that the norm behind them is a constant. float16 and quantisations "
            "with float16 scales (GGUF's Q8_0) turn them to zeros: keep `kv_a_proj_with_mqa` in bfloat16 or float32."
        )
    for note in (table.get(name, {}).get("note") for name in ("layout", "host")):
        if note:
            yield f"{note[0].upper()}{note[1:]}."
    if plan.raw_config.get("auto_map"):
        serial = " Its serial class would take the weights and compute something else."
        yield (
            "Transformers has no class for this model: load it by an Auto class, after `import rehead` or trusting the "
            f"modelling file beside the weights.{serial if 'parallel_layers' in plan.raw_config else ''}"
        )
    config = plan.result.config
    steady = steady_length(config) if changing_rope(config) else None
    if steady is not None:
        yield (
            f"Its rotary frequencies change where a text passes {steady:,} tokens. Plain transformers does not "
            "notice that while it writes: keys in its cache stay as they were rotated for the shorter text, and what "
            f"follows is wrong. Read a prompt of more than {steady:,} tokens in one go, stay below it, or patch the "
            "model with Rehead "
            '(`patch_model(model, "tiled")`), which refuses to pass it over such a cache.'
        )
    if details.get("text"):
        texts = ", ".join(code(without_folders(name)) for name in details["text"])
        yield f"Calibrated on {details['tokens']:,} tokens of: {texts}."
    errors = {layer: facts for layer, facts in layers.items() if "value_error" in facts}
    if errors and not table["exact"]:
        worst = max(errors, key=lambda layer: errors[layer]["key_error"] + errors[layer]["value_error"])
        keys, values = (_mean(list(errors.values()), name) for name in ("key_error", "value_error"))
        yield (
            f"Relative error of the pooled projections: keys {keys:.3f}, values {values:.3f} on average; largest in "
            f"layer {worst}. Per layer: `rehead.json`."
        )
    if drafts := table["drafts"]:
        yield (
            f"Draft layers that transformers does not load keep the original's heads: {', '.join(map(code, drafts))}. "
            + ("" if table["exact"] else "An engine that drafts with them reads them wrongly.")
        ).strip()
    if dropped := table["dropped"]:
        yield f"Layers that drafted tokens were left out, {len(dropped)} tensors; an engine must not be told to draft."
    if left := table["code_left_out"]:
        yield f"Code stays behind: {', '.join(map(code, left))}. A tokenizer that needs it loads from the original."


def _for_engines(plan: Plan) -> list[str]:
    """What another conversion would do for engines that do not serve this one."""
    config, said = plan.raw_config, []
    if config.get("kv_lora_rank") and not config.get("attention_bias"):
        runs = deciding_runs(config)
        said = [f"`--for {flag}`" for flag, name in ENGINE_NAMES.items() if name in runs and runs[name].outcome != SAME]
    elif plan.options.context is not None:
        helped, now = (deciding_runs(config, **assumed).get("vLLM") for assumed in ({"says_mscale": True}, {}))
        if helped is not None and helped.outcome == SAME and now is not None and now.outcome != SAME:
            said = ["`--for vllm`"]
    return [f"Converted with {' or '.join(said)} it serves there."] if said else []


def _mean(entries: list[dict[str, Any]], key: str) -> float:
    return sum(float(entry[key]) for entry in entries) / len(entries)
