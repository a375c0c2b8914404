"""GPT-2 models built from PyTorch's standard modules, as baselines for benchmarks.

Each peer is a GPT-2 for the same `GPTConfig`, takes fastgpt's weights (`copy_weights`) and computes
the same function except for the variant of GELU: both peers use PyTorch's default, the exact (erf)
one, as nanoGPT does. On a CPU it is also the faster one, which favors the peers. `use_tanh_gelu`
switches to the tanh approximation of GPT-2, to check that everything else is equal.

The conditions are equal: same dtype, same batch, same threads, and PyTorch's fused attention.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.model import GPT, GPTConfig


class Peer(nn.Module):
    """Base class: embeddings, the blocks of the subclass, a final norm and a tied head.

    names: parts of parameter names that differ from those in fastgpt, and their replacements.
    """

    names: tuple[tuple[str, str], ...]

    def __init__(self, config: GPTConfig, blocks: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = blocks
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits `[B, T, V]` of `ids` `[B, T]`, or their mean loss."""
        logits = self.lm_head(self.hidden(ids))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the hidden states `[B, T, C]` after the final norm."""
        positions = torch.arange(ids.size(1), device=ids.device)
        return self.ln_f(self.run_blocks(self.drop(self.wte(ids) + self.wpe(positions))))

    def run_blocks(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T, C]` after all blocks."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        """Continue `ids` `[B, T]` without a cache: each token processes the whole context again.

        temperature: 0 selects the most likely token.
        """
        for _ in range(max_new_tokens):
            window = ids[:, -self.config.block_size :]
            logits = self.lm_head(self.hidden(window)[:, -1])  # [B, V]
            if temperature == 0.0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            ids = torch.cat([ids, new], dim=1)
        return ids

    def pairs(self, gpt: GPT) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Pair each of this model's parameters with the corresponding one of fastgpt."""
        theirs = dict(gpt.named_parameters())
        for name, parameter in self.named_parameters():
            for ours, renamed in self.names:
                name = name.replace(ours, renamed)
            yield parameter, theirs[name]


class StockGPT(Peer):
    """GPT-2 in the style of nanoGPT (github.com/karpathy/nanoGPT, model.py)."""

    names = (
        ("blocks.", "h."),
        ("qkv", "attn.c_attn"),
        ("out", "attn.c_proj"),
        ("mlp.0", "mlp.c_fc"),
        ("mlp.2", "mlp.c_proj"),
    )

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(
            config, nn.Sequential(*(StockBlock(config) for _ in range(config.n_layer)))
        )

    def run_blocks(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T, C]` after all blocks."""
        return self.blocks(x)


class StockBlock(nn.Module):
    """A pre-norm block: q, k and v are split and transposed, with PyTorch's fused attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.n_embd, config.bias
        self.n_head, self.dropout = config.n_head, config.dropout
        self.ln_1 = nn.LayerNorm(width, config.layer_norm_eps, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.drop = nn.Dropout(config.dropout)
        self.ln_2 = nn.LayerNorm(width, config.layer_norm_eps, bias=bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=bias),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=bias),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T, C]` with attention and MLP added."""
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return multi-head causal self-attention over `x` `[B, T, C]`."""
        q, k, v = (self.heads(part) for part in self.qkv(x).split(x.size(-1), dim=-1))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).reshape(x.shape)))

    def heads(self, part: Tensor) -> Tensor:
        """View `[B, T, C]` as `[B, H, T, D]`."""
        return part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class TransformerEncoderGPT(Peer):
    """GPT-2 as a stack of `nn.TransformerEncoderLayer` with a causal mask."""

    names = (
        ("blocks.layers.", "h."),
        ("self_attn.in_proj_", "attn.c_attn."),
        ("self_attn.out_proj", "attn.c_proj"),
        ("norm", "ln_"),
        ("linear1", "mlp.c_fc"),
        ("linear2", "mlp.c_proj"),
    )

    def __init__(self, config: GPTConfig) -> None:
        layer = nn.TransformerEncoderLayer(
            config.n_embd,
            config.n_head,
            dim_feedforward=4 * config.n_embd,
            dropout=config.dropout,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=True,
            bias=config.bias,
        )
        layer.dropout.p = 0.0  # inside the MLP, where GPT-2 has no dropout
        # Nested tensors are for padded batches; with norm_first, enabling them causes a warning.
        encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)
        super().__init__(config, encoder)
        mask = nn.Transformer.generate_square_subsequent_mask(config.block_size)
        self.register_buffer("mask", mask, persistent=False)

    def run_blocks(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T, C]` after all blocks."""
        time = x.size(1)
        # With is_causal, the layers pass the causal flag instead of the mask to fused attention.
        return self.blocks(x, mask=self.mask[:time, :time], is_causal=True)


@torch.no_grad()
def copy_weights(gpt: GPT, peer: Peer) -> None:
    """Copy all weights of `gpt` to `peer`; raise an error if one has no counterpart."""
    pairs = list(peer.pairs(gpt))
    if len(pairs) != len(list(gpt.parameters())):
        raise ValueError("some weights of the GPT have no counterpart in the peer")
    for mine, theirs in pairs:
        mine.copy_(theirs)


def use_tanh_gelu(peer: Peer) -> None:
    """Switch `peer` to GPT-2's tanh approximation of GELU, for checks only, not for timing."""
    for module in peer.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation = partial(F.gelu, approximate="tanh")
            module.activation_relu_or_gelu = 0  # disables the fast path, which supports erf only


def make_optimizer(
    peer: Peer, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW as in nanoGPT: weight decay on matrices only, fused on CUDA only."""
    parameters = list(peer.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # None instead of False: on a CPU, PyTorch chooses the implementation, as in nanoGPT.
    fused = True if parameters[0].is_cuda else None
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
