"""torchvision is importable beside a torch for CPUs, and untouched where it is whole."""

import subprocess
import sys

WHOLE = """
import sys, types, pathlib
folder = pathlib.Path(sys.argv[1]) / "torchvision"
folder.mkdir()
(folder / "__init__.py").write_text("mended = False")
import torch
(folder / "_C.so").write_bytes(b"")
torch.ops.load_library = lambda path: None  # its operators load: it is whole
sys.path.insert(0, sys.argv[1])
import laid_eval, torchvision
from laid_eval.models import torchvision_mend
assert torchvision.mended is False and torchvision_mend._kept == []
"""
HERE = """
import sys
import laid_eval
assert "torch" not in sys.modules and "torchvision" not in sys.modules
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessor
from PIL import Image
import torchvision
out = Qwen2VLImageProcessor()(images=[Image.new("RGB", (56, 56))], return_tensors="pt")
assert out["pixel_values"].shape == (16, 1176)
"""


def test_processors_work_here():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_whole_torchvision_is_left_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", WHOLE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
