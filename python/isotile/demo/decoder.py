"""A small Llama-style decoder, written once for any operator namespace, and a few steps of training it on bytes.

Llama: Touvron et al. 2023, arXiv:2302.13971. RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. Rotary positions: Su
et al. 2021, arXiv:2104.09864. Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245. Gated MLP: Shazeer
2020, arXiv:2002.05202.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int = 256  # bytes
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 352
    norm_eps: float = 1e-5


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        d, head_dim = config.hidden_size, config.hidden_size // config.heads
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query = nn.Linear(d, config.heads * head_dim, bias=False)
        self.key = nn.Linear(d, config.kv_heads * head_dim, bias=False)
        self.value = nn.Linear(d, config.kv_heads * head_dim, bias=False)
        self.out = nn.Linear(config.heads * head_dim, d, bias=False)
        self.norm = nn.RMSNorm(d, config.norm_eps)
        self.mlp_norm = nn.RMSNorm(d, config.norm_eps)
        self.gate = nn.Linear(d, config.intermediate_size, bias=False)
        self.up = nn.Linear(d, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, d, bias=False)

    def forward(self, x, angles, ops):  # [batch, tokens, d]
        h = ops.rms_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.eps)
        q, k, v = (
            ops.linear(h, p.weight).unflatten(-1, (heads, -1)).transpose(1, 2)
            for p, heads in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )  # [batch, heads, tokens, head_dim]
        y = ops.attention(rotate(q, angles), rotate(k, angles), v, is_causal=True, enable_gqa=True)
        y = ops.linear(y.transpose(1, 2).flatten(-2), self.out.weight)
        norm = self.mlp_norm
        h, x = ops.rms_norm(y, norm.normalized_shape, norm.weight, norm.eps, residual=x)
        y = ops.linear(h, self.gate.weight, activation="silu") * ops.linear(h, self.up.weight)
        return ops.linear(y, self.down.weight, residual=x)


class Decoder(nn.Module):
    """Next-byte logits. `ops` is `isotile` or `isotile.demo.torch_ops`; input and output embeddings are one table."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.words.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, ids, ops):  # [batch, tokens] -> [batch, tokens, vocab]
        x = self.words(ids)
        angles = rotary_angles(ids.shape[1], self.config.hidden_size // self.config.heads, x)
        for layer in self.layers:
            x = layer(x, angles, ops)
        x = ops.rms_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.eps)
        return ops.linear(x, self.words.weight)


def rotary_angles(tokens, head_dim, like):
    """cos and sin, each [tokens, head_dim / 2], taken in float64 and rounded once."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
    return angles.cos().to(like), angles.sin().to(like)


def rotate(x, angles):  # [batch, heads, tokens, head_dim]
    cos, sin = angles
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ---- Training


def training_text(fallback: str) -> tuple[bytes, str]:
    """Real text that comes with Python, and its name; the sentences of the demo where Python came without it."""
    if importlib.util.find_spec("pydoc_data") is None:
        return fallback.encode(), "the demo's own sentences (this Python came without pydoc_data)"
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode(), "Python's language reference (pydoc_data)"


class Trainer:
    """One model, one optimiser, one operator namespace. Equal seeds give equal weights and equal batches."""

    def __init__(self, text: bytes, ops, *, seed, dtype, device, batch=8, tokens=128, rate=3e-3):
        if len(text) < tokens + 2:
            raise ValueError(f"Trainer: text must have at least {tokens + 2} bytes, got {len(text)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn in float32 for every dtype: the float64 truth starts from the same weights.
            self.model = Decoder(DecoderConfig()).to(device, dtype)
        self.ops, self.batch, self.tokens = ops, batch, tokens
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.device = device
        self.batches = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, eps=1e-6)

    def step(self) -> float:
        """Trains on the next batch and returns its loss before the update."""
        starts = torch.randint(len(self.text) - self.tokens - 1, (self.batch,), generator=self.batches)
        ids = self.text[starts[:, None] + torch.arange(self.tokens + 1)].long().to(self.device)
        logits = self.model(ids[:, :-1], self.ops)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
