"""Engines as clients: what is compared, and that no crash, hang or path of a machine gets into the record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rehead.benchmarks.engines import environments, reference, runner
from rehead.benchmarks.engines.building import build
from rehead.benchmarks.engines.cases import CASES
from rehead.benchmarks.engines.table import digest, table
from rehead.errors import UsageError
from rehead.models import serving
from rehead.models.serving import DIFFERENT, REFUSED, SAME

ROOT = Path(__file__).parents[2]
ANSWER = {
    "tokens": [3, 1, 2], "logprobs": [-1.0, -2.0, -3.0], "cache_bytes_per_token": 64.0, "model_type": "llama",
    "facts": {"attention": "GQA", "activation": "silu"},
}  # fmt: skip


def judge(**outcome) -> dict:
    return runner.judge("vllm", {"version": "1", "notes": [], **outcome}, ANSWER)


def test_equal_tokens_and_log_probabilities_are_the_same() -> None:
    row = judge(tokens=[3, 1, 2], logprobs=[-1.0, -2.0, -3.00001], cache_bytes_per_token=64.0)
    assert (row["outcome"], row["tokens"], row["of"], row["logprob_difference"]) == (SAME, 3, 3, 1e-5)


def test_another_token_is_different() -> None:
    row = judge(tokens=[3, 7, 2], logprobs=[-1.0, -9.0, -9.0])
    assert (row["outcome"], row["tokens"], row["logprob_difference"]) == (DIFFERENT, 1, 0.0)


def test_right_words_with_wrong_probabilities_are_different() -> None:
    assert judge(tokens=[3, 1, 2], logprobs=[-1.0, -2.0, -3.1])["outcome"] == DIFFERENT


def test_too_few_tokens_are_different() -> None:
    assert judge(tokens=[3, 1], logprobs=[-1.0, -2.0])["outcome"] == DIFFERENT


def test_a_refusal_keeps_its_reason() -> None:
    row = judge(error="ValueError: no such class")
    assert (row["outcome"], row["tokens"], row["notes"]) == (REFUSED, 0, ["ValueError: no such class"])


def test_rows_are_merged_by_case_and_engine() -> None:
    answers = {"llama": ANSWER, "qwen2": ANSWER}
    first = [{"case": "qwen2", **judge(error="x")}, {"case": "llama", **judge(error="x")}]
    results = runner.merge({"rows": []}, answers, first)
    again = {"case": "qwen2", **judge(tokens=[3, 1, 2], logprobs=[-1.0, -2.0, -3.0])}
    results = runner.merge(results, answers, [again])
    assert [(row["case"], [run["outcome"] for run in row["runs"]]) for row in results["rows"]] == [
        ("llama", [REFUSED]),
        ("qwen2", [SAME]),
    ]
    assert "| llama | qwen2 | GQA, silu | 64 | 3/3, 0e+00 |" in table(results)
    assert digest(results).endswith("| vLLM | 1 | 2 | 1 | 0 | 1 |")


def test_pages_show_the_record() -> None:
    for page, text in (("docs/engines.md", table), ("README.md", digest)):
        assert f"<!-- engines -->\n{text(serving.results())}\n<!-- /engines -->" in (ROOT / page).read_text()


def test_a_reason_is_text_on_a_page() -> None:
    row = {"case": "llama", **judge(error="no <b> | here")}
    assert "no \\<b\\> \\| here (llama)" in table(runner.merge({"rows": []}, {"llama": ANSWER}, [row]))


def test_one_job_that_crashes_hangs_or_raises_costs_that_job(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(environments.CLIENTS)!r})\n"
        "import protocol\n"
        "protocol.LIMIT_SECONDS = 2\n"
        "def handle(job):\n"
        "    print('a log line')\n"
        "    {'good': lambda: None, 'crashes': os.abort, 'hangs': lambda: time.sleep(60),\n"
        "     'raises': lambda: open('/no/such/place')}[job['case']]()\n"
        "    return {'tokens': [1], 'notes': []}\n"
        "protocol.serve('1.0', handle)\n"
    )
    jobs = [
        {"case": case, "work": str(tmp_path), "log": str(tmp_path / f"{case}.log")}
        for case in ("crashes", "hangs", "raises", "good")
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(client), str(tmp_path / "jobs.json"), str(tmp_path / "results.jsonl")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    outcomes = {line["case"]: line for line in lines}
    assert "signal 6" in outcomes["crashes"]["error"]
    assert outcomes["hangs"]["error"] == "no answer in 2 s"
    assert outcomes["raises"]["error"].startswith("FileNotFoundError")
    assert "/no/such" not in outcomes["raises"]["error"]
    assert outcomes["good"]["tokens"] == [1]
    assert outcomes["good"]["version"] == "1.0"
    assert (tmp_path / "good.log").read_text() == "a log line\n"


def test_every_client_is_there() -> None:
    clients = {path.name for path in environments.CLIENTS.glob("*_client.py")}
    assert clients == {engine.client for engine in environments.ENGINES.values()}
    with pytest.raises(UsageError, match="engine"):
        environments.engine("vlmm")
    assert {name for case in CASES.values() for name in case.client} <= set(environments.ENGINES)


def test_the_reference_reads_a_prompt_through_a_cache(tmp_path: Path) -> None:
    """Its tokens are those of a pass over everything at once, and its bytes those of two KV heads."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = build("llama", tmp_path)
    prompt = reference.prompt_of(folder)
    assert len(prompt) == reference.PROMPT_TOKENS
    answer = reference.continue_greedily(folder, prompt, 6)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        scores = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert scores.argmax(-1).tolist() == answer.tokens
    assert scores.max(-1).values.tolist() == pytest.approx(answer.logprobs, abs=1e-5)
    layers, tensors, heads, head_dim, size = 2, 2, 2, 32, 4
    assert answer.cache_bytes_per_token == layers * tensors * heads * head_dim * size


def test_an_engine_that_leaves_a_part_out_is_told_what(tmp_path: Path) -> None:
    """Each fault is told from the right answer and from the others, on the models that engines are given."""
    longrope = ["longer-longrope", "longer-longrope-short"]
    answers = runner.references(["granite_swa", "mistral-window", "llama", *longrope], tmp_path)
    assert {name: runner.tested(answer) for name, answer in answers.items()} == {
        "granite_swa": ["windows", "sinks", "windows and sinks"], "mistral-window": ["windows"], "llama": [],
        "longer-longrope": ["stretched RoPE"], "longer-longrope-short": ["frequencies of short texts"],
    }  # fmt: skip
    for answer in answers.values():
        outcome = {"version": "1", "notes": ["a note"], **{key: answer[key] for key in ("tokens", "logprobs")}}
        row = runner.judge("vllm", outcome, answer)
        assert (row["outcome"], row["notes"]) == (SAME, ["a note"])
        for part, without in answer["without"].items():
            row = runner.judge("vllm", outcome | without, answer)
            assert (row["outcome"], row["notes"]) == (DIFFERENT, ["a note", f"it leaves out the {part}"])


def test_what_the_comparison_shows_is_recorded_for_rows_that_are_there() -> None:
    without = {"windows": {"tokens": [3, 1, 2], "logprobs": [-1.0, -2.0, -9.0]}, "sinks": ANSWER}
    answers = {"llama": ANSWER | {"without": without}}
    results = runner.merge({"rows": [{"case": "llama", "runs": []}]}, answers, [])
    assert [row["tested"] for row in results["rows"]] == [["windows"]]
    assert runner.tested(ANSWER) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_llama_cpp_gives_the_same_tokens(tmp_path: Path) -> None:
    """A class that it serves, and one whose activation it replaces: the comparison has to tell them apart."""
    environments.set_up("llama.cpp", ROOT / ".engines")
    cases = ["llama", "embedded", "opt"]
    answers = runner.references(cases, tmp_path)
    rows = {row["case"]: row for row in runner.ask("llama.cpp", cases, answers, ROOT / ".engines", tmp_path)}
    assert {case: row["outcome"] for case, row in rows.items()} == {"llama": SAME, "embedded": SAME, "opt": DIFFERENT}
    assert rows["llama"]["cache_bytes_per_token"] == answers["llama"]["cache_bytes_per_token"]
    assert rows["llama"]["logprob_difference"] < 1e-4
