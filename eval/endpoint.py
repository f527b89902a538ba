"""Has a served model write the programs of a task, over OpenAI's protocol; `samples_reader.py` then scores them.

Called by ``deepseek-moe evaluate URL``. Tasks that compare the log-probabilities of given words need `echo` with
`logprobs`, which few servers give: they are refused in words, as are chats.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.prompt_style import take_code
from deepseek_eval.questions import read_questions
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.catalogue import find_task
from deepseek_eval.tasks.task import ProgramItem
from deepseek_records.exit_codes import RunFailedError
from deepseek_records.run_folder import write_text

KEY_VARIABLE = "DEEPSEEK_MOE_API_KEY"
_CLIENTS = 16
_MAX_STOPS = 4  # of the protocol; what follows the others is cut off here


def is_endpoint(name: str) -> bool:
    """Return whether a model is named by an address."""
    return name.startswith(("http://", "https://"))


def check_endpoint_tasks(url: str, names: Sequence[str]) -> None:
    """Raise at a task that a server cannot answer.

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
                f"tasks: got {task.name}, expected tasks that are answered by programs at {url}: {task.name} compares "
                "log-probabilities of given words, which a completion does not tell; evaluate the checkpoint itself"
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
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    model = str(_ask(f"{base}/models", None)["data"][0]["id"])
    most = chosen.max_new_tokens or questions.task.max_new_tokens

    def complete(item: ProgramItem) -> dict[str, Any]:
        body = {
            "model": model,
            "prompt": item.prompt,
            "max_tokens": most,
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "seed": chosen.seed,
            "stop": list(item.stop[:_MAX_STOPS]),
        }
        text = _ask(f"{base}/completions", body)["choices"][0]["text"]
        return {"task_id": item.id, "completion": take_code("base", item, text)}

    with ThreadPoolExecutor(_CLIENTS) as pool:
        answers = pool.map(complete, questions.items)
        rows = list(tqdm(answers, total=len(questions.items), desc=f"evaluate {task_name}: write", unit="problem"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return model


def _ask(address: str, body: dict[str, Any] | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=600) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{address}: refused with {error.code}: {error.read()[:300].decode(errors='replace')}"
        ) from None
    except (OSError, ValueError) as error:
        raise RunFailedError(f"{address}: no answer ({error})") from None
