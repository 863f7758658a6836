"""The commands ``rehead patches`` and ``rehead bench``: read flags, call one function, print."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import click

from rehead.console import JSON, QUIET, LazyGroup, echo, print_json

BENCHMARKS: dict[str, tuple[str, str]] = {
    "attention": ("rehead.benchmarks.attention", "GPU kernels beside SDPA flash, SDPA cuDNN and FlexAttention."),
    "decode": ("rehead.benchmarks.decode", "The decode kernel's share of the copy bandwidth, beside SDPA."),
    "sparse": ("rehead.benchmarks.sparse", "Block-sparse attention of a model's long prompt beside the dense kernel."),
    "latent": ("rehead.benchmarks.latent_decode", "A decoding step over latents, beside FlashMLA and expanded heads."),
    "cpu": ("rehead.benchmarks.cpu_attention", "The CPU path beside SDPA: time and memory to 64k tokens."),
    "end-to-end": ("rehead.benchmarks.end_to_end", "A 7B-shaped model with 32, 8 and 1 KV heads: tokens per second."),
    "blocks": ("rehead.benchmarks.blocks", "Serial beside parallel transformer blocks."),
    "perplexity": ("rehead.benchmarks.perplexity", "Perplexity beside its referees, convention by convention."),
}


@click.command("patches")
@click.option(
    "--coverage", is_flag=True, help="Try every causal model type that transformers can build tiny.  [default: off]"
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="With --coverage: only this type; repeat for more.  [default: all]",
)
@click.option(
    "--workers", type=click.IntRange(1), default=None, help="With --coverage: processes.  [default: one for each core]"
)
@click.option("--seconds", type=click.FloatRange(1), default=90.0, show_default=True, help="With --coverage: per type.")
@JSON
@QUIET
def patches_command(
    coverage: bool, types: tuple[str, ...], workers: int | None, seconds: float, as_json: bool, quiet: bool
) -> None:
    """List the patches and what they apply to; with --coverage, prove them on every architecture."""
    if not coverage:
        if types or workers is not None:
            raise click.UsageError("--type and --workers go with --coverage; add it")
        _list(as_json)
        return
    command = _benchmark("coverage", "rehead.benchmarks.coverage").command
    command(types, workers or os.cpu_count() or 1, seconds, as_json, quiet)


def _list(as_json: bool) -> None:
    from rehead.attention.adapters import ADAPTERS
    from rehead.patches import NAME, live_names
    from rehead.variants.contract import VARIANTS

    variants = [VARIANTS.get(name) for name in live_names()]
    patches = [{"name": v.name, "summary": v.summary, "options": list(v.options.model_fields)} for v in variants]
    if as_json:
        facts = {"patches": patches, "attn_implementation": NAME, "adapters": sorted(ADAPTERS)}
        print_json(facts)
        return
    for patch in patches:
        echo(f"{patch['name']}: {patch['summary']}")
        echo(f"  options: {', '.join(patch['options']) or 'none'}")
    echo()
    echo(f"models on transformers' attention interface: directly, or attn_implementation={NAME!r}")
    echo("models with attention of their own, by adapter:")
    for name in sorted(ADAPTERS):
        echo(f"  {name}")
    echo("everything else is refused; `rehead patches --coverage` tries every type")


def _load(module: str, name: str) -> click.Command:
    """A command that hands the rest of the line to the benchmark's own parser."""

    def call(args: tuple[str, ...]) -> None:
        _benchmark(name, module).main(list(args))

    return click.Command(
        name,
        callback=call,
        params=[click.Argument(["args"], nargs=-1, type=click.UNPROCESSED)],
        help=f"{BENCHMARKS[name][1]} Its own flags: rehead bench {name} --help",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )


def _benchmark(name: str, module: str) -> Any:
    from rehead.errors import UnsupportedError

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise UnsupportedError(
                f"benchmark {name!r} needs {error.name}, which is not installed; install it"
            ) from error
        raise UnsupportedError(f"benchmark {name!r} is not part of this installation; choose another") from error


@click.group("bench", cls=LazyGroup, table=BENCHMARKS, load=_load, kind="benchmark", invoke_without_command=True)
@click.pass_context
def bench_command(ctx: click.Context) -> None:
    """Measure Rehead beside its peers on this machine."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
