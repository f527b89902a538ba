"""The energy of a run's stages, the same for the card and the documents: what meters counted, and apart an estimate.

A stage whose meter counted everything is never estimated; one that was metered in part is told in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_records.stages import Stage

# Rough draw under load, of a core and a GPU; stated as an assumption, never as a measurement.
WATTS_PER_CPU, WATTS_PER_GPU = 10, 700
JOULES_PER_KWH, JOULES_PER_MWH = 3.6e6, 3.6e9


@dataclass(frozen=True)
class StageEnergy:
    """What is known of one stage.

    Attributes:
        stage: The stage.
        measured: Joules that meters counted; None where none was read.
        lacks: What they left out, in words; empty where nothing.
        estimated: Joules from an assumed draw, where nothing was measured; None where nothing to go by was recorded.
        keys: Of the summary, what the estimate is from.
    """

    stage: Stage
    measured: float | None = None
    lacks: str = ""
    estimated: float | None = None
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, stage: Stage) -> "StageEnergy":
        """Return what is known of a stage.

        Args:
            stage: The stage.
        """
        energy = stage.summary.energy if stage.summary else None
        machine = stage.environment.machine
        if energy is not None and energy.joules:
            meters = " ".join(energy.joules)
            lacking = [
                *(["the processors"] if "RAPL" not in meters else []),
                *(["the GPUs"] if machine.gpus and "NVML" not in meters else []),
                *(["the other machines"] if energy.num_machines > 1 else []),
                *(["what it did before it was resumed"] if not energy.is_whole else []),
            ]
            return cls(stage, sum(energy.joules.values()), " and ".join(lacking))
        if machine.gpus:
            joules = WATTS_PER_GPU * len(machine.gpus) * (stage.seconds or 0)
            return cls(stage, estimated=joules or None, keys=("seconds",))
        if energy is not None and energy.is_whole:
            # Each of several processes works about as much as the one that kept the record.
            return cls(
                stage,
                estimated=WATTS_PER_CPU * energy.cpu_seconds * energy.num_processes,
                keys=("energy.cpu_seconds",),
            )
        joules = WATTS_PER_CPU * (machine.num_cpus or 0) * (stage.seconds or 0)
        return cls(stage, estimated=joules or None, keys=("seconds",))

    @property
    def meters(self) -> tuple[str, ...]:
        """What was read."""
        energy = self.stage.summary.energy if self.stage.summary else None
        return tuple(energy.joules) if energy is not None else ()

    @property
    def basis(self) -> str:
        """What the estimate stands on, in words."""
        if self.stage.environment.machine.gpus:
            return f"time, at an assumed {WATTS_PER_GPU} W per GPU"
        if self.keys == ("seconds",):
            return f"time and cores, at an assumed {WATTS_PER_CPU} W per core"
        return f"processor time, at an assumed {WATTS_PER_CPU} W per core at work"


def energy_sentence(stages: Sequence[Stage]) -> str:
    """Return a sentence on the energy used, which says what was measured and what estimated.

    Args:
        stages: Finished or not.
    """
    each = [StageEnergy.of(stage) for stage in stages if stage.is_finished]
    measured = [one for one in each if one.measured is not None]
    estimated = [one for one in each if one.estimated is not None]
    parts = []
    if measured:
        total = sum(one.measured or 0 for one in measured) / JOULES_PER_KWH
        lacking = sorted({one.lacks for one in measured if one.lacks})
        without = f", without {', '.join(lacking)}" if lacking else ""
        kinds = sorted({name.split()[0] for one in measured for name in one.meters})
        parts.append(f"{total:.2g} kWh by {' and '.join(kinds)}{without}")
    if estimated:
        total = sum(one.estimated or 0 for one in estimated) / JOULES_PER_KWH
        basis = "; ".join(sorted({one.basis for one in estimated}))
        parts.append(f"about {total:.2g} kWh, an estimate ({basis}), not metered")
    if not parts:
        return "Energy: not estimated, for neither time nor machine was recorded."
    return f"Energy: {'; besides '.join(parts)}."
