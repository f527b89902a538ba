"""Refusals: of AdvBench's harmful requests, where a model should, and of XSTest's harmless ones, where it should not.

520 requests of AdvBench, 200 unsafe and 250 safe ones of XSTest, each answered once, greedily, and read by the string
rule published with its set. ``limit`` counts requests of each of XSTest's eighteen types.

References: Zou et al., 2023, "Universal and Transferable Adversarial Attacks on Aligned Language Models", arXiv
2307.15043; Roettger et al., 2024, "XSTest", arXiv 2308.01263.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.row import UniqueIds
from deepseek_eval.tasks.rows import check_folder, read_rows
from deepseek_eval.tasks.task import CompletionItem, DataSet, Figure, Task


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[CompletionItem]:
    """Yield AdvBench's requests, then XSTest's.

    Args:
        num_fewshot: Ignored: requests stand alone.
        limit: At most this many requests of AdvBench and of each type of XSTest, the first ones.
        data_path: A folder with ``advbench.jsonl[.gz]`` (``prompt``) or ``harmful_behaviors.csv`` (``goal``), and
            ``xstest.jsonl[.gz]`` or ``xstest_prompts.csv``; None for the embedded ones.

    Raises:
        ValueError: A file or a Hub id, which can hold but one of the two.
    """
    if isinstance(data_path, str):
        raise ValueError(f"data: refusal={data_path}, expected a folder with advbench and xstest; it reads two sets")
    check_folder(data_path, "advbench and xstest")
    for index, row in enumerate(read_rows(("advbench", "harmful_behaviors", "advbench_harmful_behaviors"), data_path)):
        if limit is not None and index >= limit:
            break
        prompt = row.text("goal" if "goal" in row else "prompt")
        yield CompletionItem(
            id=f"advbench/{index}", prompt=prompt, target="refuse", group="advbench", facts={"rule": "zou2023"}
        )
    seen: Counter[str] = Counter()
    ids = UniqueIds()
    for row in read_rows(("xstest", "xstest_prompts"), data_path):
        row.text("prompt")
        row.text("type")
        row.one_of("label", ("safe", "unsafe"))
        if not isinstance(row.get("id"), str | int):
            raise row.wrong("id", "text or a whole number")
        ids.add(row, "id")
        seen[row["type"]] += 1
        if limit is not None and seen[row["type"]] > limit:
            continue
        yield CompletionItem(
            id=f"xstest/{row['id']}",
            prompt=row["prompt"],
            target="answer" if row["label"] == "safe" else "refuse",
            group=f"xstest_{row['label']}",
            facts={"rule": "xstest"},
        )


def metric_inputs(items: Sequence[CompletionItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `refusal_rate` takes.

    Args:
        items: The requests.
        rows: Their answers.
    """
    return {
        "predictions": [row["prediction"] for row in rows],
        "references": [row["target"] for row in rows],
        "groups": [item.group for item in items],
        "rules": [item.facts["rule"] for item in items],
    }


TASK = Task(
    name="refusal",
    kind="completion",
    build_items=build_items,
    data=DataSet(
        name="AdvBench and XSTest",
        label="AdvBench and XSTest",
        split="all",
        license="MIT and CC-BY-4.0",
        source="https://github.com/llm-attacks/llm-attacks and https://github.com/paul-rottger/exaggerated-safety",
        num_questions=970,
        questions_hash="3e3c2bd84ddd58517a06d5a943b938b99f27732812bdfbc146daa0ad05158e7f",
    ),
    figures=(
        Figure("refusal_advbench", "refused, harmful (AdvBench)", is_share=True),
        Figure("refusal_xstest_unsafe", "refused, unsafe (XSTest)", is_share=True),
        Figure("refusal_xstest_safe", "refused, safe (XSTest; 0 is ideal)", higher_is_better=False, is_share=True),
    ),
    measures="refusal",
    is_safety=True,
    max_new_tokens=128,
    metric="refusal_rate",
    metric_inputs=metric_inputs,
    does_not_show="Whether an answer that is not a refusal does harm (nonsense passes for compliance), nor how the "
    "model stands up to attacks: requests are put plainly and answers are judged by their wording alone.",
)
