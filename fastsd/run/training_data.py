"""Training data of a run: its cache view, token ids or text embeddings, and the held-out split."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastsd.config.schema import Config
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Loader
from fastsd.data.text_embeddings import TextEmbeddings
from fastsd.data.tokens import Tokens
from fastsd.data.validation_split import choose_splits
from fastsd.errors import UserError
from fastsd.model.model import Model
from fastsd.terminal.texts import numbered
from fastsd.train.ranks import ALONE, Ranks


class TrainingData:
    """Data of a run, opened for reading.

    Args:
        config: config of the run.
        ranks: the ranks that share each batch.
        model: model with the VAE and tokenizer that the cache must match.
        state: tensors of the checkpoint that the run resumes from, by which its validation images are found again.

    Attributes:
        latents: the cache view.
        tokens: token ids of the captions; None = captions are tokenized when they are read.
        text_embeddings: text embeddings of the captions; None = they are not cached.
        sets: samples that validation measures, and the held-out samples that training skips.
        warnings: messages to the user, one line each.
        epochs: images per epoch, for each stage. They differ if the stages split captions into tags differently.

    Raises:
        UserError: the cache is missing, damaged, or built for another model.
    """

    def __init__(self, config: Config, model: Model, state: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
        self._config, self._model, self._ranks = config, model, ranks
        self.latents = LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))
        self.tokens: Tokens | None = None
        self.warnings = list[str]()
        try:
            self.tokens = Tokens(self.latents, model.text.tokenizer, model.text.window, model.text.chunks, model.text.cut)
        except UserError as error:
            self.warnings.append(f"captions are tokenized during training: {error}")
        self.text_embeddings: TextEmbeddings | None = None
        if config.cache.hidden_states:
            self.text_embeddings = TextEmbeddings(config.cache, self.latents, model.text)
        self.sets = choose_splits(self.latents, config, state)
        self.warnings += self.sets.notes
        loaders = [self.loader(index) for index in range(len(config.stage))]
        self.epochs = [loader.images for loader in loaders]
        self.warnings += filter(None, (rare_shapes(config, index, loader) for index, loader in enumerate(loaders)))

    def loader(self, index: int, origin: int = 0, ranks: Ranks | None = None) -> Loader:
        """Return the loader of this rank's batches for a stage that started after `origin` images of the run.

        Args:
            ranks: the ranks that share each batch; None = those of the run.
        """
        ranks = ranks or self._ranks
        config = self._config
        args = self.latents, self._model.text.tokenize, config.seed, config.stage[index]
        return Loader(
            *args,
            data=config.data,
            origin=origin,
            rank=ranks.rank,
            world=ranks.world,
            tokens=self.tokens,
            text_embeddings=self.text_embeddings,
            left_out=self.sets.left_out,
        )

    def close(self) -> None:
        self.latents.close()
        if self.text_embeddings:
            self.text_embeddings.close()


def rare_shapes(config: Config, index: int, loader: Loader) -> str:
    """Return a sentence on the images that a stage never trains on, because a batch has one shape, or ""."""
    stage = config.stage[index]
    images = loader.unused_samples(stage.steps(loader.images))
    if not images:
        return ""
    subject = numbered(images, "image is", "images are")
    problem = f"{subject} never trained on, because too few have one size for a batch of {stage.batch}"
    return f"stage {config.stage_name(index)!r}: {problem}; raise until or data.buckets.step, or lower batch"
