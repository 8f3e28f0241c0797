"""A window taken away on purpose, and given back: known gains planted in SmolLM2, found again by distillation.

    .venv/bin/python reports/planted-gain/study.py

Plants a gain of -4 dB in every rotary pair of 256 tokens and more of every head's queries (folded in, so the damaged
model is an ordinary checkpoint), measures window and spectrum, distils with the recipe `gain-only` from the intact
model in two ways (gains started by least squares, and gradients of attention alone), and measures again. Every step
resumes; the result is `README.md` beside this file, written from the runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

import laid_eval
from laid_eval.core import RopeGain
from laid_eval.models.fold_sites import fold_layer, fold_sites
from laid_eval.models.load import describe, load
from laid_eval.models.rotary import rotaries
from laid_eval.models.source import quiet, resolve

HERE = Path(__file__).parent
WORK = HERE.parent.parent / "runs" / "planted-gain"
FROM, DB = 256, -4.0  # tokens per turn from which pairs are attenuated; decibels
LENGTH = 8192  # claimed length: rotary pairs are those at this length
DECIBEL = 20 / np.log(10)
BANDS = ((0, 16), (16, 64), (64, 256), (256, 1024), (1024, 8192), (8192, np.inf))
WAYS = {
    "start": {},
    "gradients": {"gain.start": "one", "training.steps": "80", "training.gain_rate": "0.1"},
}


def plant() -> tuple[Path, np.ndarray]:
    """The damaged checkpoint, and the planted log gain of each pair."""
    folder = WORK / "damaged"
    loaded = load(describe(resolve("smollm2"), device="cpu"))
    turning = rotaries(loaded.model, LENGTH)
    wavelength = turning[0].wavelength
    planted = np.where(wavelength >= FROM, DB / DECIBEL, 0.0)
    if not (folder / "config.json").is_file():
        heads, channels = loaded.model.config.num_attention_heads, loaded.model.config.head_dim
        for layer, site in fold_sites(loaded.model, turning).items():
            rotary = turning[layer]
            gain = RopeGain(torch.as_tensor(rotary.first), torch.as_tensor(rotary.second), channels, heads)
            gain.set_log_gain(torch.as_tensor(planted, dtype=torch.float32).expand(heads, -1))
            fold_layer(gain, site.parts)
        with quiet():
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
    return folder, planted


def distil(damaged: Path, way: str) -> laid_eval.LoadedDistillation:
    """The student of one way."""
    out = WORK / f"mended-{way}"
    print("distilling:", way, flush=True)
    return laid_eval.distill(
        str(damaged), "smollm2", "gain-only", out=out, changes=WAYS[way], device="cpu",
        progress=lambda r: print(r.step.step, f"{r.step.values['loss']:.4f}", flush=True) if r.step else None,
    )  # fmt: skip


def errors(run: laid_eval.LoadedDistillation, planted: np.ndarray) -> list[tuple[str, float, float, float]]:
    """Band, planted dB, mean found dB (what was to be given back), root mean square error over layers, heads, pairs."""
    out = []
    for low, high in BANDS:
        band = (run.wavelength[0] >= low) & (run.wavelength[0] < high)
        wanted = -planted[band] * DECIBEL
        found = run.log_gain[:, :, band] * DECIBEL
        name = f"{low:,.0f} and more" if np.isinf(high) else f"{low:,.0f}-{high:,.0f}"
        rms = float(np.sqrt(((found - wanted) ** 2).mean()))
        out.append((name, float(wanted.mean()), float(found.mean()), rms))
    return out


def window(model: str | Path, name: str) -> laid_eval.LoadedRun:
    """The window under the settings of `make window`."""
    print("window:", name, flush=True)
    run = laid_eval.measure_window(str(model), out=WORK / f"window-{name}", max_length=12288, device="cpu")
    print(name, run.window(), flush=True)
    return run


def spectrum(model: str | Path, name: str) -> laid_eval.LoadedSpectrum:
    """Beside the intact model."""
    print("spectrum:", name, flush=True)
    return laid_eval.measure_spectrum(
        str(model), teacher="smollm2", length=2048, texts=2, out=WORK / f"spectrum-{name}", device="cpu"
    )


def figures(
    windows: dict[str, laid_eval.LoadedRun], spectra: dict[str, laid_eval.LoadedSpectrum], mended: dict
) -> None:
    """`windows.png`, `gain-by-pair.png`, `losses.png` and `found.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"intact": "#0072B2", "damaged": "#D55E00", "mended": "#009E73"}
    fig, ax = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for name, run in windows.items():
        points = run.header.curves[0].points
        x = [p.length for p in points]
        ax.fill_between(x, [p.low for p in points], [p.high for p in points], color=colours[name], alpha=0.15, lw=0)
        style = "--" if name == "mended" else "-"  # it lies on the intact model's
        ax.plot(x, [p.score for p in points], style, color=colours[name], lw=2, label=f"{name}: {run.window()}")
    ax.set_xscale("log", base=2)
    ticks = [2**k for k in range(8, 14)]
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.set_xlabel("context length (tokens)")
    ax.set_ylabel("score, probe needle (chance 0.125)")
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, loc="lower left")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(HERE / "windows.png", dpi=130)
    for name, run in spectra.items():
        fig, ax = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        laid_eval.plot.gain(run, ax=ax)
        fig.savefig(HERE / f"spectrum-{name}.png", dpi=130)
    for way, run in mended.items():
        for name, draw in (("losses", laid_eval.plot.losses), ("rope-gain", laid_eval.plot.rope_gain)):
            fig, ax = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
            draw(run, ax=ax)
            fig.savefig(HERE / f"{name}-{way}.png", dpi=130)
    plt.close("all")


def write(windows: dict, mended: dict, planted: np.ndarray) -> None:
    """`README.md` and `study.json`, from the runs."""
    lines = [
        "# A window taken away, and given back",
        "",
        "Written by `make study-planted-gain` from its runs; no figure here was typed by hand.",
        "",
        f"SmolLM2-135M-Instruct, queries attenuated by {DB:g} dB in every rotary pair of {FROM} tokens per turn and",
        "more (every layer and head, folded into `q_proj`): an ordinary checkpoint with a shorter window. The recipe",
        "`gain-only` trains one factor per rotary pair and head, from the intact model's attention, and folds it in.",
        "",
        "## Windows",
        "",
        "| model | " + " | ".join(w.criterion for w in next(iter(windows.values())).windows) + " | base score |",
        "|---" * (len(next(iter(windows.values())).windows) + 2) + "|",
    ]
    for name, run in windows.items():
        cells = [f"{w.value_text()} {w.interval_text()}" for w in run.windows]
        base = run.window()
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {base.base_score:.2f} |")
    lines += [
        "",
        "Tokens, with 95% intervals; the probe is `needle`, the settings are those of `make window`.",
        "",
        "![windows](windows.png)",
        "",
        "## Gains, planted and found",
        "",
        "dB by band of wavelength (tokens per turn); the error is the root mean square over layers, heads and pairs.",
        "",
        "| band | to be given back | " + " | ".join(f"{way}: found | error" for way in mended) + " |",
        "|---" * (2 + 2 * len(mended)) + "|",
    ]
    tables = {way: errors(run, planted) for way, run in mended.items()}
    for rows in zip(*tables.values(), strict=True):
        cells = " | ".join(f"{found:+.2f} | {rms:.2g}" for _, _, found, rms in rows)
        lines.append(f"| {rows[0][0]} | {rows[0][1]:+.1f} | {cells} |")
    lines += [
        "",
        "What does the work: `start` solves each pair's factor in closed form (least squares between the queries of",
        "student and teacher, one pass over one text); the training after it has nothing left to gain. That needs a",
        "student whose layers correspond to the teacher's head by head, as a damaged copy's do. `gradients` is",
        "distillation in the common sense, attention alone, from gains of 1: it brings attention near the teacher's",
        "long before it finds the planted numbers, since pairs of one head partly stand in for each other.",
        "",
    ]
    for way, run in mended.items():
        h = run.header
        drift, layers = h.certificate["drift"], h.certificate["layers"]
        first = float(run.steps["loss"].iloc[0])
        lines.append(
            f"- **{way}** ({'gains started by least squares on one text' if way == 'start' else 'from gains of 1'}): "
            f"{h.cost.steps} steps, {h.cost.tokens:,} tokens, {h.cost.seconds / 60:.1f} min on two cores; attention "
            f"loss {first:.2g} at the first step, {h.losses['loss']:.2g} at the end. Certificate "
            f"{'passed' if h.certificate['passed'] else 'FAILED'}: queries within "
            f"{max(x['error'] for x in layers):.1e} (wrong layout {min(x['control'] for x in layers):.2f}), "
            f"log-probabilities within {drift['log_probability']:.1e} nats. The checkpoint, loaded with plain "
            f"transformers, differs by {h.export['largest_difference']:.1e}."
        )
    lines += [
        "",
        "![losses](losses-gradients.png)",
        "![gains found by gradients](rope-gain-gradients.png)",
        "",
        "## Spectra beside the intact model",
        "",
        "Usage of a pair is |q| times |k|, in dB of power; the attenuation acts on queries alone, so -4 dB of",
        "amplitude show as -2 dB of usage.",
        "",
        "Before: ![damaged](spectrum-damaged.png)",
        "",
        "After (mind the axis, thousandths of a dB: rounding): ![mended](spectrum-mended.png)",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines))
    record = {
        "windows": {name: [w.model_dump(mode="json") for w in run.windows] for name, run in windows.items()},
        "errors": tables,
        "distillations": {way: run.header.model_dump(mode="json") for way, run in mended.items()},
    }
    (HERE / "study.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def main() -> None:
    """Everything, from wherever it is."""
    damaged, planted = plant()
    mended = {way: distil(damaged, way) for way in WAYS}
    spectra = {"damaged": spectrum(damaged, "damaged"), "mended": spectrum(mended["start"].path, "mended")}
    intact = HERE.parent / "smollm2-window"
    windows = {
        "intact": laid_eval.load_run(intact),
        "damaged": window(damaged, "damaged"),
        "mended": window(mended["start"].path, "mended"),
    }
    figures(windows, spectra, mended)
    write(windows, mended, planted)
    for way, run in mended.items():
        shutil.copy(run.path / "laid_fold.json", HERE / f"laid_fold-{way}.json")


if __name__ == "__main__":
    main()
