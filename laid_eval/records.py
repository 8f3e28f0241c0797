"""What is stored. Every record is frozen, strict, and explained field by field.

Unknown is `None`, never 0, -1 or NaN. A window outside the tested range is censored: a word, not a number.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from laid_eval.errors import UserError

SCHEMA_VERSION = 1

Unit = Literal["tokens", "images"]
Censored = Literal["no", "above", "below"]
Status = Literal["partial", "complete", "failed"]
Outcome = Literal["pass", "fail", "inconclusive"]


class Record(BaseModel):
    """Base of everything that is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trial(Record):
    """One question put to a model at one context length."""

    id: str
    """`probe/haystack/length/item`: the same seed gives two models the same questions, for pairing."""
    probe: str
    haystack: int
    """Questions on one haystack share its text and are one cluster."""
    length: int
    """Context length asked for, in tokens or images."""
    prompt_tokens: int
    """Tokens the model really read, question and chat frame included."""
    depth: float | None
    """Where in the haystack the (earliest) needle lies, 0 = start, 1 = end; `None` where it is everywhere."""
    score: float | None
    """1 right, 0 wrong, shared where choices tie; `None` exactly when `error` is set."""
    chance: float
    """Expected score of a model that ignores the context."""
    margin: float | None = None
    """Log-probability of the right choice minus that of the best wrong one, nats."""
    answer: str
    chosen: str | None = None
    """The choice the model prefers; where it answers freely, its words."""
    complied: bool | None = None
    """Whether a free answer says yes or no at all; `None` where a choice was forced."""
    error: str | None = None


class WindowEstimate(Record):
    """An effective context window: where the score curve crosses a criterion."""

    probe: str
    criterion: str
    """Name and value, e.g. `relative 0.85`."""
    definition: str
    """The criterion in words."""
    length: float | None
    """The window; `None` when censored."""
    low: float | None
    """Lower end of the interval, at most `tested_max`; `None` where it lies below the tested range."""
    high: float | None
    """Upper end of the interval, at least `tested_min`; `None` where it lies above the tested range."""
    unit: Unit = "tokens"
    confidence: float = 0.95
    censored: Censored = "no"
    """`above`: longer than anything tested. `below`: shorter, or the model can't do the task at all."""
    tested_min: float
    tested_max: float
    base_score: float | None
    """Raw score at the shortest tested length, read off the curve."""
    base_low: float | None = None
    base_high: float | None = None
    chance: float
    trials: int
    failed_trials: int
    haystacks: int
    design_effect: float | None = None
    """Variance of the location against that of as many independent questions; trials / this = effective trials."""
    method: str
    """`posterior` (psychometric curve) or `isotonic` (the fallback), with the reason for a fallback."""

    def __str__(self) -> str:
        """`6,120 tokens [5,480, 6,790]`, or the censoring in words."""
        return f"{self.value_text()} {self.unit} {self.interval_text()}".strip()

    def value_text(self) -> str:
        """The window alone: `6,120`, `>12,288` or `<256`."""
        if self.censored == "above":
            return f">{self.tested_max:,.0f}"
        if self.censored == "below":
            return f"<{self.tested_min:,.0f}"
        return f"{self.length:,.0f}"

    def interval_text(self) -> str:
        """The interval alone: `[5,480, 6,790]`, open ends as `<256` and `>12,288`."""
        low = f"<{self.tested_min:,.0f}" if self.low is None else f"{self.low:,.0f}"
        high = f">{self.tested_max:,.0f}" if self.high is None else f"{self.high:,.0f}"
        return f"[{low}, {high}]"

    @property
    def octaves(self) -> float | None:
        """Width of the interval in octaves (doublings); `None` where an end is open."""
        return math.log2(self.high / self.low) if self.low and self.high else None


class CurvePoint(Record):
    """The fitted score at one length, for drawing."""

    length: float
    score: float
    low: float
    high: float


class Curve(Record):
    """The fitted curve of one probe."""

    probe: str
    chance: float
    points: tuple[CurvePoint, ...]


Condition = Literal["short", "far", "crowded", "full", "alone", "near"]


class WhyTrial(Trial):
    """One question of the study why a window ends, asked in one of six ways; `laid_eval.window.why` tells them."""

    condition: Condition
    question: str
    """Which fact is asked for; the same in all six ways."""
    distance: float
    """From the start of the (earliest) needle to the question, in positions."""


class WhyValue(Record):
    """One figure of that study with its interval, as a score and as a margin."""

    name: str
    words: str
    """What it is, for people."""
    value: float
    """Of a condition the mean score; of a part the share of the score above chance."""
    low: float
    high: float
    margin: float | None = None
    """The same in the margin of the right choice over the best wrong one, nats; `None` where it has no meaning."""
    margin_low: float | None = None
    margin_high: float | None = None


class Why(Record):
    """Why a window ends: the score lost from a short text to a long one, split by cause."""

    probe: str
    length: int
    """Of the long text, tokens."""
    short_length: int
    haystacks: int
    questions: int
    """Most questions asked on one haystack."""
    asked: int
    """Questions answered in all six ways."""
    failed: int
    """Questions left out because an answer failed in one of them."""
    chance: float
    confidence: float
    conditions: tuple[WhyValue, ...]
    parts: tuple[WhyValue, ...]
    tokens: int
    """Tokens of texts read."""
    seconds: float | None = None
    """Wall time reading and asking; `None` where a part of it was done in an earlier session."""

    def part(self, name: str) -> WhyValue:
        """A part by its name, e.g. `position`."""
        return next(p for p in self.parts if p.name == name)


class ModelInfo(Record):
    """Which model was measured."""

    name: str
    """As the user named it; of a folder or file only its own name."""
    source: str
    """What it resolved to: `Hub id@revision`, `local folder`, `GGUF file` or `scripted`."""
    fingerprint: str | None = None
    """Hash over the configuration and a block of every tensor, to see that two runs mean one model."""
    architecture: str | None = None
    parameters: int | None = None
    claimed_length: int | None = None
    """`max_position_embeddings` of the configuration (times a linear or yarn factor that was asked for)."""
    dtype: str | None = None
    device: str | None = None
    rope_scaling: str | None = None
    chat_template: bool | None = None
    fan_out: str | None = None
    """`forked` (one prefill, many questions), `shared prefixes` (a server's cache), or `whole prompts: <why>`."""
    server: str | None = None
    """What answered over HTTP and how it was asked: `vllm 0.32.0, tokens`; `None` in this process."""


class ImageExtent(Record):
    """What a picture takes in the context of a model."""

    width: int | None
    """Pixels; `None` where pictures differ in size, and tokens and positions are means."""
    height: int | None
    tokens: int
    positions: int
    """RoPE positions by which it moves what follows; fewer than tokens where it counts by its longer side."""


class Settings(Record):
    """Everything that decides which questions are asked. Two runs with equal settings are comparable."""

    probes: tuple[str, ...]
    probe_hashes: dict[str, str]
    """Hash of each probe's parsed, default-filled content."""
    haystack: str
    """Where the filler text comes from."""
    haystack_hash: str
    min_length: int | None
    max_length: int
    criterion: str
    anchor: float | None = None
    confidence: float
    precision: float
    """Stop when the interval of the criterion is this narrow, octaves."""
    budget: int
    """Stop when this many tokens have gone through the model."""
    max_trials: int | None = None
    chunk: int
    """Tokens per forward pass of the prefill."""
    seed: int


class Cost(Record):
    """What a measurement took."""

    prefill_tokens: int = 0
    """Tokens of haystacks read into the cache that questions fork from."""
    question_tokens: int = 0
    """Tokens of all passes that ask: questions with their choices, or whole prompts where nothing can be forked."""
    whole_prompt_tokens: int = 0
    """Tokens that the same questions need when each is put as a whole prompt of its own."""
    seconds: float = 0.0
    """Wall time reading and asking, over all sessions of a resumed run; loading not included."""
    load_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    """Peak of the process (CPU) or of the device's allocator (GPU)."""


class Share(Record):
    """A share of answers with its interval (Jeffreys, one observation a haystack)."""

    value: float
    low: float
    high: float


class LengthScore(Record):
    """The answers at one length, as a data set's own tables tell them."""

    probe: str
    length: int
    questions: int
    haystacks: int
    score: Share
    """Raw, chance not taken off."""
    complied: Share | None = None
    """Free answers that say yes or no at all; `None` where choices were forced."""


class Run(Record):
    """The header of a run folder, `run.json`."""

    schema_version: int = SCHEMA_VERSION
    command: Literal["window"] = "window"
    created: str
    """UTC, ISO 8601."""
    status: Status
    stopped: dict[str, str] | None = None
    """Why the measurement of each probe ended."""
    model: ModelInfo
    settings: Settings
    environment: dict[str, str | None]
    """Versions, platform, device, git commit of the tool."""
    windows: tuple[WindowEstimate, ...] = ()
    curves: tuple[Curve, ...] = ()
    image: ImageExtent | None = None
    """What a picture takes, where lengths are counted in images."""
    scores: tuple[LengthScore, ...] | None = None
    """By length, of a data set; `None` for probes, whose lengths are chosen on the way."""
    why: tuple[Why, ...] | None = None
    """Why the window of each probe ends; `None` where it was not asked."""
    cost: Cost = Cost()
    notes: tuple[str, ...] = ()
    """What a reader should know: fallbacks, repeated text, failed trials."""

    @property
    def unit(self) -> Unit:
        """What its lengths are counted in."""
        return "images" if self.image else "tokens"

    def window(self, probe: str, criterion: str | None = None) -> WindowEstimate:
        """The estimate of a probe under a criterion (default: the one the run was measured for).

        Raises:
            UserError: The run holds no such estimate.
        """
        wanted = (criterion or self.settings.criterion).replace(":", " ")
        found = [w for w in self.windows if w.probe == probe]
        for w in [*(w for w in found if w.criterion == wanted), *found]:
            if wanted in (w.criterion, w.criterion.split()[0]):
                return w
        held = ", ".join(f"{w.probe} ({w.criterion})" for w in self.windows) or "none"
        raise UserError(f"The run holds no window of probe {probe!r} under criterion {wanted!r}; it holds: {held}.")


class Metric(Record):
    """The score of a model in one task of a benchmark."""

    task: str
    metric: str
    """As lm-eval names it, e.g. `acc`."""
    value: float
    """0..1, higher is better."""
    stderr: float | None = None
    """`None`: not known."""
    samples: int | None = None


class Sample(Record):
    """The score of one document of a task; the same documents of two runs are pairs."""

    task: str
    doc_id: str
    score: float | None
    """0..1; `None` where the request failed."""
    cluster: str | None = None
    """Documents on one haystack or picture are one cluster; `None`: on its own."""
    prompt_hash: str | None = None


class Verdict(Record):
    """What became of one rule of the gate."""

    rule: str
    outcome: Outcome
    sentence: str
    """The verdict in words: what was compared, with its interval, and what would settle it."""
    run: str
    """The figure of the run, with its unit and interval."""
    baseline: str | None = None
    """The same of the baseline; `None` where the rule needs none."""
    change: float | None = None
    """What is held against the limit: the drop (positive is worse), or the figure itself; `None`: censored, unknown."""
    low: float | None = None
    """Lower end of its interval; `None`: open."""
    high: float | None = None
    unit: str
    limit: float
    confidence: float
    """Of the interval: 1 - 2 alpha, so that each end is right with 1 - alpha."""
    p_fail: float
    """Of the test that the rule is broken, corrected for the number of rules (Holm)."""
    p_pass: float
    """Of the test that the rule holds; uncorrected, since the gate passes only if every rule does."""
    clusters: int | None = None
    """Haystacks (documents, texts) behind it."""
    pairs: int | None = None
    """Questions that both runs were asked; `None` where nothing is paired."""
    more_clusters: int | None = None
    """Inconclusive: further haystacks (documents) that settle it with 80% probability if the change is as seen."""
    more_questions: int | None = None
    method: str


class Gate(Record):
    """A run held against rules."""

    outcome: Outcome
    """`fail` if a rule fails, `pass` if all pass, else `inconclusive`."""
    alpha: float
    """Highest probability of a false alarm, all rules together, and of passing a rule that is broken."""
    sequential: bool
    """Whether this holds however often one looks while the run grows."""
    run: str
    baseline: str | None
    verdicts: tuple[Verdict, ...]
