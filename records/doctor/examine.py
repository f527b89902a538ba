"""Runs every check on a set-up. ``deepseek-moe doctor`` prints what comes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek_records.doctor.adapter_checks import adapter_packed_wrongly, adapter_without_effect, lora_misses_experts
from deepseek_records.doctor.model_checks import (
    balance_loss_times_accumulation,
    bias_in_few_bits,
    bias_never_moves,
    dynamic_experts_lost,
    experts_not_quantized,
    indexer_frozen,
    mtp_dropped,
    pooled_balance_loss,
    recomputed_routing,
)
from deepseek_records.doctor.subject import Finding, NotCheckedError, Subject
from deepseek_records.doctor.tokenizer_checks import mixed_up_tokenizer, pad_equals_end, untrainable_template

CHECKS: Mapping[str, Callable[[Subject], Finding | None]] = {
    "bias never moves": bias_never_moves,
    "experts not quantized": experts_not_quantized,
    "prediction layers dropped": mtp_dropped,
    "indexer frozen": indexer_frozen,
    "LoRA misses experts": lora_misses_experts,
    "B packed wrongly": adapter_packed_wrongly,
    "adapter without effect": adapter_without_effect,
    "pooled balance loss": pooled_balance_loss,
    "balance loss times accumulation": balance_loss_times_accumulation,
    "bias in few bits": bias_in_few_bits,
    "pad equals end": pad_equals_end,
    "routing differs when recomputed": recomputed_routing,
    "mixed-up tokenizer": mixed_up_tokenizer,
    "untrainable chat template": untrainable_template,
    "dynamic experts lost": dynamic_experts_lost,
}


@dataclass(frozen=True)
class Examination:
    """What the checks found.

    Attributes:
        findings: By check.
        passed: Checks that found nothing.
        not_checked: Why, by check.
    """

    findings: dict[str, Finding] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return {
            "findings": [
                {"check": check, "message": finding.message, "cure": finding.cure}
                for check, finding in self.findings.items()
            ],
            "passed": self.passed,
            "not_checked": self.not_checked,
        }


def examine(subject: Subject) -> Examination:
    """Return what the checks find in a set-up.

    Args:
        subject: From `open_subject`.
    """
    examination = Examination()
    for name, check in CHECKS.items():
        try:
            finding = check(subject)
        except NotCheckedError as error:
            examination.not_checked[name] = str(error)
            continue
        if finding is None:
            examination.passed.append(name)
        else:
            examination.findings[name] = finding
    return examination
