"""The commands inspect, plan, convert, verify and families: flags in, one function called, facts printed."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from rehead.console import JSON, OVERWRITE, QUIET, REVISION, echo, print_columns, print_facts, print_json, progress_bar
from rehead.convert.budget.commands import print_met
from rehead.convert.budget.options import BudgetOptions
from rehead.convert.options import ConvertOptions
from rehead.errors import UsageError
from rehead.flags import flags, set_by_user
from rehead.models.serving import engine_line

if TYPE_CHECKING:
    from rehead.convert.execute import Conversion


@click.command("inspect")
@click.argument("model")
@REVISION
@JSON
def inspect_command(model: str, revision: str | None, as_json: bool) -> None:
    """Show MODEL's attention layout, KV bytes per token, and what can be done."""
    from rehead.convert import inspect

    facts = inspect(model, revision)
    if as_json:
        print_json(facts)
        return
    rows = [
        ("type", f"{facts['model_type']}, {facts['attention']} attention, {facts['block']} blocks"),
        ("layers", f"{facts['layers']}, {facts['attention_layers']} of them with attention"
                   if facts["attention_layers"] <= facts["layers"]
                   else f"{facts['attention_layers']} attentions of the decoder, to itself and to the encoder"),
        ("heads", f"{facts['num_attention_heads']} query, {facts['num_key_value_heads']} KV, "
                  f"head_dim {facts['head_dim']}"),
        ("projections", facts["packing"] + (f", biases on {', '.join(facts['biases'])}" if facts["biases"] else "")),
        ("positions", facts["positions"]),
        ("key norm", facts["key_norm"]),
        ("parameters", f"{facts['parameters']:,} ({facts['bytes'] / 1e9:.2f} GB; {', '.join(facts['dtypes'])})"),
        ("KV cache", f"{facts['kv_bytes_per_token']:,} bytes per token"
                     + (", until a window is full" if facts["windows"] else "")),
        *_cache_rows(facts["windows"], {"": facts["cache_bytes"]}),
    ]  # fmt: skip
    if layout := facts.get("layout"):
        note = f"; {layout['note']}" if "note" in layout else ""
        rows.insert(
            1, ("published as", f"{layout['before']} with remote code, which is not needed: read as above{note}")
        )
    for count, size in facts["can_convert_to"].items():
        saved = 1 - size / facts["kv_bytes_per_token"]
        rows.append((f"to {count} KV head{'s' if count != '1' else ''}", f"{size:,} bytes per token, {saved:.1%} less"))
    rows += [("cannot", reason) for reason in facts["cannot"]]
    rows += [("tensors", strays)] if (strays := _strays(facts)) else []
    rows += [("may become", ", ".join(facts["hosts"]))] if facts["hosts"] else []
    print_facts(facts["model"], rows)


@click.command("plan")
@click.argument("model")
@flags(ConvertOptions)
@REVISION
@JSON
def plan_command(model: str, revision: str | None, as_json: bool, **values: Any) -> None:
    """Show exactly what a conversion of MODEL would change; reads config and headers only."""
    from rehead.convert import plan

    facts = plan(model, revision=revision, **set_by_user(values)).as_json()
    if as_json:
        print_json(facts)
        return
    after = f"{facts['num_key_value_heads']['after']} KV heads" if "latent" not in facts else "latent attention"
    print_facts(f"{facts['source']} -> {after}", _plan_rows(facts))
    shown: dict[str, list[str]] = {}
    for change in facts["changes"]:
        kind = re.sub(r"\.\d+\.", ".{i}.", change["name"], count=1)
        shown.setdefault(f"{kind}  {change['before']} -> {change['after']}", []).append(str(change["layer"]))
    for line, layers in shown.items():
        echo(f"  {line}" + (f"  in {len(layers)} layers" if layers != ["None"] else ""))


@click.command("convert")
@click.argument("model")
@click.argument("out")
@flags(ConvertOptions)
@flags(BudgetOptions, without=("context",))  # the same flag
@click.option("--device", default="auto", show_default=True, help="Where calibration runs: auto, cpu, cuda, ...")
@click.option(
    "--device-memory", metavar="SIZE", help="Take no more of the GPU's memory, e.g. 20GB.  [default: what is free]"
)
@REVISION
@click.option("--resume", is_flag=True, help="Continue from what a killed run left.  [default: off]")
@OVERWRITE
@click.option("--push-to-hub", metavar="REPO", help="Upload the result to this Hub repository.  [default: no upload]")
@QUIET
@JSON
def convert_command(model: str, out: str, device_memory: str | None, as_json: bool, quiet: bool, **values: Any) -> None:
    """Convert MODEL (a folder or Hub id) and write a plain checkpoint to OUT.

    --kv-cache 33% alone, or --kl 0.05, chooses the form of every layer by what it loses: see `rehead curve`.

    Several GPUs share the calibration text: accelerate launch --num_processes 2 -m rehead.cli convert ...
    """
    from rehead.checkpoints.opening import read_beforehand
    from rehead.checkpoints.shards import parse_size

    read_beforehand(model)
    from rehead.convert import convert
    from rehead.models.device_memory import memory_limited
    from rehead.models.ranks import join_ranks

    # How a run was started is no part of what it made: a resumed one ends with the same bytes.
    line = shlex.join(
        ["rehead", *(flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite", "--quiet", "-q"))]
    )
    given = set_by_user(values)
    size = None if device_memory is None else parse_size(device_memory, "--device-memory")
    ranks = join_ranks(values["device"])
    limited = memory_limited(ranks.device, size)
    if _is_budget(given):
        if ranks.world > 1:
            raise UsageError("a budget (--kv-cache alone, --kl, ...) is met by one process; run it without a launcher")
        from rehead.convert.budget.meet import meet

        with limited, progress_bar(quiet) as progress:
            met = meet(model, out, given.pop("kv_cache", None), progress=progress, command=line, **given)
        if as_json:
            print_json(met.as_json())
        elif not quiet:
            print_met(met, out)
        return
    with limited, progress_bar(quiet or not ranks.main) as progress:
        result = convert(model, out, progress=progress, command=line, **given)
    if not ranks.main:
        return
    facts = result.as_json()
    if as_json:
        print_json(facts)
    elif not quiet:
        rows = _plan_rows(facts)
        errors = [entry for entry in facts["layer_errors"].values() if "key_error" in entry]
        if errors and not facts["exact"]:
            keys = sum(entry["key_error"] for entry in errors) / len(errors)
            values = sum(entry["value_error"] for entry in errors) / len(errors)
            rows.append(("relative error", f"keys {keys:.3f}, values {values:.3f} (mean over layers)"))
        if "latent" in facts:
            rows += _latent_errors(facts["layer_errors"])
        rows.append(("time", f"{facts['seconds']:.1f} s"))
        rows += _verdict_rows(result, facts["quality"]["better"])
        print_facts(f"wrote {out}", rows)


def _is_budget(given: dict[str, Any]) -> bool:
    """Whether a cache is asked for and not what it is to be made of."""
    latent = any(text.partition(":")[0] == "latent" for text in given.get("variants", ()))
    if given.keys() & (BudgetOptions.model_fields.keys() - {"context"}):
        return True
    return bool(given.keys() & {"kv_cache"} or ("engine" in given and "context" not in given)) and not (
        latent or given.keys() & {"rope_dims", "host", "latent", "fold_biases", "half_scale"}
    )


@click.command("verify")
@click.argument("out")
@click.option("--source", metavar="MODEL", help="Compare logits with this model.  [default: none]")
@REVISION
@QUIET
@JSON
def verify_command(out: str, source: str | None, revision: str | None, quiet: bool, as_json: bool) -> None:
    """Check a converted folder OUT: files against the manifest, loading, logits."""
    from rehead.convert import verify

    with progress_bar(quiet) as progress:
        report = verify(out, source, revision=revision, progress=progress).as_json()
    if as_json:
        print_json(report)
        return
    if quiet:
        return
    rows = [
        ("files", f"{report['files']} match their SHA-256"),
        ("loads", f"{report['loads_with']}, {_strays(report) or 'no missing or unexpected tensor'}"),
        ("KV cache", _cache_line(report)),
    ]
    if report["against_source"]:
        against = report["against_source"]
        rows.append(("against source", f"KL {against['mean_kl']:.4g} nats, top-1 agreement "
                                       f"{against['top1_agreement']:.1%}, largest logit difference "
                                       f"{against['max_difference']:.3g}, on {against['positions']:.0f} tokens of "
                                       f"{report['text']}"))  # fmt: skip
    rows.append(("engines", engine_line(report["engines"])))
    print_facts(f"{out} verifies", rows)


def _verdict_rows(result: Conversion, better: str | None) -> list[tuple[str, str]]:
    """How far the result is from its source, what it is good for, and what to run next."""
    verdict, source = result.verdict, result.plan.source.source.id
    rows = [("beside its source", str(verdict))]
    if verdict.word is None:
        rows.append(("to measure", shlex.join(["rehead", "verify", str(result.out), "--source", source])))
        rows += [] if result.plan.exact else [("verdict", "unknown; uptrain or evaluate it before you rely on it")]
    else:
        rows.append(("verdict", "exact: the same function" if result.plan.exact else verdict.word))
    return rows + ([("better", better)] if better else [])


def _latent_errors(layers: dict[int, dict[str, Any]]) -> list[tuple[str, str]]:
    """What the layers lose, in closed form and after they were fitted: mean and worst."""
    told = (
        ("nonlinear", "normed heads", "of the worst head that linear queries and keys leave out"),
        ("bias_error", "folded biases", "of a bias, which the weights now stand for"),
        ("lost", "closed form", "of what heads read of keys and values"),
        ("output_error", "attention error", "of the attention's output, refitted"),
        ("block_error", "block error", "of what attention and FFN write, refitted"),
    )
    rows = []
    for key, name, what in told:
        errors = {layer: facts[key] for layer, facts in layers.items() if key in facts}
        errors = {layer: error[-1] if isinstance(error, list) else error for layer, error in errors.items()}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            mean = sum(errors.values()) / len(errors)
            rows.append((name, f"{mean:.3f} {what} (mean over layers; {errors[worst]:.3f} in layer {worst})"))
    return rows


def _strays(facts: dict[str, Any]) -> str:
    """Tensors that source and result both lack of their class, or hold beyond it."""
    kinds = (
        ("missing", "is missing as in the source: each load draws it at random"),
        ("unexpected", "is ignored by the class, which is as good as without it"),
        (
            "drafts",
            "drafts tokens, which the class does not load: it keeps the source's heads (--drop-drafts omits it)",
        ),
        ("dropped", "drafted tokens and is left out"),
        ("code_left_out", "is code, which stays behind; a tokenizer that names it loads from the source only"),
    )
    said = []
    for kind, what in kinds:
        if names := facts.get(kind):
            said.append(f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} {what}")
    return "; ".join(said)


def _cache_rows(windows: Sequence[int], sizes: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """The size of the cache at several contexts, where windows make it differ from so much per token."""
    if not windows:
        return []
    tables = list(sizes.values())
    return [
        (f"at {int(context):,} tokens", " -> ".join(f"{table[context]:,}" for table in tables) + " bytes")
        for context in tables[0]
    ]


def _cache_line(report: dict[str, Any]) -> str:
    if report["cache_error"] is None:
        return "none that the class hands back, so nothing was compared"
    if report["source_cache_error"] is not None:
        return (
            f"logits with and without differ by {report['cache_error']:.1e}, the source's by "
            f"{report['source_cache_error']:.1e}: the class itself computes something else with a cache"
        )
    agree = f"logits with and without agree to {report['cache_error']:.1e}"
    size = report["cache_bytes"]
    if size and size["measured"] == size["layout"]:
        return f"{agree}; {size['measured']:,} bytes in float32 for {size['tokens']} tokens, as its layout says"
    return agree


@click.command("families")
@JSON
def families_command(as_json: bool) -> None:
    """List every supported architecture with its layout."""
    from rehead.convert.inspection import describe_families

    rows = describe_families()
    if as_json:
        print_json(rows)
        return
    print_columns([[row[key] for key in ("model_type", "packing", "key_norm", "positions", "notes")] for row in rows])


@click.command("variants")
@JSON
def variants_command(as_json: bool) -> None:
    """List every variant of attention and blocks: what it is and where it can go."""
    from rehead.convert.variants import describe_variants

    rows = describe_variants()
    if as_json:
        print_json(rows)
        return
    for row in rows:
        where = " and ".join(word for word, there in (("live", row["live"]), ("saved", row["saved"])) if there)
        row["where"] = f"{'exact' if row['exact'] else 'approximate'}, {where}"
    print_columns([[row[key] for key in ("name", "where", "summary", "source")] for row in rows])


def _plan_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    kv, cache, size = facts["num_key_value_heads"], facts["kv_bytes_per_token"], facts["parameters"]
    options = facts["options"]
    how = [options["method"], f"{options['grouping']} groups"]
    how += ["refit"] if options["refit"] else []
    how += [f"fit of {options['fit']} steps a layer"] if options["fit"] else []
    rows: list[tuple[str, str]] = []
    for change in (facts[name] for name in ("layout", "host") if name in facts):
        note = f"; {change['note']}" if "note" in change else ""
        rows.append(("class", f"{change['before']} -> {change['after']}, which computes the same{note}"))
    if "latent" in facts:
        return rows + _latent_rows(facts, how[2:])
    rows += [
        ("method", ", ".join(how) if kv["before"] != kv["after"] else _unpooled(facts)),
        ("KV heads", f"{kv['before']} -> {kv['after']}"),
        ("KV cache", f"{cache['before']:,} -> {cache['after']:,} bytes per token"),
        *_cache_rows(facts["windows"], facts["cache_bytes"]),
        ("parameters", f"{size['before']:,} -> {size['after']:,}"),
    ]
    if strays := _strays(facts):
        rows.append(("tensors", strays))
    if "block" in facts:
        form = facts["block"]
        carried = "" if form["plain"] else "; carries its modelling file"
        rows.append(("blocks", f"{form['before']} -> {form['after']} ({len(form['layers'])} layers change{carried})"))
    for name, told in facts.get("variants", {}).items():
        said = (f"{key} {value}" for key, value in told["options"].items() if value is not None)
        rows.append((name, ", ".join(said)))
    if "reinvest" in facts:
        spent = facts["reinvest"]
        rows.append((f"{spent['key']}", f"{spent['before']:,} -> {spent['after']:,}: {spent['arithmetic']}"))
    return [*rows, ("engines", engine_line(facts["engines"])), *_calibration_row(options)]


def _calibration_row(options: dict[str, Any]) -> list[tuple[str, str]]:
    if "calibration" not in options:
        return []
    source = ", ".join(options["calibration"])
    length = options["calibration_length"]
    lengths = " and ".join(map(str, length)) if isinstance(length, list) else length
    return [("calibration", f"{options['calibration_tokens']:,} tokens of {source}, sequences of {lengths}")]


def _latent_rows(facts: dict[str, Any], healing: list[str]) -> list[tuple[str, str]]:
    """A plan of latent attention: what it is, what it costs, and what tensor parallelism makes of it."""
    latent, cache, size, options = facts["latent"], facts["kv_bytes_per_token"], facts["parameters"], facts["options"]
    numbers, flops, (kept, pairs) = latent["numbers_per_token"], latent["attention_flops"], latent["pairs"]
    chosen = "" if "rope_dims" in options else "; convert lets the text choose how many"
    at = f"at {flops['context']:,} tokens"
    return [
        ("class", f"{facts['model_type']} -> {latent['host']}, with latent attention in every layer"),
        ("method", ", ".join(["closed form on calibration text", *healing])),
        ("latent", f"{latent['rank']} numbers and a rotated key of {latent['rope_dims']}"),
        ("rotary pairs", f"{kept} of {pairs} keep turning{chosen}"),
        ("KV cache", f"{cache['before']:,} -> {cache['after']:,} bytes per token, {numbers['before']} -> "
                     f"{numbers['after']} numbers per layer"),
        ("tensor parallel", _ranks(numbers, facts["num_key_value_heads"]["before"])),
        ("parameters", f"{size['before']:,} -> {size['after']:,}"),
        ("attention", f"{flops['before']:,} -> {flops['after']:,} FLOPs for one token {at}; {flops['expanded']:,} "
                      "where heads are expanded"),
        *([("tensors", strays)] if (strays := _strays(facts)) else []),
        ("engines", engine_line(facts["engines"])),
        *_calibration_row(options),
    ]  # fmt: skip


def _ranks(numbers: dict[str, int], kv_heads: int) -> str:
    """What tensor parallelism makes of the cache: ranks share out KV heads, and a latent not."""
    said = "every rank holds the whole latent, so ranks do not divide the cache"
    level = -(-numbers["before"] // numbers["after"])
    return said + (f"; over {level} ranks or more the heads as they are take no more per rank" * (level <= kv_heads))


def _unpooled(facts: dict[str, Any]) -> str:
    refits = facts["options"]["refit"] and "block" in facts
    return "none: the number of KV heads stays" + ("; least-squares refit" if refits else "")
