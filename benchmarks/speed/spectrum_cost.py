"""What capturing spectra costs: ours against a plain forward pass and against `output_attentions=True`.

Every figure comes from a process of its own, one after the other on the same machine, so that peak memory is that of
one way alone. Reported are ratios; seconds depend on the machine.

    .venv/bin/python benchmarks/speed/spectrum_cost.py
    .venv/bin/python benchmarks/speed/spectrum_cost.py --lengths 1024 --long 8192 32768 --layers 6
"""

import argparse
import json
import subprocess
import sys
import time

TEXTS = 4  # of the default measurement: the first text also gives the kernels by FFT
QUERIES = 128


def once(way: str, length: int, layers: int | None, model: str) -> dict[str, float]:
    """Time one pass of one way in this process; peak memory of the process before and after."""
    import torch

    from laid_eval.models.load import describe, load
    from laid_eval.models.rotary import rotaries
    from laid_eval.models.source import resolve
    from laid_eval.spectrum.collect import observe_text

    loaded = load(describe(resolve(model), device="cpu"))
    network = loaded.model
    if layers:
        network.get_decoder().layers = network.get_decoder().layers[:layers]
        network.config.num_hidden_layers = layers
    ids = torch.randint(5, network.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    short = ids[:, :256]
    if way == "output_attentions":
        network.set_attn_implementation("eager")
    rotary = rotaries(network, length) if way.startswith("capture") else []

    def run(tokens: torch.Tensor) -> None:
        if way.startswith("capture"):
            observe_text(network, tokens[0].tolist(), rotary, QUERIES, 0, kernels=way == "capture+kernels")
            return
        with torch.inference_mode():
            network(tokens, use_cache=False, logits_to_keep=1, output_attentions=way == "output_attentions")

    run(short)  # what is paid once
    before = peak()
    started = time.perf_counter()
    run(ids)
    return {"seconds": time.perf_counter() - started, "peak": peak(), "before": before}


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    import torch

    from laid_eval.models.cost import peak_memory

    return peak_memory(torch.device("cpu")) / 2**20


def apart(way: str, length: int, layers: int | None, model: str) -> dict[str, float]:
    """The same in a new process."""
    words = [sys.executable, __file__, "--once", way, "--length", str(length), "--model", model]
    words += ["--layers", str(layers)] if layers else []
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {way:18} {length:6,} tokens: {found['seconds']:7.1f} s, {found['peak']:6,.0f} MiB", flush=True)
    return found


def main() -> None:
    """Run everything and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096], help="side by side")
    parser.add_argument("--long", type=int, nargs="*", default=[8192, 16384, 32768], help="ours and plain alone")
    parser.add_argument("--layers", type=int, help="only the first layers of the model, in the long part")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(once(given.once, given.length, given.layers, given.model)))
        return
    rows = []
    for length in given.lengths:
        plain, first, other, stock = (
            apart(way, length, None, given.model)
            for way in ("plain", "capture+kernels", "capture", "output_attentions")
        )
        ours = (first["seconds"] + (TEXTS - 1) * other["seconds"]) / TEXTS
        rows.append(
            f"| {length:,} | {ours / plain['seconds']:.2f} | {stock['seconds'] / plain['seconds']:.2f} | "
            f"{first['peak']:,.0f} | {stock['peak']:,.0f} | {stock['peak'] / first['peak']:.1f} |"
        )
    print("\n| tokens | ours / plain, time | output_attentions / plain | ours, MiB | output_attentions, MiB | ratio |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")
    rows = []
    for length in given.long:
        plain, first, other = (
            apart(way, length, given.layers, given.model) for way in ("plain", "capture+kernels", "capture")
        )
        ours = (first["seconds"] + (TEXTS - 1) * other["seconds"]) / TEXTS
        above = first["peak"] - first["before"]
        rows.append(
            f"| {length:,} | {ours / plain['seconds']:.2f} | {first['peak']:,.0f} | {above / length * 1024:.0f} |"
        )
    which = f"first {given.layers} layers" if given.layers else "all layers"
    print(f"\nours alone, {which}:")
    print(
        "| tokens | ours / plain, time | peak, MiB | above a text of 256 tokens, KiB per token |",
        "|---|---|---|---|",
        sep="\n",
    )
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
