"""The setting LORA: name=repository, name=repository@revision or name=folder, separated by commas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared import startup
from shared.errors import StartError

if TYPE_CHECKING:
    from shared.volume import ModelPath

    from .schemas import Settings


def adapter_sources(lora: str | None) -> dict[str, tuple[str, str | None]]:
    """The repository or folder and the revision of each adapter that LORA names."""
    pairs = (pair.strip().partition("=") for pair in (lora or "").split(",") if pair.strip())
    return {name.strip(): _split_revision(source.strip()) for name, _, source in pairs}


def _split_revision(source: str) -> tuple[str, str | None]:
    """`repository@revision` in two; a folder's name may hold an @."""
    if source.startswith(("/", ".", "~")):
        return source, None
    repository, _, revision = source.partition("@")
    return repository, revision or None


def check_adapters(lora: str | None) -> str | None:
    """`lora` as it is. Raises ValueError for a pair without a name or a source, and for equal names."""
    sources = adapter_sources(lora)
    pairs = [pair for pair in (lora or "").split(",") if pair.strip()]
    if len({name.casefold() for name in sources}) < len(pairs):
        raise ValueError("two adapters have the same name")
    if not all(name and source for name, (source, _) in sources.items()):
        raise ValueError("each adapter is name=repository or name=folder, separated by commas")
    return lora


def resolve_adapters(settings: Settings) -> dict[str, ModelPath]:
    """The folder of each adapter that LORA names. Raises StartError for one that cannot be had."""
    folders = {}
    for name, (source, revision) in adapter_sources(settings.lora).items():
        if name.casefold() in {served.casefold() for served in (settings.public_name, settings.model_name)}:
            raise StartError(f"LORA: {name} is the model's own name. Choose another.", code="bad_setting")
        try:
            folders[name] = startup.resolve(settings.model_copy(update={"model_revision": revision}), source)
        except StartError as cause:
            message = cause.message.removeprefix("MODEL_NAME=")
            raise StartError(f"LORA, {name}: {message}", code=cause.code) from None
    return folders
