"""Which function fills a field from files, by the name that ``fields.yaml`` gives."""

from collections.abc import Callable, Mapping

from deepseek_model_cards.eu import data_findings, evaluation_findings, model_findings, training_findings
from deepseek_model_cards.eu.findings import Found
from deepseek_model_cards.eu.run_records import RunRecords

Finder = Callable[[RunRecords], Found]
_NAMED = {
    model_findings: (
        *("weight_hashes", "training_end", "dependencies", "architecture", "design", "inputs", "outputs"),
        *("total_size", "integration", "hardware_needs", "inference_compute", "inference_method"),
    ),
    training_findings: (
        *("stages", "alignment", "training_time", "compute", "compute_method", "energy", "energy_method", "versions"),
    ),
    data_findings: (
        *("data_types", "provenance", "obtained", "data_points", "scope", "languages", "curation", "unsuitability"),
        *("bias_measures", "data_size", "public_data", "public_large", "public_small", "teachers"),
    ),
    evaluation_findings: ("benchmarks", "safety", "limits"),
}
FINDERS: Mapping[str, Finder] = {
    **{name: getattr(module, name) for module, names in _NAMED.items() for name in names},
    "license": model_findings.license_of_model,
}
