"""Note's test 23, on a real layer: octave matching gives far attention back faster than plain KL at equal steps."""

import runpy
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent.parent / "benchmarks" / "studies" / "far_attention.py"


@pytest.mark.slow
def test_far_attention_comes_back_faster_and_near_attention_no_worse(smollm2, frame):
    from laid_eval.distillation.prose import training_corpus
    from laid_eval.spectrum.texts import prose

    study = runpy.run_path(str(STUDY))
    texts, _ = prose(training_corpus(), frame, 384, 2, 0)
    train, held_out = (study["layer_heads"](smollm2.model, text, 7) for text in texts)
    found = {
        name: study["recover"](train, held_out, **study["LOSSES"][name], seed=0)
        for name in ("plain KL", "octaves, ramp to 1")
    }
    plain, ours = found["plain KL"], found["octaves, ramp to 1"]
    assert ours.far < 0.95 * plain.far
    assert ours.near < 1.05 * plain.near
