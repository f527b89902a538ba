"""The files that start a stage on one machine, Slurm, Kubernetes or Ray: rendered from templates, checked before.

`deepseek-moe launch` writes them. Nothing here starts anything: torchrun and accelerate do, and the stage itself goes
on from its last checkpoint when the same job starts again.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PLACES = {
    "local": "local.sh.jinja",
    "slurm": "slurm.sh.jinja",
    "kubernetes": "jobset.yaml.jinja",
    "ray": "ray.py.jinja",
}
ENGINES = ("ddp", "fsdp2", "fsdp2_sharded", "zero3", "expert_parallel")
_TIME = re.compile(r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?$")


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Attributes:
        stage: The command, such as "pretrain".
        recipe: Its recipe: an embedded name or a path that every node sees.
        output: The run folder, on storage that every node sees.
        settings: Words after them, such as "--seed 3".
        name: Of the job; lower-case letters, digits and dashes.
        nodes: Machines.
        processes_per_node: One per device.
        uses_gpus: Whether each process takes a GPU; False trains on the CPU.
        engine: One of `ENGINES`.
        time: Longest run, [DAYS-]HOURS:MINUTES:SECONDS.
        restarts: How often a failed job starts again by itself.
        image: Container image, for Kubernetes.
        claim: PersistentVolumeClaim that holds the run folder, for Kubernetes.
        partition: Slurm's; empty for the default.
        python: The interpreter on the nodes.
    """

    stage: str
    recipe: str
    output: str
    settings: tuple[str, ...] = ()
    name: str = "deepseek-moe"
    nodes: int = 1
    processes_per_node: int = 8
    uses_gpus: bool = True
    engine: str = "ddp"
    time: str = "1-00:00:00"
    restarts: int = 10
    image: str = ""
    claim: str = ""
    partition: str = ""
    python: str = "python"

    @property
    def world(self) -> int:
        """All processes."""
        return self.nodes * self.processes_per_node

    @property
    def words(self) -> list[str]:
        """The stage's own words, as the command line takes them."""
        return [self.stage, self.recipe, "--output", self.output, *self.settings]

    @property
    def stage_command(self) -> str:
        """The same, quoted for a shell."""
        return " ".join(shlex.quote(word) for word in self.words)


def check_job(job: Job, place: str) -> None:
    """Raise a `ValueError` in one line where a job cannot be started.

    Args:
        job: The job.
        place: A key of `PLACES`.
    """
    if place not in PLACES:
        raise ValueError(f"--on: got {place!r}, expected one of {', '.join(PLACES)}")
    for name in ("nodes", "processes_per_node"):
        if getattr(job, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(job, name)}, expected at least 1")
    if job.restarts < 0:
        raise ValueError(f"--restarts: got {job.restarts}, expected at least 0")
    if job.engine not in ENGINES:
        raise ValueError(f"--engine: got {job.engine!r}, expected one of {', '.join(ENGINES)}")
    if not _TIME.match(job.time):
        raise ValueError(f"--time: got {job.time!r}, expected [DAYS-]HOURS:MINUTES:SECONDS")
    if not _NAME.match(job.name):
        raise ValueError(f"--name: got {job.name!r}, expected lower-case letters, digits and dashes, at most 42")
    if place == "local" and job.nodes != 1:
        raise ValueError(f"--nodes: got {job.nodes}, expected 1 with --on local")
    if place == "kubernetes" and not (job.image and job.claim):
        raise ValueError("--image and --claim: got none, expected both with --on kubernetes")
    if place == "ray" and job.engine != "ddp":
        raise ValueError(f"--engine: got {job.engine}, expected ddp with --on ray (accelerate reads no file there)")
    if job.engine == "expert_parallel" and not any("expert-parallel-size" in word for word in job.settings):
        raise ValueError("--engine: got expert_parallel, expected --expert-parallel-size N among the settings as well")


def render_job(job: Job, place: str) -> str:
    """Return the file that starts a job.

    Args:
        job: One that `check_job` accepts.
        place: A key of `PLACES`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only here, so that --help answers at once

    environment = Environment(
        loader=PackageLoader("deepseek_training.launch", "scripts"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(PLACES[place]).render(job=job, engine_file=_engine_file(job))


def _engine_file(job: Job) -> str:
    """A shell expression for accelerate's file of the engine, wherever the package lies on the node."""
    folder = f"{shlex.quote(job.python)} -c 'from deepseek_training.engine import LAUNCH_FOLDER; print(LAUNCH_FOLDER)'"
    return f'"$({folder})/{job.engine}.yaml"'


def recipe_for_nodes(recipe: str) -> str:
    """Return the recipe's name, or its absolute path, for a node starts in another folder."""
    path = Path(recipe)
    return str(path.resolve()) if path.is_file() else recipe
