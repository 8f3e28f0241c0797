"""Tiny random vision-language models with true classes, processors and templates of their family's form."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.3,
    "tie_word_embeddings": True,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def template(picture):
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        + picture
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(**named):
    """Bytes, and the special tokens that a family names."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(named.values())]
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named,
        additional_special_tokens=special[1:],
    )  # fmt: skip


def _qwen(config, processor, video, rope, vision, **text):
    words = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>"
    )
    ids = {n: words.convert_tokens_to_ids(f"<|{n}|>") for n in ("image_pad", "video_pad", "vision_start", "vision_end")}
    made = config(
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": rope, **text}, vision_config=vision,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=True,
    )  # fmt: skip
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 32 * 32, "longest_edge": 48 * 48}
    return made, processor(
        image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=words, video_processor=video(**sizes),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip


def qwen2_5_vl():
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 8,
        "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, rope, vision, head_dim=8)


def qwen3_vl():
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 8,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return _qwen(Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor, rope, vision)


def llava_onevision():
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32], [32, 64]], vision_feature_layer=-1,
    )  # fmt: skip
    return config, LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32], [32, 64]]
        ),
        tokenizer=words, video_processor=LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16, vision_feature_select_strategy="full", chat_template=template("<image>\n"),
    )  # fmt: skip


def smolvlm():
    words = tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(words), "pad_token_id": 0},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    edge = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    return config, SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**edge, do_image_splitting=False), tokenizer=words,
        video_processor=SmolVLMVideoProcessor(**edge, video_sampling={"max_frames": 2, "fps": 1}), image_seq_len=4,
        chat_template=template("<image>"),
    )  # fmt: skip


def gemma3():
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(words), "sliding_window": 512},
        vision_config={**VISION, "image_size": 32, "patch_size": 8}, mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
    )  # fmt: skip
    return config, Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}), tokenizer=words, image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )  # fmt: skip


def internvl():
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8], "num_channels": 3},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    return config, InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False), tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size), image_seq_length=4, chat_template=template("<IMG_CONTEXT>\n"),
    )  # fmt: skip


FAMILIES = {f.__name__: f for f in (qwen2_5_vl, qwen3_vl, llava_onevision, smolvlm, gemma3, internvl)}


def make(name):
    """A model with random weights, its processor."""
    import torch

    config, processor = FAMILIES[name]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at nought, and would hide what they do
            parameter += 0.05 * torch.randn_like(parameter)
    return model, processor
