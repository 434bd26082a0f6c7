"""Tasks in the package, which need no network: ten plain facts, the same in each language."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from apertus_mlx.system.strict_json import parse_object

DATA = Path(__file__).with_name("plain_facts.json")
NAME = "plain_facts"


def own_tasks() -> dict[str, dict[str, Any]]:
    """Each task by its name as lm-eval takes one: a language each, and all languages as one."""
    languages: Any = parse_object(DATA.read_bytes(), str(DATA))["languages"]
    items = {tag: _items(language) for tag, language in languages.items()}
    every = [item for own in items.values() for item in own]
    return {
        NAME: _task(NAME, every),
        **{f"{NAME}_{tag}": _task(f"{NAME}_{tag}", own) for tag, own in items.items()},
    }


def _items(language: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{language['question']}: {item['question']}\n{language['answer']}:",
            "choices": item["choices"],
            "answer": item["answer"],
        }
        for item in language["items"]
    ]


def _task(name: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": partial(_documents, items),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _documents(items: list[dict[str, Any]], **_: Any) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_list(items)}
