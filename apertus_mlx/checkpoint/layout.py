"""The names and shapes of every tensor of an Apertus checkpoint, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from apertus_mlx.checkpoint.config import ModelConfig

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
# xIELU: alphas are stored before softplus as [1], beta and eps as scalars.
ALPHAS = ("alpha_p", "alpha_n")
CONSTANTS = ("beta", "eps")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix `path.weight` of shape `[rows, columns]`: the part that is quantized."""

    path: str
    rows: int
    columns: int

    @property
    def weight(self) -> str:
        """The name of the weight tensor."""
        return f"{self.path}.weight"


def matrices(config: ModelConfig) -> Iterator[Matrix]:
    """The embedding, the projections of each layer and, when untied, the head, in that order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield Matrix(EMBEDDING, config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        attention, mlp = f"{layer(index)}.self_attn", f"{layer(index)}.mlp"
        yield Matrix(f"{attention}.q_proj", queries, hidden)
        yield Matrix(f"{attention}.k_proj", keys, hidden)
        yield Matrix(f"{attention}.v_proj", keys, hidden)
        yield Matrix(f"{attention}.o_proj", hidden, queries)
        yield Matrix(f"{mlp}.up_proj", inner, hidden)
        yield Matrix(f"{mlp}.down_proj", hidden, inner)
    if not config.tie_word_embeddings:
        yield Matrix(HEAD, config.output_vocab_size, hidden)


def vectors(config: ModelConfig, first: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Norm weights and xIELU parameters, with the shapes that Hugging Face stores.

    `first` is the number of the first layer, where others hold those before it.
    """
    for index in range(first, first + config.num_hidden_layers):
        prefix = layer(index)
        yield f"{prefix}.attention_layernorm.weight", (config.hidden_size,)
        yield f"{prefix}.feedforward_layernorm.weight", (config.hidden_size,)
        yield f"{prefix}.self_attn.q_norm.weight", (config.head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (config.head_dim,)
        for name in ALPHAS:
            yield f"{prefix}.mlp.act_fn.{name}", (1,)
        for name in CONSTANTS:
            yield f"{prefix}.mlp.act_fn.{name}", ()
    yield f"{FINAL_NORM}.weight", (config.hidden_size,)


def layer(index: int) -> str:
    """The path of decoder layer `index`."""
    return f"model.layers.{index}"


def layer_of(name: str) -> int | None:
    """In which decoder layer the module or tensor `name` stands; None: in none."""
    parts = name.split(".", 3)
    return int(parts[2]) if name.startswith("model.layers.") else None


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, xIELU's scalars not counted (as in the models' cards)."""
    total = sum(matrix.rows * matrix.columns for matrix in matrices(config))
    return total + sum(shape[0] for name, shape in vectors(config) if name.endswith(".weight"))
