"""The main job from a model's name to a finished run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from laid_eval.environment import environment
from laid_eval.errors import UserError
from laid_eval.models.reference import REFERENCES
from laid_eval.records import ModelInfo, Run, Settings
from laid_eval.resources import content_hash
from laid_eval.runs import LoadedRun, load_run, run_folder
from laid_eval.window.curve import parse_criterion
from laid_eval.window.haystack import load_corpus
from laid_eval.window.measure import AnyProbe, measure, resumable
from laid_eval.window.probes import ScenesProbe, load_probes
from laid_eval.window.readers import PictureReader, Reader
from laid_eval.window.reading import Progress
from laid_eval.window.scenes import Scene, draw, scenes_source
from laid_eval.window.visual_haystacks import DatasetProbe
from laid_eval.window.why_measure import WhyOptions, answered, check_options, explain_run
from laid_eval.window.why_texts import WhyReader

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 512
"""Tokens per forward pass while reading: more is hardly faster and takes more memory."""
REACH = 1.5
"""Default longest context, in claimed lengths: far enough to see the window end."""
BUDGET = 6
"""Default budget, in longest contexts a probe."""
PRECISION = 0.5
"""Default width of the interval that is enough, octaves."""
PICTURES = 150
"""Default longest context, images: that of the paper."""
BUDGET_PICTURES = 40
"""The same for images: contexts are shorter, and the questions take as much as the pictures."""
WHOLE = 8
"""So many times as much by default where each question needs a whole prompt."""


@dataclass(frozen=True)
class Quote:
    """What a measurement will take, told before the weights are loaded."""

    max_length: int
    tokens: int
    """Tokens through the model, the budget; it may be passed by the questions on the last text."""
    questions: int
    """Roughly."""
    minutes: float
    memory_bytes: int


def measure_window(
    model: str | Reader | PictureReader,
    probe: str | Sequence[str] | DatasetProbe = "needle",
    *,
    out: str | Path | None = None,
    max_length: int | None = None,
    min_length: int | None = None,
    haystack: Sequence[str | Path] = (),
    criterion: str = "relative",
    anchor: str | Path | None = None,
    confidence: float = 0.95,
    precision: float = PRECISION,
    budget: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    rope_scaling: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    why: bool = False,
    why_length: int | None = None,
    why_haystacks: int = 6,
    why_questions: int = 12,
    announce: Callable[[Quote], None] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> LoadedRun:
    """Measure how long a context a model can really use.

    Args:
        model: Reference model, local folder, GGUF file, Hub id, or a `Reader` (e.g. `ScriptedReader`).
        probe: Names of probes or paths of TOML files; `all` for every bundled one. Or a data set, from
            `visual_haystacks`: all its cases are asked, whatever the answers.
        out: Run folder; a run already there with the same settings is resumed. Default: a new one in `runs/`.
        max_length: Longest context, tokens (images for visual probes). Default: 1.5 x the claimed length; 150 images.
            Of a data set, cases of more images are left out.
        min_length: Shortest context, tokens or images. Default: the probe's.
        haystack: Files with filler text. Default: Python's language reference.
        criterion: See `estimate_window`; decides when the measurement is precise enough.
        anchor: Run folder of the model whose base score `anchored` refers to.
        confidence: Mass of the interval.
        precision: Stop when the interval is this narrow, octaves.
        budget: Stop when this many tokens went through the model, over all probes. Default: 6 x `max_length` x
            the number of probes; 8 times that for models that can only be asked with whole prompts.
        seed: Of texts, facts and questions. Equal seeds give two models equal questions.
        revision: Of a Hub id.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        rope_scaling: `yarn:2`, `linear:2`, `dynamic:2`: what the window would be if.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Load pickled weights too.
        why: Also find out why the window ends; see `laid_eval.window.why`. A finished run in `out` is reused.
        why_length: Length at which the window has failed, tokens. Default: the run's own window under `half`, or the
            longest length tested where that is longer.
        why_haystacks: Texts of each kind to read for it.
        why_questions: Most questions on each of them.
        announce: Called with the quote before the weights are loaded; `None` skips the speed test.
        progress: Called while measuring.

    Returns:
        The run, read back from its folder.

    Raises:
        UserError: Anything the user can mend.
        KeyboardInterrupt: As it came; the folder keeps what was measured.
    """
    named = [] if isinstance(probe, DatasetProbe) else load_probes([probe] if isinstance(probe, str) else list(probe))
    dataset = _dataset(probe, max_length, min_length, precision, budget) if isinstance(probe, DatasetProbe) else None
    probes: list[AnyProbe] = [dataset] if dataset else [*named]
    options = WhyOptions(why_length, why_haystacks, why_questions) if why else None
    if options and named:
        check_options(options, named, min_length)
    pictures = [probe for probe in probes if isinstance(probe, ScenesProbe | DatasetProbe)]
    if pictures:
        _check_pictures(pictures, haystack, options)
    corpus = None if pictures else load_corpus([Path(file) for file in haystack])
    tokens_of: Callable[[int, int], int]
    if not isinstance(model, str):
        if options:
            raise UserError("--why needs a model; a scripted reader has no positions. Leave it out.")
        info, reader = model.info, model
        if pictures:
            if not hasattr(model, "show"):
                raise UserError(f"Probe {pictures[0].name!r} shows pictures; this reader reads text alone.")
            seeing = cast(PictureReader, model)
            tokens_of = lambda width, height: seeing.extent(width, height).tokens  # noqa: E731
        make: Callable[[int], tuple[Reader | PictureReader, float]] = lambda _: (reader, 0.0)  # noqa: E731
    else:
        # Loads torch; a scripted reader does not need it.
        from laid_eval.window.model_session import prepare

        prepared = prepare(model, revision, dtype, device, rope_scaling, trust_remote_code, allow_pickle)
        info, make = prepared.info, prepared.load
        if pictures:
            tokens_of = prepared.picture_tokens
            make = lambda longest: prepared.load_pictures(_sample(pictures[0]), longest * each)  # noqa: E731
    each = 1  # tokens that a unit of length takes
    if dataset:
        each, budget = dataset.cost(tokens_of)
        longest = dataset.longest
        if max_length is None:
            _check_reach(dataset, info, each)
        source = f"{dataset.source} ({len(dataset.cases)} cases)", dataset.hash
    else:
        if isinstance(named[0], ScenesProbe):
            each = tokens_of(named[0].size, named[0].size)
        longest = max_length if max_length is not None else _furthest(info, each if pictures else None)
        source = (corpus.name, corpus.hash) if corpus else scenes_source()
    settings = _settings(
        probes, source, longest, min_length, criterion, anchor, confidence, precision, budget, seed, each
    )
    folder = run_folder(out, info.name, "window")
    run = resumable(folder, settings, info)
    finished = run is not None and _finished(run, settings)
    if run and finished and (options is None or answered(run, named, options)):
        return load_run(folder)
    reach = max(longest, why_length or 0) if options else longest
    if isinstance(model, str):
        prepared.check_memory(reach * each, CHUNK, each)
    made = _make_folder(folder)
    try:
        if isinstance(model, str) and announce and not finished:
            quote = prepared.quote(settings, each)
            announce(replace(quote, questions=sum(1 for _ in dataset.views(seed))) if dataset else quote)
        loaded, seconds = make(reach)
        moving = _moving(loaded, reach) if options else None  # refuses before anything is measured
        if not finished:
            if budget is None and (loaded.info.fan_out or "").startswith("whole prompts"):
                settings = settings.model_copy(update={"budget": WHOLE * settings.budget})
            run = _start(run, loaded.info, settings, seconds, dataset.notes if dataset else ())
            measure(loaded, probes, corpus, run, folder, progress)
        if options and moving and corpus:
            explain_run(moving, named, corpus, folder, options, progress)
    finally:
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()  # nothing was measured
    return load_run(folder)


def _dataset(
    probe: DatasetProbe, max_length: int | None, min_length: int | None, precision: float, budget: int | None
) -> DatasetProbe:
    """The cases to be asked."""
    given = {"min-length": min_length is not None, "budget": budget is not None, "precision": precision != PRECISION}
    for name, there in given.items():
        if there:
            raise UserError(f"--{name} has no meaning for a data set, whose cases are all asked; see --questions.")
    return probe if max_length is None else probe.up_to(max_length)


def _check_reach(dataset: DatasetProbe, info: ModelInfo, each: int) -> None:
    """Refuse more images than a model can be expected to hold."""
    fits = round(REACH * info.claimed_length) // each if info.claimed_length else dataset.longest
    if dataset.longest > fits:
        raise UserError(
            f"{dataset.longest} images of {dataset.source} take {dataset.longest * each:,} tokens; {info.name!r} "
            f"claims {info.claimed_length:,}. Leave longer cases out: --max-length {fits}."
        )


def _sample(probe: ScenesProbe | DatasetProbe) -> list[Image]:
    """A few pictures to try a model on."""
    if isinstance(probe, ScenesProbe):
        return [draw(Scene(probe.objects[k : k + probe.per_image], k), probe.size) for k in range(3)]
    names = [name for case in probe.cases[:3] for name in (*case.positive, *case.negative)]
    return [probe.folder.read(names[k % len(names)]) for k in range(3)]


def _check_pictures(
    probes: Sequence[ScenesProbe | DatasetProbe], haystack: Sequence[str | Path], options: WhyOptions | None
) -> None:
    if haystack:
        raise UserError(f"--haystack is filler text; probe {probes[0].name!r} is about pictures. Leave it out.")
    if options:
        raise UserError("--why explains windows in text; those in images can't be split yet. Leave it out.")
    drawn = [probe for probe in probes if isinstance(probe, ScenesProbe)]
    for name in dict.fromkeys(name for probe in drawn for name in probe.objects):
        draw(Scene((name,), 0), 32)  # refuses what has no picture, before anything is loaded
    if len({probe.size for probe in drawn}) > 1:
        raise UserError("Probes with pictures of different sizes take different context. Measure them in two runs.")


def _moving(reader: Reader | PictureReader, longest: int) -> WhyReader:
    """The same model as a reader whose texts can be moved."""
    # Loads torch.
    from laid_eval.window.model_reader import ModelReader
    from laid_eval.window.why_reader import MovingReader

    assert isinstance(reader, ModelReader), "scripted readers were refused before"
    return MovingReader(reader, longest)


def _start(run: Run | None, info: ModelInfo, settings: Settings, load_seconds: float, notes: tuple[str, ...]) -> Run:
    """The header to go on from: a new one, or that of an earlier session."""
    run = run or Run(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="partial",
        model=info,
        settings=settings,
        environment=environment(),
    )
    cost = run.cost.model_copy(update={"load_seconds": round(load_seconds, 2)})
    return run.model_copy(update={"settings": settings, "cost": cost, "notes": (*_notes(info), *notes)})


def _make_folder(folder: Path) -> list[Path]:
    """Make the run folder before anything expensive is done; what was made, innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out '{folder}' can't be written: {error.strerror}. Choose another folder.") from None
    return made


def _furthest(info: ModelInfo, picture: int | None) -> int:
    """How far is asked by default; where a picture takes so many tokens, in images: no further than the paper."""
    if picture is not None:
        return min(PICTURES, round(REACH * info.claimed_length) // picture) if info.claimed_length else PICTURES
    if not info.claimed_length:
        raise UserError(f"Model {info.name!r} states no maximum length; say how far to look: --max-length 8192.")
    return round(REACH * info.claimed_length)


def _settings(
    probes: Sequence[AnyProbe],
    source: tuple[str, str],
    longest: int,
    min_length: int | None,
    criterion: str,
    anchor: str | Path | None,
    confidence: float,
    precision: float,
    budget: int | None,
    seed: int,
    each: int,
) -> Settings:
    for probe in probes:
        if isinstance(probe, DatasetProbe):
            continue  # its lengths are given
        shortest = probe.min_length if min_length is None else min_length
        if shortest < 1:
            raise UserError(f"--min-length must be above 0 {probe.unit}, got {shortest}.")
        if isinstance(probe, ScenesProbe) and shortest < probe.needles:
            raise UserError(f"--min-length must be at least {probe.needles} for probe {probe.name!r}, got {shortest}.")
        if longest < 2 * shortest:
            raise UserError(
                f"--max-length {longest} is too short: probe {probe.name!r} starts at {shortest} {probe.unit} and "
                f"needs at least one octave, {2 * shortest}."
            )
    if not 0 < confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, got {confidence}.")
    if not 0 < precision < 100:
        raise UserError(f"--precision must lie between 0 and 100 octaves, got {precision}.")
    often = BUDGET_PICTURES if isinstance(probes[0], ScenesProbe) else BUDGET
    tokens = budget if budget is not None else often * longest * each * len(probes)
    if tokens < longest * each:
        raise UserError(
            f"--budget {tokens} does not reach the longest context once ({longest * each} tokens). Give more, or a "
            "smaller --max-length."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie between 0 and {2**32 - 1}, got {seed}.")
    base = _anchor_share(anchor, probes) if anchor else None
    rule = parse_criterion(criterion, base)
    return Settings(
        probes=tuple(probe.name for probe in probes),
        probe_hashes={probe.name: content_hash(probe) for probe in probes},
        haystack=source[0],
        haystack_hash=source[1],
        min_length=min_length,
        max_length=longest,
        criterion=f"{rule.name}:{rule.value:g}",
        anchor=base,
        confidence=confidence,
        precision=precision,
        budget=tokens,
        chunk=CHUNK,
        seed=seed,
    )


def _anchor_share(anchor: str | Path, probes: Sequence[AnyProbe]) -> float:
    """Chance-corrected base score of another run; one probe at a time, since each has its own."""
    run = load_run(anchor)
    if len(probes) != 1:
        raise UserError("--anchor needs exactly one --probe: every probe has a base score of its own.")
    try:
        window = run.window(probes[0].name)
    except UserError:
        raise UserError(f"The anchor run '{anchor}' holds no estimate for probe {probes[0].name!r}.") from None
    share = ((window.base_score or 0.0) - window.chance) / (1 - window.chance)
    if share <= 0:
        raise UserError(f"The anchor run '{anchor}' is at chance; nothing can be anchored to it.")
    return round(share, 6)


def _finished(run: Run, settings: Settings) -> bool:
    """Complete, and asked for nothing more than it was complete for."""
    old = run.settings
    return run.status == "complete" and settings.budget <= old.budget and settings.precision >= old.precision


def _notes(info: ModelInfo) -> tuple[str, ...]:
    notes = []
    if info.fan_out and info.fan_out != "forked":
        notes.append(f"asked with {info.fan_out}")
    if any(r.name == info.name and not info.source.startswith("Hub") for r in REFERENCES):
        notes.append(f"weights: {info.source}, converted to {info.dtype}")
    return tuple(notes)
