"""Write all fixtures of the Swift tests into a folder.

    python -m tests.swift_fixtures OUT
    APERTUS_FIXTURES=OUT swift test --package-path swift

They are made on the machine that runs the tests, since they hold bits that MLX computes there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.swift_fixtures.answered import write_answered_fixtures
from tests.swift_fixtures.answers import write_answer_fixtures
from tests.swift_fixtures.checkpoints import write_checkpoint_fixtures
from tests.swift_fixtures.configs import write_config_fixtures
from tests.swift_fixtures.conversations import write_conversation_fixtures
from tests.swift_fixtures.models import write_model_fixtures
from tests.swift_fixtures.prompt_caches import write_prompt_cache_fixtures
from tests.swift_fixtures.tokenizers import write_tokenizer_fixtures


def main() -> None:
    """Write them."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer_fixtures(out)
    write_answered_fixtures(out)
    write_config_fixtures(out)
    write_checkpoint_fixtures(out)
    write_conversation_fixtures(out)
    write_answer_fixtures(out)
    write_model_fixtures(out)
    write_prompt_cache_fixtures(out)


main()
