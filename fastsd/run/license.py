"""The license of a base model, and a reminder to name that of the trained one."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from fastsd.config.schema import Config
from fastsd.model.formats.model_summary import read_summary

# Hub ids whose download contains no model card.
_HUB_LICENSES = dict.fromkeys(
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"),
    "creativeml-openrail-m",
)


def license_of(base: str) -> str:
    """Return the license of a base model, from its summary, its model card or its hub id; "" if it is not known."""
    folder = Path(base).expanduser()
    summary = read_summary(folder)
    if summary and summary.license:
        return summary.license
    with suppress(OSError):
        front_matter = (folder / "README.md").read_text(encoding="utf-8", errors="replace").split("---")[:2][-1]
        if match := re.search(r"^license: *[\"']?([\w.-]+)", front_matter, re.MULTILINE):
            return match[1]
    return _HUB_LICENSES.get(base, "")


def license_note(config: Config) -> str:
    """Ask for `export.license` if it is not set and that of the base model is known; otherwise return ""."""
    base_license = license_of(config.model.base)
    if config.export.license or not base_license:
        return ""
    return (
        f"export.license is not set, so the model card names no license, and the base model's is {base_license}; if yours is "
        f'the same, set export.license = "{base_license}"'
    )
