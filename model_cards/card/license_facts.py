"""Under which license a model is, as far as that is known: given, written in its folder, or its base model's.

Nothing is assumed. A license that nobody stated is absent from the metadata, the card says so, and the upload stops.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError

# The Hub's list.
_IDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENSES = frozenset(_IDS.split())


@dataclass(frozen=True)
class License:
    """A license and how it is known.

    Args:
        fields: ``license`` and, for one that the Hub has no id for, ``license_name`` and ``license_link``.
        reason: A sentence for the card.
    """

    fields: dict[str, str]
    reason: str

    @property
    def is_known(self) -> bool:
        """True where somebody stated it."""
        return self.fields.get("license", "unknown") != "unknown"


def find_license(given: str | None, *, folder: Path | None, base: str | None) -> License:
    """Return the license as far as it is known.

    Args:
        given: What the author of the card passes.
        folder: The model's folder, whose ``README.md`` may state it.
        base: The model that it was made from: a local path or a Hub id.

    Raises:
        ValueError: The given one is not on the Hub's list.
    """
    if given is not None:
        if given not in LICENSES:
            raise ValueError(f"license: got {given!r}, expected an id of the Hub's such as apache-2.0, mit or other")
        return License({"license": given}, f"License: {given}, stated when this card was written.")
    if folder is not None and (fields := read_license(folder / "README.md")):
        return License(fields, f"License: {_name(fields)}, as the README.md beside the weights states.")
    if base is not None and (fields := _read_base(base)):
        name = Path(base).name if Path(base).is_absolute() else base
        return License(fields, f"License: {_name(fields)}, that of the base model `{name}`.")
    return License(
        {}, "License: not stated. Nobody named one when this card was written, and no base model's is known."
    )


def _name(fields: dict[str, str]) -> str:
    return fields.get("license_name") or fields["license"]


def _read_base(base: str) -> dict[str, str]:
    """What the base model's card states, if it lies on this machine: in its folder, or in the Hub's cache."""
    path = Path(base).expanduser()
    if path.is_dir():
        places = [path / "README.md", path.parent / "README.md"] if path.name == "model" else [path / "README.md"]
        return next((fields for fields in map(read_license, places) if fields), {})
    try:
        cached = try_to_load_from_cache(base, "README.md")
    except HFValidationError:
        return {}
    return read_license(Path(cached)) if isinstance(cached, str) else {}


def read_license(readme: Path) -> dict[str, str]:
    """Return the metadata on the license in a card: ``license`` and maybe ``license_name`` and ``license_link``.

    Args:
        readme: The card; where it is absent or broken it states nothing.
    """
    if not readme.is_file():
        return {}
    try:
        found: Any = metadata_load(readme) or {}
    except Exception:  # Somebody else's YAML: whatever is wrong with it, it states nothing.
        return {}
    stated = found.get("license") if isinstance(found, dict) else None
    if not isinstance(stated, str) or stated == "unknown":
        return {}
    if stated not in LICENSES:
        return {"license": "other", "license_name": stated}
    return {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}
