"""Runs with a planted window and planted scores, on disk."""

import itertools
import json

import numpy as np
import pytest

from laid_eval.records import Cost, Metric, ModelInfo, Run, Sample, Settings, Trial
from laid_eval.runs import append_lines, append_trials, save_header, trial_table, write_atomically
from laid_eval.window.curve import score_at
from laid_eval.window.estimate import fit_trials, windows_of

LENGTHS = [round(2**x) for x in np.arange(8, 14.01, 0.5)]


def plant(folder, location, seed):
    """A window run: 14 haystacks, 4 questions at each of 13 lengths, right after a curve around `location`."""
    settings = Settings(
        probes=("needle",),
        probe_hashes={"needle": "abc"},
        haystack="planted",
        haystack_hash="def",
        min_length=None,
        max_length=LENGTHS[-1],
        criterion="relative:0.85",
        confidence=0.95,
        precision=0.5,
        budget=10**6,
        chunk=512,
        seed=0,
    )
    rng = np.random.default_rng(seed)
    trials = []
    for h, length, k in itertools.product(range(14), LENGTHS, range(4)):
        score = float(rng.random() < score_at(np.log2(length), location, 0.3, 0.97, 0.125))
        trials.append(
            Trial(
                id=f"needle/{h}/{length}/kind{k}",
                probe="needle",
                haystack=h,
                length=length,
                prompt_tokens=length,
                depth=None,
                score=score,
                chance=0.125,
                answer="a",
            )
        )
    model = ModelInfo(name="planted", source="scripted")
    cost = Cost(prefill_tokens=50_000)
    run = Run(created="", status="complete", model=model, settings=settings, environment={}, cost=cost)
    windows = windows_of(fit_trials(trial_table(trials)), ["relative", "half"], probe="needle")
    folder.mkdir()
    append_trials(folder, trials)
    save_header(folder, run.model_copy(update={"windows": tuple(windows)}))


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """`base` (window about 4,000 tokens), `same` (other answers, same window), `worse` (an octave less), `open`."""
    root = tmp_path_factory.mktemp("planted")
    for seed, (name, location) in enumerate({"base": 12.4, "same": 12.4, "worse": 11.4, "open": 20.0}.items()):
        plant(root / name, location, seed)
    return root


@pytest.fixture
def edited(planted, tmp_path):
    """Copies a planted run with fields of its header changed: `edited("base", settings={"seed": 1})`."""

    def copy(name, to="run", **changes):
        folder = tmp_path / to
        folder.mkdir()
        document = json.loads((planted / name / "run.json").read_text())
        for key, value in changes.items():
            document[key] = {**document[key], **value} if isinstance(value, dict) else value
        (folder / "run.json").write_text(json.dumps(document))
        (folder / "trials.jsonl").write_text((planted / name / "trials.jsonl").read_text())
        return folder

    return copy


@pytest.fixture
def bench(tmp_path):
    """Writes a benchmark run: `bench("run", {"arc": [1, 0, ...]})`; clusters and prompts by document."""

    def write(name, scores, clusters=None, prompts=None, stderr=None, settings=None, samples=True, metric="acc"):
        folder = tmp_path / name
        metrics = []
        for task, values in scores.items():
            known = [v for v in values if v is not None]
            mean = sum(known) / len(known)
            metrics.append(Metric(task=task, metric=metric, value=mean, stderr=stderr, samples=len(known)).model_dump())
        document = {"schema_version": 1, "command": "bench", "status": "complete", "metrics": metrics}
        write_atomically(folder / "run.json", json.dumps({**document, "settings": settings or {"num_fewshot": 0}}))
        if samples:
            lines = [
                Sample(
                    task=task,
                    doc_id=str(i),
                    score=value,
                    cluster=clusters[i] if clusters else None,
                    prompt_hash=prompts[i] if prompts else None,
                ).model_dump_json()
                for task, values in scores.items()
                for i, value in enumerate(values)
            ]
            append_lines(folder / "samples.jsonl", lines)
        return folder

    return write
