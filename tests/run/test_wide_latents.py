"""Runs with 16 latent channels, normalised on their own cache: bits, resume, precision, sampling."""

import json
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
import torch
from runs import final, rewind, run, same
from sentences import refused, says
from tiny import job, make_wide_model, tiny_vae, wide_vae

from fastsd.commands.cache import cache, inspect_cache
from fastsd.commands.swap_vae import swap_vae
from fastsd.config.schema import ModelTable, load_config
from fastsd.data.building import upkeep
from fastsd.data.cache import LatentCache
from fastsd.model.formats.load import load_model
from fastsd.model.vae import Vae
from fastsd.terminal.console import Console

STAGES = "".join(
    f'[[stage]]\nname = "{name}"\ntrain = ["unet"]\nuntil = 2\nbatch = 6\nmicro_batch = 3\noptimizer = "lion"\nlr = 1e-4\n'
    f'precision = "{precision}"\ncheckpoint_every = 1\nkeep_checkpoints = 9\n'
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32"))
)


@pytest.fixture(scope="module")
def normalised(tmp_path_factory, images):
    """The folder of a model with 16 channels whose VAE has the statistics of the images, and the text of `cache --stats`."""
    folder = tmp_path_factory.mktemp("wide")
    make_wide_model(folder / "base")
    config = load_config(job(folder, folder / "base", images, STAGES, resolution=32), [f"cache.dir={folder / 'cache'}"])
    out = StringIO()
    cache(config, Console(file=out, width=400))
    inspect_cache(config, verify=False, prune=False, stats=True, console=Console(file=out, width=400))
    swap_vae(
        str(folder / "base"), str(folder / "base"), folder / "start", normalise=folder / "cache", console=Console(file=out)
    )
    return folder, out.getvalue()


def config_of(normalised, tmp_path: Path, images: Path) -> tuple[Path, str]:
    folder = normalised[0]
    return job(tmp_path, folder / "start", images, STAGES, resolution=32), f"cache.dir={folder / 'cache'}"


def test_statistics_of_a_cache_are_written_into_the_model(normalised, images, tmp_path):
    """Scaled latents then have mean 0 and deviation 1 by channel. The cache stays valid, because the encoder is the same."""
    folder, text = normalised
    model, vae = load_model(ModelTable(base=str(folder / "start"))), wide_vae()
    assert "16 latent channels, scaling factor 1.5305, shift 0.0609" in text
    assert "VAE scaling factor 1.5305, shift 0.0609 -> scaling factor 1, mean and deviation of each channel" in text
    assert model.vae.hash == Vae(vae, "").hash
    with closing(LatentCache.open(folder / "cache")) as latents:
        raw = latents.get(range(len(latents)))["latents"].double()
    scaled = model.vae.scale(raw).transpose(0, 1).flatten(1)
    assert scaled.mean(1).abs().max() <= 1e-6 and (scaled.std(1, correction=0) - 1).abs().max() <= 1e-6
    assert json.loads((folder / "start" / "swap.json").read_text())["latents_std"] == list(model.vae.latent_space.std)
    path, place = config_of(normalised, tmp_path, images)
    out = StringIO()
    cache(load_config(path, [place]), Console(file=out, width=400))
    assert says(out.getvalue(), "images-cached", encoded=0)
    view = next(iter(upkeep.stats(folder / "cache").views.values()))
    assert max(map(abs, view.mean)) <= 1e-6 and view.std == pytest.approx([1] * 16)


@pytest.mark.slow
def test_resume_precision_and_samples_change_no_bit(normalised, images, tmp_path):
    paths = [tmp_path / name for name in ("whole", "resumed")]
    for path in paths:
        path.mkdir()
    configs = [config_of(normalised, path, images) for path in paths]
    whole, _ = run(*configs[0], "stage.sample_every=1")
    resumed, _ = run(*configs[1])
    assert same(final(whole), final(resumed))
    for step in (3, 1):
        rewind(resumed, step)
        run(*configs[1])
        assert same(final(whole), final(resumed))
    model = load_model(ModelTable(base=str(whole / "model")))
    assert model.vae.latent_space == load_model(ModelTable(base=str(normalised[0] / "start"))).vae.latent_space
    assert model.unet.conv_in.in_channels == model.unet.conv_out.out_channels == 16


def test_a_cache_that_cannot_normalise_gets_one_sentence(normalised, images, tmp_path, monkeypatch):
    folder, quiet = normalised[0], Console(file=StringIO())
    tiny_vae(16, seed=8).save_pretrained(tmp_path / "other")
    with refused("swap-normalise-latents", vae=tmp_path / "other"):
        swap_vae(str(folder / "base"), str(tmp_path / "other"), tmp_path / "out", normalise=folder / "cache", console=quiet)
    (tmp_path / "empty").mkdir()
    with refused("no-cache"):
        swap_vae(str(folder / "base"), str(folder / "base"), tmp_path / "out", normalise=tmp_path / "empty", console=quiet)
    get = LatentCache.get

    def without_channel_3(self, positions):
        batch = get(self, positions)
        batch["latents"][:, 3] = 0.5
        return batch

    monkeypatch.setattr(LatentCache, "get", without_channel_3)
    with refused("swap-normalise-constant", channel=3, count=21):
        swap_vae(str(folder / "base"), str(folder / "base"), tmp_path / "out", normalise=folder / "cache", console=quiet)
    assert not (tmp_path / "out").exists()


def test_fixed_factors_of_16_channels_keep_their_value():
    z = torch.randn(1, 16, 4, 4)
    vae = Vae(wide_vae(), "")
    assert torch.equal(vae.scale(z), (z - 0.0609) * 1.5305) and torch.equal(vae.unscale(z), z / 1.5305 + 0.0609)
