"""What a run trains on - its view of the cache, token ids or text embeddings, and the images that are held out."""

from __future__ import annotations

from collections.abc import Callable

from fastsd.config.schema import Config
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Loader
from fastsd.data.text_embeddings import States
from fastsd.data.tokens import Tokens
from fastsd.data.validation_split import choose_sets
from fastsd.errors import UserError
from fastsd.model.model import Model


class TrainingData:
    """The data of a run, open.

    Args:
        config: the run's.
        model: whose VAE and tokenizer the cache must fit.
        note: is given a line on what a user should know.

    Attributes:
        latents: the view of the cache.
        tokens: token ids of its captions; None = tokenized as they are read.
        states: text embeddings of its captions, where they are cached.
        sets: what a validation measures, and what is left out of training for it.
        epochs: images in an epoch of each stage. They differ where stages split captions into tags differently.

    Raises:
        UserError: the cache is missing, damaged, or of another model.
    """

    def __init__(self, config: Config, model: Model, note: Callable[[str], None]) -> None:
        self._config, self._model = config, model
        self.latents = LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))
        self.tokens: Tokens | None = None
        try:
            self.tokens = Tokens(self.latents, model.text.tokenizer, model.text.window, model.text.chunks)
        except UserError as error:
            note(f"captions are tokenized on the way: {error}")
        self.states = States(config.cache, self.latents, model.text) if config.cache.hidden_states else None
        self.sets = choose_sets(self.latents, config)
        self.epochs = [self.loader(index).images for index in range(len(config.stage))]

    def loader(self, index: int, origin: int = 0) -> Loader:
        """Batches for a stage that began after `origin` images of the run."""
        return Loader(
            self.latents, self._model.text.tokenize, self._config.seed, self._config.stage[index],
            data=self._config.data, origin=origin, tokens=self.tokens, states=self.states, left_out=self.sets.left_out,
        )  # fmt: skip

    def close(self) -> None:
        self.latents.close()
        if self.states:
            self.states.close()
