import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from laid_eval.models.frame import frame_of
from laid_eval.models.source import quiet, resolve


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("smollm2").folder)


@pytest.fixture(scope="session")
def frame(tokenizer):
    return frame_of(tokenizer)


def _llama(seed, layers, heads, hidden):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _qwen3():
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer):
    """Folders of tiny random models with a real tokenizer: `student`, `teacher` (more layers and heads), `qwen3`."""
    out = {}
    made = {"student": _llama(1, 2, 4, 32), "teacher": _llama(2, 3, 6, 48), "qwen3": _qwen3()}
    for name, model in made.items():
        out[name] = tmp_path_factory.mktemp("models") / name
        with quiet():
            model.save_pretrained(out[name])
            tokenizer.save_pretrained(out[name])
    return out


@pytest.fixture
def quick():
    """Changes that make any recipe short."""
    return {
        "training.steps": "4",
        "training.accumulation": "1",
        "training.save_every": "2",
        "data.lengths": "[100,160]",
        "data.questions": "2",
    }


TINY_PROBE = """
name = "tiny-which"
task = "scenes"
form = "which"
summary = "small pictures, short questions"
instruction = ""
question = "With {anchor}?"
lead = "Also"
choices = 4
anchors = 3
per_image = 2
size = 48
objects = ["cactus", "tulip", "lemon", "banana", "pear", "bread", "guitar", "tiger", "whale", "pig", "crown", "key"]
"""


@pytest.fixture(scope="session")
def tiny_probe(tmp_path_factory):
    """A visual probe that tiny models read quickly."""
    path = tmp_path_factory.mktemp("probes") / "tiny-which.toml"
    path.write_text(TINY_PROBE)
    return str(path)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """Folder of a tiny random vision-language model of a family; `teacher` has other weights."""
    spec = importlib.util.spec_from_file_location(
        "vision_families", Path(__file__).parent.parent / "models" / "vision_families.py"
    )
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    folder = tmp_path_factory.mktemp("seeing")

    @cache
    def build(family, teacher=False):
        out = folder / f"{family}-{'teacher' if teacher else 'student'}"
        with quiet():
            model, processor = families.make(family)
            if teacher:
                with torch.no_grad():
                    for parameter in model.get_decoder().parameters():
                        parameter += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(out)
            processor.save_pretrained(out)
        return out

    return build


@pytest.fixture
def few(tiny_probe):
    """Changes that make any recipe a short one on pictures."""
    return {
        "data.source": tiny_probe,
        "data.images": "[2,4]",
        "data.questions": "2",
        "training.steps": "4",
        "training.accumulation": "2",
        "training.save_every": "2",
    }
