"""A cleaning that ends at a chosen moment; apart from its tests, for another process cannot import a test module."""

import importlib
import itertools
import json
import os
import signal
from pathlib import Path

import pyarrow.parquet

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.cleaning import data_card, passes, result
from deepseek_training.data.cleaning.shards import ShardWriter
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.data import DataRecipe

ITEM = "Which of the following organs stores the bile that is made by the liver of an adult human being?"
command = importlib.import_module("deepseek_training.stages.clean_data")

# The moment: what is called then, at which of its calls, and whether half of a file has been written by then.
STOPS = {
    "while fitting": (passes, "fit_context", 1, False),
    "within the first part": (pyarrow.parquet, "write_table", 1, True),
    "within the third part": (pyarrow.parquet, "write_table", 3, True),
    "before the duplicates": (command, "decide", 1, False),
    "within the second shard": (ShardWriter, "_write", 2, True),
    "between the splits": (ShardWriter, "close", 2, False),
    "after the shards": (result, "_write_samples", 1, False),
    "before the data card": (result, "write_card", 1, False),
    "after the data card": (data_card, "croissant", 1, False),
    "before the summary": (RunFolder, "finish", 1, False),
}


def write_sources(folder):
    """Two files with duplicates, another language and mail addresses between clean text."""
    folder.mkdir()
    texts = [text[:700] for text in load_texts("medicine", "all")[:150]]
    texts[20] = "Das Kind hat seit drei Tagen hohes Fieber und soll viel Wasser trinken, sagte die \u00c4rztin."
    texts[30] = f"An exam of last year. {ITEM} The answer is easy."
    texts[40] = "For the protocol of the study write to jane.doe@example.org, who keeps it for five years."
    texts[50], texts[60] = texts[3], texts[90]
    for name, part in (("a.jsonl", texts[:80]), ("b.jsonl", texts[80:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def clean(sources, output, *, workers=1, **settings):
    """Clean in four parts and several shards."""
    passes.BATCH_DOCUMENTS = 40
    settings = {"languages": ["en"], "shard_megabytes": 0.02, "validation_share": 0.2, **settings}
    recipe = DataRecipe(sources=[{"path": str(sources), "license": "MIT"}], **settings)
    return command.clean_data(recipe, output, {"quiz": [("7", ITEM)]}, workers=workers)


def arm(stop, output, end, set_attribute=setattr):
    """Have `end` called at a moment, with the file that is being written then cut in half."""
    owner, name, number, is_cut = STOPS[stop]
    original, calls = getattr(owner, name), itertools.count(1)

    def stopping(*args, **options):
        if next(calls) < number:
            return original(*args, **options)
        if is_cut:
            original(*args, **options)
            cut = [path for path in Path(output).rglob("*.partial")]
            assert cut
            for path in cut:
                os.truncate(path, path.stat().st_size // 2)
        return end()

    set_attribute(owner, name, stopping)


def clean_until_killed(sources, output, stop):
    """Kill this process by SIGKILL at a moment."""
    arm(stop, output, lambda: os.kill(os.getpid(), signal.SIGKILL))
    clean(sources, output)
