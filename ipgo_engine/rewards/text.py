"""From prompts to token ids, with vocabularies that lie on this machine."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

Tokenize = Callable[[Sequence[str]], Tensor]

CLIP_L_FOLDER = "clip-vit-large-patch14"
"""Where CLIP ViT-L/14 lies below the weights root; every CLIP used here has its vocabulary."""


def load_clip_tokenizer(folder: Path, length: int, *, cleaned: bool = False) -> Tokenize:
    """Prompts to token ids (B, length) of CLIP's vocabulary.

    Longer prompts are cut and keep their end token, as every CLIP code does. The vocabulary is the folder's own, else
    that of a folder of CLIP ViT-L/14 in it or beside it, else the one open_clip ships. `cleaned` first repairs the text
    the way open_clip does (HTML entities, broken encodings): its own tokenizer comes first then, where it is installed.
    """
    if cleaned and (shipped := _shipped(length)) is not None:
        return shipped
    for place in (folder, folder / CLIP_L_FOLDER, folder.parent / CLIP_L_FOLDER):
        if any((place / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return _from_folder(place, length, cleaned)
    shipped = _shipped(length)
    if shipped is None:
        raise InputError(
            f"CLIP's vocabulary is missing: put vocab.json and merges.txt of {CLIP_L_FOLDER} into {str(folder)!r}, or "
            "install open_clip_torch."
        )
    return shipped


def _shipped(length: int) -> Tokenize | None:
    try:
        from open_clip import SimpleTokenizer
    except ImportError:
        return None
    tokenizer = SimpleTokenizer(context_length=length)
    return lambda prompts: tokenizer(list(prompts))


def _from_folder(folder: Path, length: int, cleaned: bool) -> Tokenize:
    import transformers

    kind: Any = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer  # before and since 5
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a damaged vocabulary breaks
        raise InputError(f"the tokenizer files in {str(folder)!r} cannot be read: {error}.") from error
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}

    def tokenize(prompts: Sequence[str]) -> Tensor:
        texts = [_clean(prompt) for prompt in prompts] if cleaned else list(prompts)
        return tokenizer(texts, **options)["input_ids"]

    return tokenize


def _clean(text: str) -> str:
    """What open_clip does to a prompt: ftfy where it is installed, HTML entities, white space, lower case."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        pass
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


def load_bert_tokenizer(vocabulary: Path, length: int) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """Prompts to ids and mask, both (B, length), with the lower-cased word pieces of bert-base-uncased."""
    from tokenizers import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    except Exception as error:  # the library raises bare exceptions
        raise InputError(f"{str(vocabulary)!r} is not the vocab.txt of bert-base-uncased: {error}.") from error
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def tokenize(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer.encode_batch(list(prompts))
        ids, mask = [item.ids for item in encoded], [item.attention_mask for item in encoded]
        return torch.tensor(ids), torch.tensor(mask)

    return tokenize
