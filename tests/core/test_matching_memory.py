"""Attention matching costs what its rows cost, not what the text squared would."""

import os
import subprocess
import sys

MEMORY = """
import torch
from laid_eval.core import Heads, View, index_distance, octave_matching, seen_keys, sink_keys
from laid_eval.models.cost import peak_memory
KEYS = 8192
own, other = ([torch.randn(1, KEYS, 16).requires_grad_(grad) for _ in "qk"] for grad in (True, False))
def octaves(rows, keys=KEYS):
    index, documents = torch.arange(rows) * (keys // rows), torch.zeros(keys, dtype=torch.long)
    view = View(seen_keys(index, documents), index_distance(index, keys), sink_keys(documents))
    sides = [Heads(q[:, index], k[:, :keys], 0.25) for q, k in (own, other)]
    octave_matching(*sides, torch.eye(1), view, gamma=1.0).loss.backward()
def dense():
    logs = [(q @ k.mT).log_softmax(-1) for q, k in (own, other)]  # no mask, no backward pass: at least so much
    torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
def peak():
    return peak_memory(torch.device("cpu")) / 2**20
octaves(16, 64)
start = peak()
for step in (lambda: octaves(32), lambda: octaves(256), dense):  # ascending: a peak hides all smaller ones after it
    step()
    print(peak() - start)
"""


def test_memory_is_a_tenth_of_dense_and_hardly_grows_with_the_rows():
    # glibc hands freed blocks back at once: else the peak measures how its heap came to be cut up
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    few, many, dense = (float(line) for line in done.stdout.split())  # MiB
    assert dense > 1000  # four maps and more of 256 MiB each
    assert many < 0.1 * dense
    assert many - few < 50  # what a row sees is kept, some bytes a key; what is computed from it is not
