"""A spectrum from a model's name to a finished run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from laid_eval.errors import UserError
from laid_eval.models.load import Described, describe, takes_pictures
from laid_eval.models.source import resolve
from laid_eval.runs import run_folder
from laid_eval.spectra import (
    LoadedSpectrum,
    SpectrumSettings,
)
from laid_eval.spectrum.knockout_window import SHORTEST as SHORTEST_WINDOW
from laid_eval.spectrum.measure import LENGTH, SHORTEST, measure
from laid_eval.spectrum.picture_session import show_pictures
from laid_eval.spectrum.pictures import IMAGES
from laid_eval.spectrum.running import Progress, Report, refuse_hidden
from laid_eval.spectrum.teacher import compare_models
from laid_eval.window.haystack import Corpus, load_corpus


@dataclass(frozen=True)
class _Options:
    dtype: str
    device: str
    rope_scaling: str | None
    trust_remote_code: bool
    allow_pickle: bool


def measure_spectrum(
    model: str,
    *,
    teacher: str | None = None,
    length: int | None = None,
    images: int | None = None,
    texts: int = 4,
    queries: int = 128,
    knockout: Literal["no", "loss", "window"] = "no",
    what_if: Sequence[str] = (),
    haystack: Sequence[str | Path] = (),
    confidence: float = 0.95,
    out: str | Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    rope_scaling: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Report = lambda _: None,
) -> LoadedSpectrum:
    """Analyse a model's attention and rotary pairs in the frequency domain.

    Args:
        model: Reference model, local folder, GGUF file or Hub id.
        teacher: A second model to compare with; its run lies in the folder `teacher` of the run.
        length: Tokens of each text. Default: the claimed length, at most 8,192.
        images: Pictures of each haystack that a vision-language model is shown, with a question at the end. Default:
            20; with a `length` or a `haystack` it reads text instead, as a language model.
        texts: Texts, or haystacks of pictures. Intervals are over them; one has none.
        queries: Rows of attention sampled from each text's second half.
        knockout: Also the loss (`loss`), and the effective window besides (`window`), with each band unrotated.
        what_if: Scalings whose effect is predicted and tried: `yarn:2`, `linear:2`, `dynamic:2`, `base:4`.
        haystack: Files with text. Default: Python's language reference.
        confidence: Of the intervals.
        out: Run folder; a run already there with the same settings goes on. Default: a new one in `runs/`.
        seed: Of texts and samples.
        revision: Of a Hub id.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        rope_scaling: Measure the model (not the teacher) as if scaled: `yarn:2`, `linear:2`, `dynamic:2`.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Load pickled weights too.
        progress: Called while measuring.

    Returns:
        The run, read back from its folder.

    Raises:
        UserError: Anything the user can mend.
        KeyboardInterrupt: As it came; finished texts are kept.
    """
    options = _Options(dtype, device, rope_scaling, trust_remote_code, allow_pickle)
    described = _described(model, revision, options)
    # the teacher as it is: a scaled student beside an unscaled teacher is the question
    other = _described(teacher, None, replace(options, rope_scaling=None)) if teacher else None
    asked = SpectrumSettings(
        length=0,
        texts=texts,
        queries=queries,
        haystack=None,
        haystack_hash=None,
        confidence=confidence,
        seed=seed,
        knockout=knockout,
        what_if=tuple(what_if),
    )
    _check(asked)
    folder = run_folder(out, described.info.name, "spectrum")
    if images is not None or (length is None and not haystack and takes_pictures(described)):
        if length is not None or haystack:
            raise UserError(
                "--images shows haystacks of drawn pictures; they can't be combined with --length or --haystack, which "
                "are of text. Leave one out."
            )
        return show_pictures(described, other, IMAGES if images is None else images, asked, folder, progress)
    corpus = load_corpus([Path(file) for file in haystack])
    settings = _of_text(asked, described, other, length, corpus)
    refuse_hidden(described, other)
    own = measure(described, settings, corpus, folder, progress)
    if other is None:
        return own
    plain = settings.model_copy(update={"knockout": "no", "what_if": ()})
    try:
        theirs = measure(other, plain, corpus, folder / "teacher", progress)
    except UserError as error:
        raise UserError(f"The teacher can't be measured: {error}") from None
    if own.header.teacher == theirs.header.model:
        return own
    progress(Progress(own.path, "keys of student and teacher", 0, 1))
    return compare_models(own, theirs, described, other, corpus, seed)


def _described(name: str, revision: str | None, o: _Options) -> Described:
    source = resolve(name, revision, o.allow_pickle, o.trust_remote_code)
    return describe(source, o.dtype, o.device, o.rope_scaling, o.trust_remote_code, o.allow_pickle)


def _check(settings: SpectrumSettings) -> None:
    if not 1 <= settings.texts <= 1000:
        raise UserError(f"--texts must lie between 1 and 1000, got {settings.texts}.")
    if settings.queries < 8:
        raise UserError(f"--queries must be at least 8, got {settings.queries}.")
    if not 0 < settings.confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, got {settings.confidence}.")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed must lie between 0 and {2**32 - 1}, got {settings.seed}.")


def _of_text(
    settings: SpectrumSettings, described: Described, other: Described | None, length: int | None, corpus: Corpus
) -> SpectrumSettings:
    claimed = [d.claimed_length for d in (described, other) if d and d.claimed_length]
    n = length if length is not None else min([LENGTH, *claimed])
    if n < SHORTEST:
        raise UserError(f"--length must be at least {SHORTEST} tokens, got {n}.")
    if settings.knockout == "window" and n < SHORTEST_WINDOW:
        raise UserError(f"--knockout window needs --length {SHORTEST_WINDOW} or more, got {n}.")
    return settings.model_copy(update={"length": n, "haystack": corpus.name, "haystack_hash": corpus.hash})
