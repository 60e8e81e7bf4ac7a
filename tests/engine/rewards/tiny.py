"""Small models in the layouts their authors publish, with reproducible weights, and test pictures."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

PROMPTS = ["a red heart", "two dogs playing chess, oil painting"]
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
ARCHITECTURE = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}

REFERENCE_SIZES = [(512, 512), (480, 640), (641, 333), (32, 32), (20, 31)]
REFERENCE_PROMPTS = [
    *PROMPTS,
    "",
    "a very long prompt about everything, " * 40,
    "  CAPS, caf\u00e9 &amp; 'quotes'\n\ttabs -- \u65e5\u672c\u8a9e \u2764 3.14 ",
]
BLIP_VISION = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-&;"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "dog", "two", "dogs", "painting"]
WORDS += [*LETTERS, *("##" + letter for letter in LETTERS)]
SMALL_MED_CONFIG = MED_CONFIG | {
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "vocab_size": len(WORDS) + 2,
}


def save_vocabulary(path):
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")


def pixels(size, seed=0):
    """A preprocessed batch of one, (1, 3, size, size)."""
    values = np.random.RandomState(seed).standard_normal((1, 3, size, size))
    return torch.from_numpy(values.astype(np.float32))


def picture(height, width, seed=0):
    """A smooth random picture with some sharp edges: uint8 (H, W, 3)."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
    pixels[height // 4 : height // 3, width // 4 : width // 2] = 255 - pixels[0, 0]
    noise = rng.randint(-12, 13, pixels.shape)
    return (pixels.astype(int) + noise).clip(0, 255).astype(np.uint8)


def as_batch(*pictures):
    return torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pictures])


def fill(state_dict):
    """The same tensors with values that depend on nothing but their names, scaled so that signals survive depth."""
    filled = {}
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            filled[name] = tensor
            continue
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        values = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 25
        scale = 1.0 if "embedding" in name else fan_in**-0.5
        one = tensor.ndim == 1 and name.endswith("weight")
        filled[name] = values * (0.1 if one else scale) + (1.0 if one else 0.0)
    if "logit_scale" in filled:
        filled["logit_scale"] = torch.tensor(4.6052)
    return filled


def save_clip_tokenizer(folder: Path):
    """vocab.json and merges.txt of CLIP, from the vocabulary that open_clip ships."""
    import open_clip

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    vocabulary = dict(open_clip.SimpleTokenizer().encoder)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in vocabulary.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>", **special}
        )
    )


def save_fast_tokenizer(folder: Path):
    """tokenizer.json and special_tokens_map.json beside CLIP's vocabulary, as its own repository has them."""
    from transformers import CLIPTokenizerFast

    vocabulary = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    for name, content in vocabulary.items():
        (folder / name).write_bytes(content)
    if not (folder / "special_tokens_map.json").is_file():
        (folder / "special_tokens_map.json").write_text("{}")


def transformers_clip(folder: Path, *, width=64, projection=24, image_size=32, tokenizer=True, processor=True):
    """Save a small CLIPModel the way transformers does; returns the model."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": width,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 8,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection))
    model.load_state_dict(fill(model.state_dict()))
    model.train(False).save_pretrained(folder)
    if tokenizer:
        save_clip_tokenizer(folder)
    if processor:
        settings = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
        settings |= {"image_processor_type": "CLIPImageProcessor", "resample": 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def open_clip_model(architecture=ARCHITECTURE):
    import open_clip

    model = open_clip.CLIP(**architecture)
    model.load_state_dict(fill(model.state_dict()))
    return model.train(False)


class AuthorsHead(nn.Module):
    def __init__(self, width):
        super().__init__()
        sizes = [(width, 1024), None, (1024, 128), None, (128, 64), None, (64, 16), (16, 1)]
        self.layers = nn.Sequential(*[nn.Dropout(0.2) if s is None else nn.Linear(*s) for s in sizes])


def imagereward_shapes(dim=768, hidden=256, layers=2):
    """Names and shapes of the tensors in the authors' file, for BLIP_VISION and SMALL_MED_CONFIG."""
    shapes = {"visual_encoder.cls_token": (1, 1, 64), "visual_encoder.pos_embed": (1, 17, 64)}
    shapes |= {"visual_encoder.patch_embed.proj.weight": (64, 3, 8, 8), "visual_encoder.patch_embed.proj.bias": (64,)}
    linear, norms = {"vision_proj": (256, 64), "text_proj": (256, dim)}, ["visual_encoder.norm"]
    for i in range(layers):
        block, layer = f"visual_encoder.blocks.{i}.", f"text_encoder.encoder.layer.{i}."
        linear |= {f"{block}attn.qkv": (192, 64), f"{block}attn.proj": (64, 64)}
        linear |= {f"{block}mlp.fc1": (256, 64), f"{block}mlp.fc2": (64, 256)}
        norms += [f"{block}norm1", f"{block}norm2"]
        for part, seen in (("attention", dim), ("crossattention", 64)):
            linear |= {f"{layer}{part}.self.{name}": (dim, seen) for name in ("key", "value")}
            linear |= {f"{layer}{part}.self.query": (dim, dim), f"{layer}{part}.output.dense": (dim, dim)}
            norms.append(f"{layer}{part}.output.LayerNorm")
        linear |= {f"{layer}intermediate.dense": (hidden, dim), f"{layer}output.dense": (dim, hidden)}
        norms.append(f"{layer}output.LayerNorm")
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    for name in norms:
        width = 64 if name.startswith("visual") else dim
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    text = "text_encoder.embeddings."
    shapes |= {f"{text}word_embeddings.weight": (len(WORDS) + 2, dim), f"{text}position_embeddings.weight": (64, dim)}
    shapes |= {f"{text}LayerNorm.weight": (dim,), f"{text}LayerNorm.bias": (dim,)}
    shapes = {f"blip.{name}": shape for name, shape in shapes.items()}
    return shapes | {f"mlp.{name}": tuple(tensor.shape) for name, tensor in AuthorsHead(dim).state_dict().items()}


def save_imagereward(folder):
    """A small ImageReward the way its authors publish theirs."""
    weights = fill({name: torch.zeros(shape) for name, shape in imagereward_shapes().items()})
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(weights, folder / "ImageReward.pt")
    save_vocabulary(folder / "vocab.txt")
    (folder / "med_config.json").write_text(json.dumps(SMALL_MED_CONFIG))
