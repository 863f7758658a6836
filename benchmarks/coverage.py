"""Which causal model types of the installed transformers are proved under the tiled patch, and why others are not."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from rehead.console import echo, print_json, progress_bar
from rehead.errors import VerificationError, check_names

PROVED, REFUSED, FAILED, WRONG, UNBUILT = "proved", "refused", "failed", "wrong", "not built"

TOLERANCE = 1e-5
"""Largest difference of logits, as :func:`rehead.models.probing.allowed` takes it."""


@dataclass
class Outcome:
    """One model type.

    Attributes:
        model_type: as in ``config.model_type``.
        status: ``proved``; ``refused`` (one line said why, nothing was changed); ``failed`` (``prove()`` raised);
            ``wrong`` (``prove()`` passed and an independent check did not: must not happen); ``not built``
            (transformers cannot make or run it this small).
        reason: the line behind the status.
        difference: largest difference of logits, where proved.
        by_name: what ``attn_implementation="rehead_tiled"`` does without a patch: ``same``, ``raises`` or ``wrong``.
        seconds: time taken.
    """

    model_type: str
    status: str
    reason: str = ""
    difference: float | None = None
    by_name: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_type(model_type: str) -> Outcome:
    """Build a tiny model of a type, patch it, prove it, and check what a proof by one forward pass cannot see.

    Beyond ``prove()``: decoding with a cache must give the unpatched logits, outputs must return bit for bit on revert,
    and the same model loaded with ``attn_implementation="rehead_tiled"`` must agree or raise.
    """
    start = time.monotonic()
    outcome = _try(model_type)
    outcome.seconds = round(time.monotonic() - start, 2)
    return outcome


def _line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:240]


def _try(model_type: str) -> Outcome:
    import torch

    from rehead.benchmarks.tiny import tiny_model
    from rehead.errors import ReheadError, UnsupportedError, VerificationError
    from rehead.models import probing
    from rehead.models.distance import difference
    from rehead.patches import patch_model

    torch.set_num_threads(1)
    try:
        model = tiny_model(model_type)
        ids = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            reference = model(input_ids=ids, use_cache=False).logits
    except UnsupportedError as error:
        return Outcome(model_type, UNBUILT, _line(error))
    except Exception as error:
        return Outcome(model_type, UNBUILT, f"the unpatched model does not run: {type(error).__name__}: {_line(error)}")
    by_name = _by_name(model_type, ids, reference)
    try:
        with patch_model(model, "tiled") as patch:
            proof = patch.prove()
            cached = _decode(model, ids)
    except VerificationError as error:
        return Outcome(model_type, FAILED, _line(error), by_name=by_name)
    except ReheadError as error:
        return Outcome(model_type, REFUSED, _line(error), by_name=by_name)
    except Exception as error:
        return Outcome(model_type, FAILED, f"{type(error).__name__}: {_line(error)}", by_name=by_name)
    status, reason = PROVED, f"{proof.layers} layers"
    definition = model
    if proof.against == "eager":
        reason += ", against eager attention, which the model's default implementation differs from"
        definition = tiny_model(model_type, attn_implementation="eager")
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=False).logits
    plain = _decode(definition, ids)
    if not torch.equal(again, reference):
        status, reason = WRONG, "revert does not restore the outputs"
    elif isinstance(plain, torch.Tensor) and isinstance(cached, torch.Tensor):
        gap = difference(plain, cached)
        if not gap <= probing.allowed(plain, TOLERANCE):
            status, reason = WRONG, f"decoding with a cache differs by {gap:.1e}"
    elif isinstance(plain, torch.Tensor):
        status, reason = FAILED, f"decoding with a cache raises: {cached}"
    if by_name == "wrong":
        status, reason = WRONG, "loaded as attn_implementation='rehead_tiled' it computes something else"
    return Outcome(model_type, status, reason, proof.difference, by_name)


def _decode(model: Any, ids: Any) -> Any:
    """Logits of a cached continuation with the first row padded on the left; the error's text where there is none."""
    import torch

    from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache

    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    try:
        with torch.no_grad():
            first = model(input_ids=ids[:, :30], attention_mask=mask[:, :30], use_cache=True)
            cache = returned_cache(first)
            if cache is None:
                return "no cache"
            rows = [first.logits[1], first.logits[0, 7:]]
            for start, stop in ((30, 31), (31, 32), (32, 36)):
                step = model(
                    input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **cache_argument(cache)
                )
                cache = returned_cache(step)
                rows.append(step.logits.flatten(0, 1))
        return torch.cat(rows)
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"


def _by_name(model_type: str, ids: Any, reference: Any) -> str:
    import torch

    from rehead.benchmarks.tiny import tiny_model
    from rehead.models import probing
    from rehead.models.distance import difference

    try:
        named = tiny_model(model_type, attn_implementation="rehead_tiled")
        with torch.no_grad():
            out = named(input_ids=ids, use_cache=False).logits
    except Exception:
        return "raises"
    limit = probing.allowed(reference, TOLERANCE)
    if difference(out, reference) <= limit:
        return "same"
    # The default implementation may itself drop something; eager attention is the definition.
    try:
        with torch.no_grad():
            eager = tiny_model(model_type, attn_implementation="eager")(input_ids=ids, use_cache=False).logits
    except Exception:
        return "wrong"
    return "same" if difference(out, eager) <= limit else "wrong"


def _worker(pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    import logging

    logging.disable(logging.WARNING)
    while True:
        name = pipe.recv()
        if name is None:
            return
        pipe.send(try_type(name).to_dict())


@dataclass
class _Slot:
    process: Any
    pipe: Connection
    name: str | None = None
    deadline: float = 0.0


def _start(context: Any) -> _Slot:
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Slot(process, ours)


def run(
    model_types: Iterable[str] | None = None,
    *,
    workers: int = 1,
    seconds: float = 90.0,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Try model types in worker processes, so that a crash or a hang costs one type and not the run.

    Args:
        model_types: types to try; every causal type by default.
        workers: processes.
        seconds: limit for one type.
        progress: called with each outcome as it comes.

    Returns:
        Outcomes in the order of the types.
    """
    from rehead.benchmarks.tiny import causal_types

    types = list(causal_types() if model_types is None else model_types)
    queue = list(reversed(types))
    context = multiprocessing.get_context("spawn")
    slots = [_start(context) for _ in range(max(1, min(workers, len(types))))]
    done: dict[str, Outcome] = {}

    def finish(slot: _Slot, outcome: Outcome) -> None:
        done[outcome.model_type] = outcome
        slot.name = None
        if progress is not None:
            progress(outcome)

    try:
        while len(done) < len(types):
            for place, slot in enumerate(slots):
                if slot.name is None and queue:
                    slot.name = queue.pop()
                    # The first type of a process also waits for its imports.
                    slot.deadline = time.monotonic() + seconds + 30
                    slot.pipe.send(slot.name)
                elif slot.name is not None and time.monotonic() > slot.deadline:
                    slot.process.kill()
                    finish(slot, Outcome(slot.name, UNBUILT, f"took longer than {seconds:.0f} s"))
                    slots[place] = _start(context)
            for pipe in wait([slot.pipe for slot in slots if slot.name is not None], timeout=0.2):
                slot = next(s for s in slots if s.pipe is pipe)
                assert slot.name is not None
                try:
                    finish(slot, Outcome(**slot.pipe.recv()))
                except EOFError:
                    finish(slot, Outcome(slot.name, UNBUILT, "the process died (out of memory?)"))
                    slots[slots.index(slot)] = _start(context)
    finally:
        for slot in slots:
            slot.process.kill()
    return [done[name] for name in types]


def summary(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many types ended in each status."""
    counts = Counter(outcome.status for outcome in outcomes)
    return {status: counts.get(status, 0) for status in (PROVED, REFUSED, FAILED, WRONG, UNBUILT)}


def command(types: Sequence[str], workers: int, seconds: float, as_json: bool, quiet: bool) -> None:
    """Try the types (all of them where none is named) and print what came out; ``rehead patches --coverage``.

    Raises:
        UsageError: there is no such type.
        VerificationError: a type passed its proof and still computes something else.
    """
    from rehead.benchmarks.tiny import causal_types

    known = causal_types()
    check_names("causal model type", types, known)
    chosen = list(types) or known
    with progress_bar(quiet) as progress:
        done = 0

        def show(outcome: Outcome) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress.figures = outcome.model_type
                progress("coverage", done, len(chosen))

        outcomes = run(chosen, workers=workers, seconds=seconds, progress=show)
    counts = summary(outcomes)
    if as_json:
        print_json({"counts": counts, "types": [o.to_dict() for o in outcomes]})
    else:
        for outcome in outcomes:
            detail = f"difference {outcome.difference:.1e}, " if outcome.difference is not None else ""
            echo(f"{outcome.model_type:<26} {outcome.status:<10} {detail}{outcome.reason}")
        echo(", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts[WRONG]:
        wrong = [o.model_type for o in outcomes if o.status == WRONG]
        raise VerificationError(
            f"{', '.join(wrong)}: passed its proof and still computes something else; do not patch it"
        )
