"""The tiny encoders' directories, and ways to change copies of them."""

import json
import shutil
from pathlib import Path

from golden_makers import GOLDEN, maker
from safetensors.numpy import load_file, save_file

TINY = GOLDEN / "encoders"
SENTENCE = ("bert_sentence", "roberta_sentence")
CLASSIFIERS = ("bert_classifier", "roberta_classifier")
MAKE = maker("make_encoders")


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / name, tmp_path / name))


def change_json(path: Path, change: dict | list) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
