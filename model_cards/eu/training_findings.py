"""What the stages tell of the training: methods, time, computation, energy, versions."""

from dataclasses import dataclass

from deepseek_model_cards.card.limits import REWARDED, reward_line
from deepseek_model_cards.card.parameter_table import try_to_count
from deepseek_model_cards.energy_use import JOULES_PER_MWH, StageEnergy
from deepseek_model_cards.eu.contradictions import check_number
from deepseek_model_cards.eu.findings import Finding, Found, Source, one
from deepseek_model_cards.eu.run_records import RunRecords
from deepseek_model_cards.stage_rows import describe_machine, method_line, stage_title
from deepseek_model_cards.wording import format_seconds
from deepseek_records.run_folder import ENVIRONMENT_FILE, METRICS_FILE, RECIPE_FILE
from deepseek_records.stages import Stage, is_number

# Settings that say what was optimized and how, where a stage has them.
_SETTINGS = (
    *("optimizer", "learning_rate", "lr_scheduler", "warmup_steps", "max_steps", "epochs", "batch_size"),
    *("sequence_length", "beta", "epsilon", "num_generations", "weights", "bits", "seed"),
)
_AIMS = {
    "pretrain": "the likelihood of the next token",
    "adapt": "the likelihood of the next token",
    "sft": "the likelihood of the answers",
    "dpo": "the preferred answer over the other (DPO)",
    "align": "a reward, held near its start (PPO)",
    "grpo": "a reward within groups of answers (GRPO)",
    "distill": "agreement with a teacher",
}
# They change a model and train on nothing.
_WITHOUT_TRAINING = ("shrink", "quantize")
SECONDS_PER_DAY = 86_400
# Article 51(2): above it a model is presumed to have high-impact capabilities.
SYSTEMIC_FLOPS = 1e25


def stages(records: RunRecords) -> Found:
    """Return each stage with its aim and main settings."""
    findings = []
    for stage in records.stages:
        recipe = records.of_stage(stage, RECIPE_FILE)
        aim = f", to raise {_AIMS[stage.kind]}" if stage.kind in _AIMS else ""
        keys = [key for key in _SETTINGS if _is_shown(stage.settings.get(key))]
        shown = ", ".join(f"{key.replace('_', ' ')} {_text(stage.settings[key])}" for key in keys)
        text = f"{stage_title(stage)}{aim}" + (f": {shown}" if shown else "")
        findings.append(Finding(text, (Source(recipe, tuple(keys)),)))
        if method := method_line(stage):
            findings.append(one(method, recipe, "lora_rank"))
        if stage.kind in REWARDED:
            key = "reward_model" if isinstance(stage.settings.get("reward_model"), str) else "weights"
            findings.append(one(reward_line(stage), recipe, *([key] if stage.settings.get(key) else [])))
    findings += [one(f"{name} was begun and not finished", name) for name in records.unfinished]
    return Found(tuple(findings), records.missing_past if findings else "")


def _is_shown(value: object) -> bool:
    return value is not None and (is_number(value) or isinstance(value, str | list))


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def alignment(records: RunRecords) -> Found:
    """Return the stages that aligned or fine-tuned the model."""
    found = stages(records)
    kept = [one for one in records.stages if one.kind in ("sft", "dpo", "align", "grpo", "adapt")]
    names = {records.of_stage(stage, RECIPE_FILE) for stage in kept}
    return Found(tuple(finding for finding in found.findings if finding.sources[0].file in names))


def training_time(records: RunRecords) -> Found:
    """Return the time of each stage and of all, on the wall clock and of the hardware."""
    findings, wall, hardware = [], 0.0, 0.0
    for stage in records.stages:
        machine = stage.environment.machine
        if stage.seconds is None:
            continue
        devices = len(machine.gpus) or 1
        wall, hardware = wall + stage.seconds, hardware + devices * stage.seconds
        sources = (
            Source(records.of_stage(stage), ("seconds",)),
            Source(records.of_stage(stage, ENVIRONMENT_FILE), ("machine",)),
        )
        findings.append(
            Finding(f"{stage.name}: {stage.seconds:,.1f} s on {describe_machine(stage.environment)}", sources)
        )
    lacking = [stage.name for stage in records.stages if stage.seconds is None]
    if not findings:
        return Found()
    total = (
        f"in all {format_seconds(wall)}: {wall / SECONDS_PER_DAY:.3g} days, {hardware / SECONDS_PER_DAY:.3g} days of "
        f"hardware (GPUs, or the machine); {_month_range(wall)}"
    )
    findings.append(Finding(total, tuple(Source(records.of_stage(one), ("seconds",)) for one in records.stages)))
    lacks = f"the time of {', '.join(lacking)}" if lacking else records.missing_past
    return Found(tuple(findings), lacks)


def _month_range(seconds: float) -> str:
    months = seconds / SECONDS_PER_DAY / 30.4
    ranges = ((1, "less than 1 month"), (3, "1 to 3 months"), (6, "3 to 6 months"))
    return next((name for most, name in ranges if months <= most), "more than 6 months")


@dataclass(frozen=True)
class _Counted:
    """One stage's operations, and where the figures were read."""

    stage: Stage
    tokens: int
    active: int
    sources: tuple[Source, ...]

    @property
    def flops(self) -> float:
        return 6.0 * self.active * self.tokens


def _count(records: RunRecords, stage: Stage) -> _Counted | None:
    tokens, source = None, Source(records.of_stage(stage), ("num_training_tokens",))
    if stage.summary is not None and stage.summary.num_training_tokens:
        tokens = stage.summary.num_training_tokens
    elif counts := stage.series("num_tokens")[1]:  # TRL's running count
        tokens, source = round(counts[-1]), Source(records.of_stage(stage, METRICS_FILE), ("num_tokens",))
    folder = stage.run.model_path
    table = try_to_count(folder)
    if tokens is None or table is None or not table.active:
        return None
    weights = Source(records.of_stage(stage, f"{folder.name}/*.safetensors"))
    return _Counted(stage, tokens, table.active, (source, weights))


def compute(records: RunRecords) -> Found:
    """Return the operations of each stage, and their sum against the bound of Article 51(2)."""
    counted = [(stage, _count(records, stage)) for stage in records.stages]
    known = [one for _, one in counted if one is not None]
    if not known:
        return Found()
    findings = [
        Finding(
            f"{one.stage.name}: {one.flops:.3g} FLOPs, 6 x {one.active:,} parameters used per token x {one.tokens:,} "
            "tokens",
            one.sources,
        )
        for one in known
    ]
    total = sum(one.flops for one in known)
    lacking = [stage.name for stage, one in counted if one is None and stage.kind not in _WITHOUT_TRAINING]
    side = "below" if total < SYSTEMIC_FLOPS else "not below"
    what = "of these stages" if lacking or records.missing_past else "in all"
    text = f"{what} {total:.3g} FLOPs, {side} the 10^25 of Article 51(2)"
    findings.append(Finding(text, tuple(source for one in known for source in one.sources)))
    lacks = [f"the computation of {', '.join(lacking)}, whose tokens are not recorded"] if lacking else []
    lacks += [records.missing_past] if records.missing_past else []
    if any(stage.kind == "distill" for stage in records.stages):
        lacks.append("the teacher's passes")
    where = f"{known[0].sources[0]} x 6 x parameters"
    return Found(tuple(findings), "; ".join(lacks), None if lacks else check_number(total, where))


def compute_method(records: RunRecords) -> Found:
    """Return how `compute` counts."""
    if not compute(records).findings:
        return Found()
    return Found(
        states="Counted, not measured: 6 operations per trained token and parameter that a token uses, the most that "
        "the router may choose; attention to earlier tokens, generation and evaluation are left out."
    )


def energy(records: RunRecords) -> Found:
    """Return what meters counted, and an estimate of the rest, as Annex XI allows."""
    each = [StageEnergy.of(stage) for stage in records.stages]
    findings = []
    for one_ in each:
        if one_.measured is not None:
            without = f", without {one_.lacks}" if one_.lacks else ""
            text = f"{one_.stage.name}: {one_.measured / JOULES_PER_MWH:.3g} MWh, measured{without}"
            keys = tuple(f"energy.joules.{name}" for name in one_.meters)
            findings.append(Finding(text, (Source(records.of_stage(one_.stage), keys),)))
    guessed = [one_ for one_ in each if one_.estimated is not None]
    if guessed:
        total = sum(one_.estimated or 0 for one_ in guessed) / JOULES_PER_MWH
        basis = "; ".join(sorted({one_.basis for one_ in guessed}))
        of = "" if len(guessed) == len(each) else f" of {', '.join(one_.stage.name for one_ in guessed)}"
        sources = [source for one_ in guessed for source in _estimate_sources(records, one_)]
        findings.append(Finding(f"an estimate{of}: {total:.3g} MWh ({basis})", tuple(sources)))
    measured = [one_ for one_ in each if one_.measured is not None]
    open_ = [f"{one_.stage.name}: {one_.lacks}" for one_ in measured if one_.lacks]
    open_ += [one_.stage.name for one_ in each if one_.measured is None]
    if not measured:
        return Found(tuple(findings), "a measured figure, or your own estimate", states="Not measured.")
    return Found(tuple(findings), f"the energy of {', '.join(open_)}" if open_ else records.missing_past)


def _estimate_sources(records: RunRecords, one_: StageEnergy) -> list[Source]:
    machine = one_.stage.environment.machine
    found = [Source(records.of_stage(one_.stage), one_.keys)]
    if machine.gpus or one_.keys == ("seconds",):
        key = "machine.gpus" if machine.gpus else "machine.num_cpus"
        found.append(Source(records.of_stage(one_.stage, ENVIRONMENT_FILE), (key,)))
    return found


def energy_method(records: RunRecords) -> Found:
    """Return which meters were read."""
    meters = sorted({name.split()[0] for stage in records.stages for name in StageEnergy.of(stage).meters})
    if not meters:
        lacks = "the method of your figure"
        return Found(lacks=lacks, states="Not measured; there was no meter that could be read during the training.")
    told = {
        "NVML": "NVML, the counter of each GPU",
        "RAPL": "RAPL, the counters of the processors' packages and memory",
    }
    return Found(
        states=f"Read before and after each stage: {' and '.join(told[name] for name in meters)}. Whatever else "
        "worked on these devices is included; power supplies, network, disks and cooling are not."
    )


def versions(records: RunRecords) -> Found:
    """Return the versions of the libraries that the last stage ran with."""
    stages_ = records.stages
    if not stages_:
        found = records.facts.config.get("transformers_version")
        if not isinstance(found, str):
            return Found()
        name = records.of_model("config.json")
        return Found((one(f"transformers {found} (saved with)", name, "transformers_version"),))
    stage = stages_[-1]
    held = stage.environment.versions
    if not held:
        return Found()
    text = ", ".join(f"{key} {value}" for key, value in held.items())
    return Found((one(f"made with {text}", records.of_stage(stage, ENVIRONMENT_FILE), "versions"),))
