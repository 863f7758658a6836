"""Which files of a checkpoint are copied unchanged into the converted one."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

MANIFEST_NAME = "rehead.json"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"

#: Endings of weight files in every format a checkpoint folder is known to hold, and of pickles, which can run code.
WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".flax", ".onnx",
    ".onnx_data", ".gguf", ".ggml", ".ggjt", ".pkl", ".pickle", ".joblib", ".npz", ".npy", ".tflite", ".mlmodel",
    ".mlpackage", ".mlmodelc", ".ot", ".pdparams", ".pdiparams", ".engine", ".plan", ".trt", ".nemo", ".index",
    ".data", ".pb", ".llamafile", ".mar", ".ptl", ".pte", ".zip", ".tar", ".gz", ".7z", ".rar", ".zst", ".xz",
    ".part", ".incomplete", ".lock", ".tmp",
})  # fmt: skip
#: Files about weights or code that are not copied, and files that a conversion writes itself.
_REWRITTEN = frozenset({MANIFEST_NAME, CONFIG_NAME, CARD_NAME, "adapter_config.json", "quantize_config.json"})
#: Vocabularies that some tokenizers keep under a name that looks like a weight file's.
_VOCABULARY_WORDS = ("vocab", "tokenizer", "sentencepiece", "spiece", "merges", "tekken")


def travels(name: str) -> bool:
    """Whether the file ``name`` (POSIX path relative to the checkpoint) is copied byte for byte into the output.

    Every file is (tokenizer, chat template, generation config, vocabulary, licence) except weights of any format and
    their indexes, Python code (remote code is never copied), hidden files, and what the conversion writes itself.
    """
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__pycache__" for part in path.parts):
        return False
    if len(path.parts) == 1 and path.name in _REWRITTEN:
        return False
    low = path.name.lower()
    if low.endswith((".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".index.json")):
        return False
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        text_like = path.suffix.lower() in (".gz", ".data")
        return text_like and any(word in low for word in _VOCABULARY_WORDS)
    return True


#: Names of the files in checkpoint folders, as model hubs and training libraries write them.
_CHECKPOINT_FILES = re.compile(
    r"(config|generation_config|quantize_config|adapter_config|params|model_index|modules)\.json|rehead.*\.json"
    r"|[\w.-]*\.index\.json|(tokenizer|vocab|merges|special_tokens|added_tokens|spiece|sentencepiece|tekken)[\w.-]*"
    r"|(preprocessor|processor|video_preprocessor|image_processor|feature_extractor|chat_template|sentence_bert)[\w.-]*"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja|[\w.-]*\.(safetensors|gguf|bin|model|tiktoken)"
    r"|(configuration|modeling|tokenization|processing|image_processing)_\w+\.py|training-log\.jsonl"
    r"|(README|LICENSE|LICENCE|NOTICE|USE_POLICY|COPYING)[\w.-]*|\.gitattributes|\.gitignore"
    r"|\.cache/huggingface/.*|evaluation\.json|trainer_state\.json|training_args\.bin|model\.safetensors\..*",
    re.IGNORECASE,
)


def is_checkpoint_file(name: str) -> bool:
    """Whether a file (POSIX path relative to the folder) is part of a checkpoint, by its name."""
    return _CHECKPOINT_FILES.fullmatch(name) is not None
