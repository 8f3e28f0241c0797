"""The compact core of the distillation: losses, mixtures and gains on plain tensors. Needs torch and nothing else.

A trainer captures one layer's rotated queries and keys (`Heads`) of teacher and student, says what each row sees and
how far away it is (`View`), and adds up `octave_matching`, `qk_alignment` and `shared_vocab_kl`. A `HeadMixer` says
which teacher heads a student head imitates. A `RopeGain` scales queries by rotary pair, and `fold_gain` writes it
into the checkpoint (`FoldSite`) when training is over.
"""

from laid_eval.core.alignment import Alignment, qk_alignment
from laid_eval.core.gain import FoldSite, GainNotFoldable, RopeGain, fold_gain, query_rows
from laid_eval.core.heads import Heads
from laid_eval.core.kl import Unembedding, label_loss, shared_vocab_kl
from laid_eval.core.matching import Matched, distance_weight, octave_matching
from laid_eval.core.mixer import HeadMixer, head_similarity
from laid_eval.core.view import (
    Rows,
    View,
    image_distance,
    index_distance,
    rope_distance,
    sample_rows,
    seen_keys,
    sink_keys,
)

__all__ = [
    "Alignment",
    "FoldSite",
    "GainNotFoldable",
    "HeadMixer",
    "Heads",
    "Matched",
    "RopeGain",
    "Rows",
    "Unembedding",
    "View",
    "distance_weight",
    "fold_gain",
    "head_similarity",
    "image_distance",
    "index_distance",
    "label_loss",
    "octave_matching",
    "qk_alignment",
    "query_rows",
    "rope_distance",
    "sample_rows",
    "seen_keys",
    "shared_vocab_kl",
    "sink_keys",
]
