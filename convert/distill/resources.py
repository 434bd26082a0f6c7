"""What a distillation takes: batches that fit, memory, and disk."""

from __future__ import annotations

from dataclasses import dataclass

from apertus_mlx.backend.hardware import available_bytes
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.layout import parameter_count
from apertus_mlx.convert.distill.partial_updates import BLOCK_NUMBERS
from apertus_mlx.convert.distill.student import Trained
from apertus_mlx.convert.distill.teacher_cache import answer_bytes
from apertus_mlx.errors import ResourceError
from apertus_mlx.system.sizes import format_bytes

# Most tokens, and most logits, of a batch.
BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 26
# What layers may keep for the gradient of a batch; where it would be more, they learn one by one.
KEPT_BYTES = 1 << 30
# Arrays of the shape of the logits that a step of the whole model holds at once, and blocks of the
# logits or of a table that one by layers does beside the logits.
LOGITS_COPIES, BLOCK_COPIES = 14, 10


@dataclass(frozen=True, slots=True)
class Resources:
    """Needs of training a student of `config` on windows of `window_tokens`, in float32."""

    config: ModelConfig
    trained: Trained
    window_tokens: int
    # Of a batch, or one window; None: as many as are worth it.
    batch_tokens: int | None = None

    @property
    def batch_windows(self) -> int:
        """Windows of a batch."""
        tokens: int = min(
            self.batch_tokens or BATCH_TOKENS, BATCH_LOGITS // self.config.output_vocab_size
        )
        return max(1, tokens // self.window_tokens)

    @property
    def by_layers(self) -> bool:
        """Whether layers learn one by one, each run again for its gradient."""
        return self._kept_bytes > KEPT_BYTES

    @property
    def memory_bytes(self) -> int:
        """Memory of training, about."""
        parameters, weights = parameter_count(self.config), self.trained == "weights"
        logits = 4 * self.batch_windows * self.window_tokens * self.config.output_vocab_size
        if self.by_layers:
            # A position and two moments; or a code in one byte. Beside them scales and biases.
            learned = 13 * parameters if weights else 7 * parameters // 4
            layer = self._kept_bytes // self.config.num_hidden_layers
            return learned + layer + logits + BLOCK_COPIES * 4 * BLOCK_NUMBERS
        # Positions, their gradient and two moments; or codes in one byte.
        learned = parameters * (16 if weights else 1)
        table = 12 * self.config.vocab_size * self.config.hidden_size
        return learned + self._kept_bytes + table + LOGITS_COPIES * logits

    def disk_bytes(self, tokens: int, k: int) -> int:
        """Room for the teacher's answers to `tokens`, the saved states and the best weights.

        A state is the weights and two moments of each; the next one is beside it for a moment.
        """
        state = 28 * parameter_count(self.config) if self.trained == "weights" else 0
        return state + tokens * answer_bytes(k)

    def require(self) -> None:
        """Refuse what this machine has not the memory for.

        Raises:
            ResourceError: the estimate exceeds what is available.
        """
        available = available_bytes()
        if self.memory_bytes > available:
            smaller = "--train scales takes less" if self.trained == "weights" else "use another"
            raise ResourceError(
                f"distillation takes about {format_bytes(self.memory_bytes)} of memory, "
                f"{format_bytes(available)} are available; {smaller}"
            )

    @property
    def _kept_bytes(self) -> int:
        """What layers keep for a gradient: some activations of each kind, and their weights."""
        config, length = self.config, self.window_tokens
        each = 10 * config.hidden_size + 6 * config.intermediate_size
        each += 4 * config.num_attention_heads * length
        activations = 4 * self.batch_windows * length * config.num_hidden_layers * each
        return int(activations + 12 * parameter_count(config))
