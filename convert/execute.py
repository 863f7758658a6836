"""Running a plan: stream the source into a staged folder, one layer live at a time."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.manifest import made_by
from rehead.checkpoints.resume import check_start, finish_commit
from rehead.checkpoints.target import Target
from rehead.console import Progress
from rehead.convert.card import model_card
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import LayerProvider, Plan, make_plan
from rehead.convert.verdict import Verdict, better, reach_verdict
from rehead.errors import UsageError
from rehead.lazy import late
from rehead.models.live import resolve_device
from rehead.models.model import Model, open_model
from rehead.models.modeling import carried_files
from rehead.models.ranks import Ranks, join_ranks
from rehead.options import takes
from rehead.variants.layer_choice import is_auto
from rehead.version import __version__

if TYPE_CHECKING:
    import torch

    from rehead.healing.finished import FinishedLayers
else:
    torch = late("torch")


@dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes:
        out: the finished folder.
        plan: what was planned.
        layers: groups and reconstruction errors of each layer.
        verdict: how far the result is from its source.
        seconds: wall time.
    """

    out: Path
    plan: Plan
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        table = self.plan.as_json()
        table.pop("changes")
        told = {**self.verdict.as_json(), "better": better(self.plan, self.verdict, str(self.out))}
        facts = {"out": str(self.out), "seconds": round(self.seconds, 2), **table, "layer_errors": self.layers}
        return {**facts, "quality": told}


@takes(ConvertOptions)
def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    **options: Any,
) -> Conversion:
    """Convert a checkpoint: to fewer KV heads, to another class that computes the same, or both.

    Under ``accelerate launch`` every process calls this with the same arguments. They share the calibration text; the
    main one writes, and has all that the result says.

    Args:
        model: a local folder or a Hub id.
        out: the folder to write; must not exist unless ``overwrite`` or ``resume``.
        device: where calibration runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        revision: Hub revision of ``model``.
        resume: continue from what a killed run left.
        overwrite: replace an existing checkpoint at ``out``.
        push_to_hub: upload the result to this repository.
        progress: called with (stage, done, total).
        command: recorded in the manifest and the model card; the Python call when None.

    Returns:
        What was done; ``out`` holds a plain checkpoint, ``rehead.json`` and a model card.

    Raises:
        UsageError: an invalid argument.
        UnsupportedError: a model that cannot be converted, broken input, or a full disk; ``out`` is as it was.
    """
    asked = ConvertOptions.parse(options)
    ranks = join_ranks(device)
    started = time.monotonic()
    with ranks.announced():
        opened = open_model(model, revision)
        with opened.source:
            # Before the model runs to choose layers or sizes.
            by_text = is_auto(asked.layers) or asked.is_latent or asked.fits_context
            asks = {"asked": asked.as_json()} if by_text else {}
            chosen: dict[str, Any] = {}
            if ranks.main:
                folder = getattr(opened.source, "folder", None)
                check_start(out, folder, {"source": opened.source.fingerprint(), **asks}, resume, overwrite)
                asked, chosen = _chosen_by_text(opened, asked, ranks.device, progress)
            settled = ranks.from_main(asked.as_json)
            plan = make_plan(opened, asked if ranks.main else ConvertOptions.parse(settled))
            if plan.model.family.guessed and plan.kv != plan.model.num_kv_heads:
                from rehead.convert.prove_layout import prove_layout

                prove_layout(plan.model)
            result = execute(plan, out, device, resume, overwrite, progress, command, chosen, asks=asks, ranks=ranks)
        result.seconds = time.monotonic() - started
        if push_to_hub and ranks.main:
            from rehead.checkpoints.push import push_folder

            push_folder(result.out, push_to_hub)
        ranks.from_main(lambda: None)  # the end: whatever still fails in the main process ends all
        ranks.wait()
    return result


def _chosen_by_text(
    opened: Model, asked: ConvertOptions, device: torch.device, progress: Progress | None
) -> tuple[ConvertOptions, dict[str, Any]]:
    """(the options with what they leave to the text filled in, what was measured, for the manifest)."""
    chosen: dict[str, Any] = {}
    if is_auto(asked.layers):
        from rehead.convert.auto_layers import choose

        asked, measured = choose(opened, asked, device, progress)
        chosen["chosen_layers"] = measured
    if asked.is_latent:
        from rehead.convert.latent import choose_sizes

        asked, measured = choose_sizes(opened, asked, device, progress)
        chosen |= measured
    if asked.fits_context:
        from rehead.convert.long_context import fit_context

        asked, measured = fit_context(opened, asked, device, progress)
        chosen |= measured
    return asked, chosen


@takes(ConvertOptions)
def plan(model: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> Plan:
    """The exact change that :func:`convert` would make; reads config and headers only.

    Args:
        model: a local folder or a Hub id.
        revision: Hub revision.
    """
    asked = ConvertOptions.parse(options)
    if is_auto(asked.layers):
        raise UsageError(
            "--layers auto: chooses by running the model, which a plan does not; name the layers or convert"
        )
    return make_plan(open_model(model, revision), asked)


def execute(
    plan: Plan,
    out: str | os.PathLike[str],
    device: str,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    chosen: dict[str, Any] | None = None,
    solved: tuple[FinishedLayers, dict[str, Any]] | None = None,
    asks: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Conversion:
    """Carry out a plan; as :func:`convert`.

    Args:
        chosen: how the layers were chosen, for the manifest.
        solved: the layers of a calibrated plan and facts for the manifest, where they have been computed before.
        asks: what was asked for where the text has decided the plan's options, so that a resumed run can be refused
            before it reads any.
        ranks: the processes that share the calibration text, of which the main one does all the rest; None: this alone.
    """
    ranks = ranks or Ranks(0, 1, resolve_device(device))
    source, options = plan.result.source, plan.options
    result = Conversion(Path(out), plan)
    if not ranks.main:
        if ranks.from_main(bool):
            _calibrate(plan, result.out, ranks, None)
        return result
    command = command or f"rehead.convert.convert(..., num_key_value_heads={plan.kv})"
    fingerprint = {
        "source": source.fingerprint(),
        "options": options.as_json(),
        "plan": [[t.name, t.dtype, list(t.shape), t.origin] for t in plan.outputs],
        "version": [__version__, torch.__version__],
        "device": device if options.needs_calibration else "",
        **(asks or {}),
    }
    finished = finish_commit(out, fingerprint) if resume else None
    if finished is not None:  # the run that is resumed was killed in its last step
        ranks.from_main(bool)
        result.layers = {int(layer): errors for layer, errors in finished["layers"].items()}
        result.verdict = Verdict(**finished["quality"]) if "quality" in finished else result.verdict
        return result
    with Target(out, source=source, overwrite=overwrite, resume=resume, fingerprint=fingerprint) as target:
        model_card(plan, {}, command, {})  # what could go wrong with it, before the weights are written
        result.layers.update({int(layer): facts for layer, facts in target.remembered.items()})
        provide: LayerProvider | None = None
        details: dict[str, Any] = {}
        if ranks.from_main(lambda: solved is None and plan.calibrated):
            solved = _calibrate(plan, target.work_dir, ranks, progress)
        if solved is not None:
            provide, details = solved[0], dict(solved[1])
            result.layers.update(solved[0].facts)

        def note(layer: int, facts: dict[str, Any]) -> None:
            if facts:
                result.layers[layer] = facts
                # A resumed run does not compute again what stands in finished files.
                target.remember(str(layer), facts)

        tick = None if progress is None else lambda done, total: progress("writing", done, total)
        target.write_weights(plan.outputs, plan.chain(provide, note).read, options.max_shard_size, tick)
        target.copy_small_files(skip=("config.json",))
        target.write_text("config.json", json.dumps(plan.raw_config, indent=2, ensure_ascii=False) + "\n")
        for name, text in carried_files(plan.raw_config).items():
            target.write_text(name, text)
        details |= chosen or {}
        result.verdict = reach_verdict(plan, target.path, ranks.device)
        target.write_text("README.md", model_card(plan, result.layers, command, details, result.verdict))
        target.commit(manifest(plan, result.layers, command, details, result.verdict))
    return result


def _calibrate(
    plan: Plan, folder: Path, ranks: Ranks, progress: Progress | None
) -> tuple[FinishedLayers, dict[str, Any]]:
    """(a plan's computed layers, with files in ``folder`` that the main process writes; facts for the manifest)."""
    from rehead.convert.calibrated import calibrate
    from rehead.healing.finished import FinishedLayers

    layers = FinishedLayers(folder)
    return layers, calibrate(plan, layers, ranks, progress)


def manifest(
    plan: Plan, layers: dict[int, dict[str, Any]], command: str, details: dict[str, Any], verdict: Verdict
) -> dict[str, Any]:
    """What ``rehead.json`` records, less the files and their hashes."""
    table = plan.as_json()
    return {
        **made_by(command),
        **{key: table[key] for key in (
            "source", "revision", "model_type", "layout", "host",
            "num_attention_heads", "head_dim", "num_key_value_heads",
            "kv_bytes_per_token", "cache_bytes", "parameters", "reinvest", "block", "variants", "latent",
            "exact", "rounded", "engines",
            "options", "config_changes",
        ) if key in table},
        "calibration": details,
        **({"quality": asdict(verdict)} if verdict.word else {}),
        "layers": {str(layer): layers[layer] for layer in sorted(layers)},
        "changed_tensors": [change.name for change in plan.changes],
    }  # fmt: skip
