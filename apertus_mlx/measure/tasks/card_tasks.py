"""Which tasks names stand for: those of the Apertus model cards, our own, and lm-eval's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.errors import UsageError

SWISS_FORK = "pip install git+https://github.com/swiss-ai/lm-evaluation-harness"
# swiss-ai/evals-post-train, configs/apertus/tasks_posttrain_final_main_table.txt.
POST = (
    *("agieval", "arc_challenge_chat", "commonsense_qa", "hellaswag", "mmlu_flan_cot_zeroshot"),
    *("mmlu_pro", "squadv2", "truthfulqa_mc2", "gsm8k_cot", "gsm8k_platinum_cot_zeroshot"),
    *("hendrycks_math", "mathqa", "minerva_math", "humaneval_instruct", "mbpp_instruct"),
    *("gpqa_main_cot_zeroshot", "acp_bench", "drop", "bbh", "mgsm_en_cot_en"),
    *("global_mmlu_gen_0shot", "truthfulqa_multilingual_mc2", "arc_multilingual", "mlogiqa_gen"),
    *("xnli", "include_base_44_gen_0shot", "include_base_new_45_gen_0shot", "alpaca_eval"),
    *("ifeval", "multi-if", "blend_sample", "cultural_bench", "switzerland_qa_0shot", "bbq"),
    *("aya_redteaming", "toxigen", "wmdp"),
)
# The multilingual tasks of pretraining.
PRE = (
    *("global_mmlu", "truthfulqa_multilingual_mc2", "mgsm_direct", "mgsm_native_cot", "mlogiqa"),
    *("multi-if", "include_base_44", "include_base_new_45", "blend_sample", "cultural_bench"),
    *("multijail", "switzerland_qa", "polyglotoxicityprompts"),
)
# The parts of the fork's group of that name.
SWISSAI = (
    *("global_mmlu", "include_base_44", "xcopa", "xnli", "xwinograd", "pawsx", "m_arc"),
    "m_hellaswag",
)
LISTS = {"apertus-post": POST, "apertus-pre": PRE, "swissai_eval": SWISSAI}
RUN_CODE = {"humaneval_instruct", "mbpp_instruct"}
NEED_A_JUDGE = {"alpaca_eval"}
# What swiss-ai/lm-evaluation-harness alone has (b403756e, July 2026).
FORK_ONLY = {
    *("global_mmlu_gen_0shot", "truthfulqa_multilingual_mc2", "mlogiqa_gen"),
    *("include_base_44_gen_0shot", "include_base_new_45", "include_base_new_45_gen_0shot"),
    *("multi-if", "blend_sample", "cultural_bench", "switzerland_qa", "switzerland_qa_0shot"),
    *("aya_redteaming", "multijail"),
}
# Names on the cards that neither has: the fork's are mlogiqa_gen, and polyglotoxicityprompts by
# language.
NOWHERE = {"mlogiqa", "polyglotoxicityprompts"}
# Groups of the fork that lm-eval has under another name, or only as a task for each language.
OTHER_NAMES = {"m_arc": "arc_multilingual", "m_hellaswag": "hellaswag_multilingual"}
BY_LANGUAGE = {"global_mmlu", "include_base_44", "mgsm_native_cot"}


@dataclass(slots=True)
class Chosen:
    """What will run, by name, and what there is to say before it does, a line each.

    `manager` is lm-eval's, which makes tasks of names.
    """

    tasks: list[str | dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manager: Any = None


def choose(names: Sequence[str], known: Collection[str], own: dict[str, dict[str, Any]]) -> Chosen:
    """Find tasks by their names, or by the name of a list in `LISTS`.

    Of a list what cannot run here is left out, which the notes say.

    Args:
        names: as the user gave them.
        known: names that this lm-eval has.
        own: tasks in the package.

    Raises:
        UsageError: there is no such task, or nothing of a list is left.
    """
    chosen = Chosen()
    from_hub: list[str] = []
    for name in dict.fromkeys(names):
        if name in own:
            chosen.tasks.append(own[name])
        elif name in known:
            from_hub.append(name)
        elif name in LISTS:
            from_hub += _listed(name, known, chosen.notes)
        else:
            raise UsageError(_unknown(name, [*known, *own, *LISTS]))
    from_hub = list(dict.fromkeys(from_hub))
    chosen.tasks += from_hub
    if from_hub:
        chosen.notes.append(
            "from the Hub, where its cache does not have them, come the data sets of: "
            + ", ".join(from_hub)
        )
    return chosen


def _listed(name: str, known: Collection[str], notes: list[str]) -> list[str]:
    runs = []
    reasons: dict[str, list[str]] = {}
    for task in LISTS[name]:
        if task in RUN_CODE:
            reason = "they run code that the model writes"
        elif task in NEED_A_JUDGE:
            reason = "another model has to judge them"
        elif found := _found(task, known):
            runs += found
            continue
        elif task in FORK_ONLY:
            reason = f"only the Swiss fork has them: {SWISS_FORK}"
        else:
            reason = "this lm-eval does not have them"
        reasons.setdefault(reason, []).append(task)
    notes += [
        f"{name}: left out: {', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()
    ]
    if not runs:
        raise UsageError(f"--tasks {name}: this lm-eval has none of them; {SWISS_FORK}")
    return runs


def _found(task: str, known: Collection[str]) -> list[str]:
    """The names by which this lm-eval has a task; none where it does not."""
    for name in (task, OTHER_NAMES.get(task, task)):
        if name in known:
            return [name]
    if task not in BY_LANGUAGE:
        return []
    # Longer names are subjects and other prompts.
    language = re.compile(re.escape(task) + "_(north_)?[a-z]+")
    return sorted(filter(language.fullmatch, known))


def _unknown(name: str, all_names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, all_names, 3)
    words = f", but {' or '.join(close)}" if close else "; `lm-eval ls tasks` names them"
    if any(name in tasks for tasks in LISTS.values()):
        words = f"; the Swiss fork may have it: {SWISS_FORK}"
    return f"--tasks {name[:80]}: lm-eval has no task of that name{words}"
