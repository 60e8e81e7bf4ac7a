"""Where the published weights are, pinned, and what of that could be confirmed.

A value that is None could not be confirmed when this table was written: it is never guessed. The download shows what
the server says instead, records it beside the file, and holds the next download of that file to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ..errors import InputError

HUB = "https://huggingface.co"
"""Serves `{HUB}/{repository}/resolve/{revision}/{file}`; a mirror with the same paths can be passed to `download`."""
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One published file: where it is, how to know it is the right one, and on what terms it may be used."""

    folder: str
    """Folder below the weights root that the file goes to; several rewards may use the same one."""
    repository: str
    revision: str
    """A commit, never a branch."""
    file: str
    size: int | None
    """Bytes."""
    sha256: str | None
    licence: str
    sources: Mapping[str, str] = field(default_factory=dict)
    """For each value, where it was read."""
    host: str = HUB
    rounded: int | None = None
    """Bytes as listings round them, where the exact size could not be confirmed: shown, never compared with."""

    def __post_init__(self) -> None:
        for name in (self.folder, self.file):
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or name.startswith("/") or "\\" in name or ":" in name:
                raise InputError(f"weights table: {name!r} would leave the weights folder.")

    def url(self, host: str | None = None) -> str:
        """The address of exactly this version of the file; `host` stands for the hub, not for other hosts."""
        name = self.file.replace("+", "%2B")
        if self.host == GITHUB:
            return f"{GITHUB}/{self.repository}/{self.revision}/{name}"
        return f"{(host or self.host).rstrip('/')}/{self.repository}/resolve/{self.revision}/{name}"

    def path(self, root: str | Path) -> Path:
        """Where the file lies under the weights root."""
        return Path(root) / self.folder / PurePosixPath(self.file).name


_PINS = "checkpoint list of a public training repository, the same in several others' download caches"

_CLIP_L_LICENCE = "MIT for the code (github.com/openai/CLIP); no licence stated for the weights"
_CLIP_L_SHA256 = {
    "config.json": "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
    "preprocessor_config.json": "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd",
    "tokenizer.json": "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
    "tokenizer_config.json": "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129",
    "special_tokens_map.json": "f8c0d6c39aee3f8431078ef6646567b0aba7f2246e9c54b8b99d55c22b707cbf",
    "vocab.json": "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    "model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
}
_MADE_AGAIN = "the file with this sha256, made again from the vocabulary that open_clip_torch ships"
_CLIP_L_SIZE = {
    "vocab.json": (961_143, _MADE_AGAIN),
    "merges.txt": (524_619, _MADE_AGAIN),
    "model.safetensors": (1_710_540_580, "eight public manifests, with the sha256"),
}
_CLIP_L = tuple(
    WeightFile(
        folder="clip-vit-large-patch14",
        repository="openai/clip-vit-large-patch14",
        revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        file=name,
        size=_CLIP_L_SIZE[name][0] if name in _CLIP_L_SIZE else None,
        sha256=sha256,
        licence=_CLIP_L_LICENCE,
        sources={
            "revision": _PINS,
            "sha256": "SHA256SUMS of a public container image, pinned from the same repository; model.safetensors also "
            "in eight other public manifests",
            "licence": "LICENSE of github.com/openai/CLIP; the model card has no licence field",
            **({"size": _CLIP_L_SIZE[name][1]} if name in _CLIP_L_SIZE else {}),
        },
    )
    for name, sha256 in _CLIP_L_SHA256.items()
)

_AESTHETIC_HEAD = WeightFile(
    folder="aesthetic",
    repository="christophschuhmann/improved-aesthetic-predictor",
    revision="6934dd81792f086e613a121dbce43082cb8be85e",
    file="sac+logos+ava1-l14-linearMSE.pth",
    size=3_714_759,
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    licence="Apache-2.0",
    sources={
        "revision": "the repository's newest commit",
        "size": "the file in that commit",
        "sha256": "computed from the file in that commit",
        "licence": "LICENSE in that commit",
    },
    host=GITHUB,
)

_HPS_REPOSITORY = "xswu/HPSv2"
_HPS_REVISION = "697403c78157020a1ae59d23f111aa58ced35b0a"
_HPS_SOURCES = {"revision": _PINS, "licence": "model card as quoted by a public asset audit; LICENSE of tgxs002/HPSv2"}
_HPS_20 = WeightFile(
    folder="hpsv2",
    repository=_HPS_REPOSITORY,
    revision=_HPS_REVISION,
    file="HPS_v2_compressed.pt",
    size=None,
    sha256=None,
    licence="Apache-2.0",
    sources=_HPS_SOURCES,
)
_HPS_21 = WeightFile(
    folder="hpsv2",
    repository=_HPS_REPOSITORY,
    revision=_HPS_REVISION,
    file="HPS_v2.1_compressed.pt",
    size=1_972_490_005,
    sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    licence="Apache-2.0",
    sources={
        **_HPS_SOURCES,
        "sha256": "asset audits of two unrelated public repositories",
        "size": "measurement log of one of them",
    },
)

_PICKSCORE = tuple(
    WeightFile(
        folder="pickscore",
        repository="yuvalkirstain/PickScore_v1",
        revision="a4e4367c6dfa7288a00c550414478f865b875800",
        file=name,
        size=None,
        rounded=3_940_000_000 if name == "model.safetensors" else None,  # several public listings
        sha256=None,
        licence="not stated on the model card; MIT for the code (github.com/yuvalkirstain/PickScore)",
        sources={"revision": _PINS, "licence": "LICENSE of the code; two public surveys found no licence on the card"},
    )
    for name in ("config.json", "model.safetensors")
)

_IMAGEREWARD = tuple(
    WeightFile(
        folder="imagereward",
        repository="zai-org/ImageReward",  # moved there from THUDM/ImageReward
        revision="5736be03b2652728fb87788c9797b0570450ab72",
        file=name,
        size=None,
        sha256=None,
        licence="Apache-2.0",
        sources={"revision": _PINS, "licence": "LICENSE of github.com/THUDM/ImageReward"},
    )
    for name in ("med_config.json", "ImageReward.pt")
)
_BERT_VOCABULARY = WeightFile(
    folder="imagereward",
    repository="google-bert/bert-base-uncased",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    file="vocab.txt",
    size=231_508,
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    licence="Apache-2.0",
    sources={
        "revision": "artifact lists of two public repositories",
        "size": "one of them, and three other manifests",
        "sha256": "ten public manifests",
        "licence": "LICENSE of github.com/google-research/bert",
    },
)


def _vocabulary_in(folder: str) -> tuple[WeightFile, ...]:
    """CLIP's vocabulary, small, for models whose own repository has none in a form that can be pinned."""
    return tuple(replace(item, folder=folder) for item in _CLIP_L if item.file in _VOCABULARY)


_VOCABULARY = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")

WEIGHTS: dict[str, tuple[WeightFile, ...]] = {
    "clip": _CLIP_L,
    "aesthetic": (_AESTHETIC_HEAD, *_CLIP_L),
    "hpsv2": (_HPS_20, *_vocabulary_in("hpsv2")),
    "hpsv2.1": (_HPS_21, *_vocabulary_in("hpsv2")),
    "pickscore": (*_PICKSCORE, *_vocabulary_in("pickscore")),
    "imagereward": (*_IMAGEREWARD, _BERT_VOCABULARY),
}
"""What each reward needs, tokenizers included; the first file's folder is the path to give to `rewards.load`."""


def files_of(name: str) -> tuple[WeightFile, ...]:
    """The files of a reward, or `InputError` naming the rewards that have some."""
    if name not in WEIGHTS:
        raise InputError(f"reward {name!r} has no published weights: use one of {', '.join(WEIGHTS)}.")
    return WEIGHTS[name]


def shown_size(size: int) -> str:
    """As people read it."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def describe(name: str) -> str:
    """One line per file with its size and licence: what a user should see before agreeing to a download."""
    lines = []
    for item in files_of(name):
        size = "size unknown until the server is asked"
        if item.size or item.rounded:
            size = shown_size(item.size) if item.size else f"about {shown_size(item.rounded or 0)}"
        check = "sha256 known" if item.sha256 else "sha256 not known: recorded and shown at the first download"
        lines.append(f"{item.folder}/{item.file}: {size}; licence: {item.licence}; {check}; {item.url()}")
    return "\n".join(lines)
