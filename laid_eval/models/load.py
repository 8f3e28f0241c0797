"""Loads a causal language model with its tokenizer, and says what it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from laid_eval.errors import UserError
from laid_eval.models.source import Source, quiet
from laid_eval.records import ModelInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPE_SCALINGS = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class Described:
    """A model before its weights are loaded: enough to quote and to refuse."""

    source: Source
    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    rope_scaling: str | None
    trust_remote_code: bool
    allow_pickle: bool = False

    @property
    def text_config(self) -> PreTrainedConfig:
        """Configuration of the language model inside."""
        return self.config.get_text_config(decoder=True)

    @property
    def claimed_length(self) -> int | None:
        """What the configuration states, a rope factor that was asked for included."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def info(self) -> ModelInfo:
        """The record, without what only the loaded model knows."""
        return ModelInfo(
            name=self.source.name,
            source=self.source.description,
            fingerprint=self.source.fingerprint,
            architecture=next(iter(self.config.architectures or ()), None),
            claimed_length=self.claimed_length,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            rope_scaling=self.rope_scaling,
        )


@dataclass(frozen=True)
class LoadedVision:
    """A vision-language model ready to see."""

    model: PreTrainedModel
    processor: ProcessorMixin
    info: ModelInfo


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo


def describe(
    source: Source,
    dtype: str = "auto",
    device: str = "auto",
    rope_scaling: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Described:
    """Read the configuration and settle type, device and rope scaling.

    Args:
        source: From `resolve`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own type elsewhere) or a name.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
        rope_scaling: `yarn:2`, `linear:2` or `dynamic:2`.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Load pickled weights where there are no others.

    Raises:
        UserError: Not a causal language model, remote code needed, or an option that can't be had.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a broken checkpoint makes the library raise
        raise UserError(load_failure(source, error)) from None
    _refuse_non_causal(source, config)
    where = _device(device)
    if dtype == "auto":
        own = getattr(config, "dtype", None)
        kind = torch.float32 if where.type == "cpu" or not isinstance(own, torch.dtype) else own
    elif dtype in DTYPES:
        kind = DTYPES[dtype]
    else:
        raise UserError(f"Unknown --dtype {dtype!r}. Allowed: auto, {', '.join(DTYPES)}.")
    if rope_scaling:
        scale_rope(config, rope_scaling)
    return Described(source, config, kind, where, rope_scaling, trust_remote_code, allow_pickle)


def load_tokenizer(described: Described) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone.

    Raises:
        UserError: It can't be loaded.
    """
    tokenizer: PreTrainedTokenizerBase = _from_folder(AutoTokenizer, described)
    return tokenizer


def load(described: Described, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Load weights and tokenizer; one already loaded is taken as it is.

    Raises:
        UserError: The weights can't be loaded, or the model sees later tokens (it is not causal).
    """
    tokenizer = tokenizer or load_tokenizer(described)
    # the library counts some families that see and talk among the language models, and not others
    talks = type(described.config) in MODEL_FOR_CAUSAL_LM_MAPPING or not takes_pictures(described)
    model = _load_weights(AutoModelForCausalLM if talks else AutoModelForImageTextToText, described)
    refuse_if_not_causal(described.source.name, model)
    return LoadedModel(model, tokenizer, _loaded_info(described, model, tokenizer))


def load_vision(described: Described, processor: ProcessorMixin | None = None) -> LoadedVision:
    """Load weights and processor of a model that takes pictures; a processor already loaded is taken as it is.

    Raises:
        UserError: It takes none, or can't be loaded.
    """
    processor = processor or load_processor(described)
    model = _load_weights(AutoModelForImageTextToText, described)
    return LoadedVision(model, processor, _loaded_info(described, model, processor))


def load_processor(described: Described) -> ProcessorMixin:
    """Load what makes pictures and words into a model's inputs.

    Raises:
        UserError: The model takes no pictures, or its processor can't be loaded.
    """
    refuse_without_vision(described)
    processor: ProcessorMixin = _from_folder(AutoProcessor, described)
    return processor


def _from_folder(maker: Any, described: Described, **options: Any) -> Any:
    """What a class of transformers makes of the model's folder.

    Raises:
        UserError: It can't.
    """
    try:
        with quiet():
            return maker.from_pretrained(
                described.source.folder, trust_remote_code=described.trust_remote_code, **options
            )
    except Exception as error:  # whatever a broken checkpoint makes the library raise
        raise UserError(load_failure(described.source, error)) from None


def _load_weights(maker: Any, described: Described) -> PreTrainedModel:
    """The model on its device, ready to be asked. Raises as `_from_folder`."""
    model: PreTrainedModel = _from_folder(
        maker,
        described,
        config=described.config,
        dtype=described.dtype,
        use_safetensors=None if described.allow_pickle else True,
    )
    try:
        torch.nn.Module.to(model, described.device)
    except Exception as error:  # no room on the accelerator
        raise UserError(load_failure(described.source, error)) from None
    model.eval()
    return model


def _loaded_info(described: Described, model: PreTrainedModel, words: Any) -> ModelInfo:
    """The record with what only a loaded model knows; `words` is its tokenizer or processor."""
    parameters = sum(p.numel() for p in model.parameters())
    template = bool(getattr(words, "chat_template", None))
    return described.info.model_copy(update={"parameters": parameters, "chat_template": template})


def takes_pictures(described: Described) -> bool:
    """The configuration is one of transformers' image-text-to-text models."""
    return type(described.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def refuse_without_vision(described: Described) -> None:
    """Refuse a model that takes no pictures.

    Raises:
        UserError: It takes none; or what reads pictures is not installed.
    """
    name = described.source.name
    if not takes_pictures(described):
        raise UserError(
            f"Model {name!r} ({described.config.model_type}) takes no pictures. Use a text probe (laid-eval probes), "
            "or a vision-language model."
        )
    if find_spec("torchvision") is None:
        raise UserError(
            'Pictures need what `pip install "laid-eval[vision]"` brings: torchvision and OpenMoji\'s font.'
        )


def scale_rope(config: PreTrainedConfig, text: str) -> None:
    """Change a configuration as `yarn:2` says; the claimed length grows by the factor (not for `dynamic`).

    Raises:
        UserError: Unknown kind, no factor above 1, or a model without rotary embeddings.
    """
    kind, _, number = text.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind not in ROPE_SCALINGS or not 1 < factor < 1000:
        raise UserError(
            f"--rope-scaling {text!r} is not understood. Allowed: KIND:FACTOR with KIND one of "
            f"{', '.join(ROPE_SCALINGS)} and FACTOR above 1, e.g. yarn:2."
        )
    inner = config.get_text_config(decoder=True)
    rope = getattr(inner, "rope_parameters", None)
    longest = getattr(inner, "max_position_embeddings", None)
    if not rope or not longest:
        raise UserError(
            f"--rope-scaling needs rotary position embeddings; a {inner.model_type} model has none to scale."
        )
    # Families with one set of parameters per kind of layer (Gemma 3): only full attention reaches far.
    nested = "rope_theta" not in rope
    own: dict[str, Any] = rope["full_attention"] if nested else rope
    original = own.get("original_max_position_embeddings") or longest
    changed = {
        "rope_theta": own["rope_theta"],
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for kept in ("partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        if kept in own:
            changed[kept] = own[kept]
    if kind != "yarn":
        del changed["original_max_position_embeddings"]
    inner.rope_parameters = {**rope, "full_attention": changed} if nested else changed
    if kind != "dynamic":
        inner.max_position_embeddings = round(original * factor)


def refuse_if_not_causal(name: str, model: PreTrainedModel) -> None:
    """A later token must not change an earlier prediction: encoders wrapped as decoders fail here."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(8, device=model.device)[None] % vocabulary
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary
    with torch.inference_mode():
        first = model(tokens, use_cache=False).logits[0, :-1].float()
        second = model(changed, use_cache=False).logits[0, :-1].float()
    if not torch.isfinite(first).all():
        raise UserError(f"Model {name!r} gives scores that are not finite; try --dtype float32 or bfloat16.")
    if not torch.allclose(first, second, rtol=0, atol=1e-4 * float(first.abs().max())):
        raise UserError(
            f"Model {name!r} sees later tokens: it is an encoder. A window is measured on causal language models."
        )


def _refuse_non_causal(source: Source, config: PreTrainedConfig) -> None:
    names = config.architectures or []
    causal = any("CausalLM" in n or "LMHead" in n or "ConditionalGeneration" in n for n in names)
    if config.is_encoder_decoder or (names and not causal):
        kind = names[0] if names else config.model_type
        raise UserError(
            f"Model {source.name!r} is a {kind}, not a causal language model; models that predict the next token "
            "(…ForCausalLM) can be measured."
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device is None or (device.index or 0) >= known.get(device.type, 0):
        there = [kind for kind, count in known.items() if count]
        raise UserError(f"--device {name!r} can't be had here. Allowed: auto, {', '.join(there)}.")
    return device


def load_failure(source: Source, error: Exception) -> str:
    """One line on why a model can't be loaded."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return f"Model {source.name!r} needs code that comes with it. If you trust its authors: --trust-remote-code."
    unknown = re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", text)
    if unknown:
        return (
            f"Model {source.name!r} can't be loaded as a causal language model of text alone (its configuration is a "
            f"{unknown[1]}); those are what can be measured."
        )
    return f"Model {source.name!r} can't be loaded: {text[:240]}"
