"""Has a served model write the programs of a task, over OpenAI's protocol; `samples_reader.py` then scores them.

Called by ``deepseek-moe evaluate URL`` where no tokenizer is named: texts go to the server as they are. Other tasks
need the model's tokenizer (`served_model.py`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.prompt_style import take_code
from deepseek_eval.questions import read_questions
from deepseek_eval.served_model import MAX_STOPS, ServedModel
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.catalogue import find_task
from deepseek_records.run_folder import write_text


def check_endpoint_tasks(url: str, names: Sequence[str]) -> None:
    """Raise at a task that a server cannot answer without the model's tokenizer.

    Args:
        url: The server.
        names: The tasks.

    Raises:
        ValueError: A task is not answered by programs.
    """
    for name in names:
        task = find_task(name)
        if task.kind != "program":
            raise ValueError(
                f"tasks: got {task.name} without --tokenizer, expected tasks that are answered by programs at {url}; "
                "with --tokenizer MODEL, whose folder or Hub id holds the served model's, every task on text runs"
            )


def write_samples(url: str, task_name: str, path: Path, **settings: Any) -> str:
    """Ask a server for a completion of every problem, write them as JSON lines, and return the model's name.

    Args:
        url: With or without `/v1`.
        task_name: A task whose answers are programs.
        path: The file to write.
        **settings: `limit`, `data_path`, `max_new_tokens`, `temperature`, `top_p`, `seed`, `num_fewshot`.

    Raises:
        ValueError: The server refuses a request.
        RunFailedError: It does not answer.
    """
    chosen = EvalSettings.of(tasks=(task_name,), **settings)
    questions = read_questions(find_task(task_name), chosen)
    model = ServedModel(url)
    most = chosen.max_new_tokens or questions.task.max_new_tokens
    bodies = (
        {
            "prompt": item.prompt,
            "max_tokens": most,
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "seed": chosen.seed,
            "stop": list(item.stop[:MAX_STOPS]),
        }
        for item in questions.items
    )
    texts = tqdm(
        model.complete(bodies), total=len(questions.items), desc=f"evaluate {task_name}: write", unit="problem"
    )
    rows = [
        {"task_id": item.id, "completion": take_code("base", item, text)}
        for item, text in zip(questions.items, texts, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return model.name
