"""The pocket family's parts: tokenizer, processor and configurations of the true Qwen2.5-VL classes."""

from __future__ import annotations

from dataclasses import dataclass

# isort: off
import laid_eval  # noqa: F401  # before transformers: it mends torchvision where that is needed

# isort: on
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from laid_eval.window.pictures import draw_pictures
from laid_eval.window.probes import ScenesProbe

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
SIDE, PATCH, MERGE = 96, 16, 3  # a picture is 4 tokens
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Of one language model; the vision tower is shared."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int


TEACHER = Size(hidden=128, layers=3, heads=4, kv_heads=2)
STUDENT = Size(hidden=64, layers=2, heads=2, kv_heads=1)
HEAD_DIM = 32  # sections 4 + 6 + 6 pairs: those of Qwen2.5-VL, a quarter as many


def make_tokenizer(probes: list[ScenesProbe]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the probes' words whole, and every other text by its bytes."""
    import numpy as np

    texts = []
    for probe in probes:
        for k in range(300):
            own = np.random.default_rng([k, 1])
            for question in draw_pictures(probe, (4, 16), own).questions(16, own):
                texts += [question.prompt, question.lead, *(f" {choice}" for choice in question.choices)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=896, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192,
        additional_special_tokens=list(SPECIAL[1:]),
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Every picture becomes SIDE x SIDE pixels."""
    sizes = {
        "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2,
        "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
    }  # fmt: skip
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes), chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """With random weights."""
    of = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": size.hidden, "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": HEAD_DIM,
            "intermediate_size": 2 * size.hidden, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, "use_sliding_window": False,
            "initializer_range": size.hidden**-0.5,  # the usual 0.02 is for hundreds of times the width
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": of["<|im_start|>"], "eos_token_id": of["<|im_end|>"], "pad_token_id": of["<|endoftext|>"],
        },
        vision_config={
            "depth": 4, "hidden_size": 96, "num_heads": 4, "intermediate_size": 192, "out_hidden_size": size.hidden,
            "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "in_channels": 3,
            "window_size": SIDE, "fullatt_block_indexes": [0, 1, 2, 3], "tokens_per_second": 2,
        },
        image_token_id=of["<|image_pad|>"], video_token_id=of["<|video_pad|>"],
        vision_start_token_id=of["<|vision_start|>"], vision_end_token_id=of["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)
