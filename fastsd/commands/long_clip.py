"""`fastsd long-clip`: stretch a model's text encoder to read 248 tokens at once instead of 77."""

from __future__ import annotations

import json
from pathlib import Path

from fastsd.config.schema import ModelTable
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_merged
from fastsd.model.formats.load import component_state_dict, write_component, write_rest
from fastsd.model.formats.write import check_folder_name
from fastsd.model.text_encoder import stretch
from fastsd.storage import new_folder, write_text
from fastsd.terminal.console import STDOUT, Console

KEPT = 20  # number of first positions that stay as they are: CLIP's short captions have trained hardly any others


def long_clip(base: str, out: Path, tokens: int, tokenizer: str = "", console: Console = STDOUT) -> None:
    """Write `base` to `out` as a diffusers folder, with its position embeddings stretched to `tokens`.

    Raises:
        UserError: the base does not load, `out` exists, or the encoder already has `tokens` positions or more.
    """
    check_folder_name(out)
    if out.exists():
        raise UserError("out-exists", f"OUT is {str(out)!r}, which already exists; choose a new folder")
    model = load_merged(ModelTable(base=base, tokenizer=tokenizer))
    window = model.text.window
    try:
        stretch(model.text.module, tokens, KEPT)
    except ValueError as error:
        raise UserError("long-clip-tokens", f"--tokens: {error}") from None
    with new_folder(out) as folder:
        for name in COMPONENTS:
            write_component(folder, model, name, component_state_dict(model, name))
        write_rest(folder, model)
        config_path = folder / "tokenizer" / "tokenizer_config.json"
        tokenizer_config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        write_text(config_path, json.dumps(tokenizer_config | {"model_max_length": tokens}, indent=2) + "\n")
    advice = f"train the text encoder before using captions longer than {window} tokens"
    console.echo(f"{out}: {window} positions stretched to {tokens}, the first {KEPT} kept; {advice}")
